"""What each kind of device can do, in one table: precision, attention, compilation, Triton kernels, and why.

The precision of a run (`run.choices.pick_precision`) and of Muon (`optim.muon.resolve_dtype`), the order in which
attention backends are preferred (`attention.base.candidates`), whether fused kernels are used, and the words of
`epigram doctor` all come from here. A row says what a kind of device is good for; whether a library is installed and
whether a backend can serve a certain layer is asked of the backends themselves (`check`), and between several that can,
a run on CUDA measures.
"""

import importlib.util
from dataclasses import dataclass
from functools import partial

import torch

Capability = tuple[int, int]
"""A CUDA compute capability, (major, minor)."""


@dataclass(frozen=True, kw_only=True)
class Support:
    """One row. The *_reason fields are sentences without a full stop, to be shown.

    since: the lowest compute capability of this kind; None for devices without one. precision: what a run computes in
    when the recipe leaves it open. full, windowed: attention backends for the two kinds of layers, the preferred first,
    where none has been measured; backends that are not named come after these, and `reference` never by itself.
    compiles: torch.compile is used when the recipe leaves it open. triton: our Triton kernels are used.
    """

    device: str
    since: Capability | None
    precision: torch.dtype
    precision_reason: str
    full: tuple[str, ...]
    windowed: tuple[str, ...]
    attention_reason: str
    compiles: bool
    compile_reason: str
    triton: bool
    triton_reason: str


# float16 would need the loss to be scaled: gradients below 6e-8 vanish in it and sums above 65504 overflow. Nothing in
# epigram scales losses, so a device without fast bfloat16 products computes in float32.
_NO_BFLOAT16 = (
    "the first tensor cores multiply float16 alone, which is unsafe for training without scaling the loss; "
    "bfloat16 is emulated there"
)
_NO_TRITON = "Triton supports compute capability 8.0 and later; before, its products run without tensor cores"
_FLOAT8_SINCE = (8, 9)  # Ada
_SKIPS_TILES = "flex leaves out whole tiles beyond a window"

_since_ampere = partial(
    Support,
    precision=torch.bfloat16,
    precision_reason="its tensor cores multiply bfloat16",
    compiles=True,
    compile_reason="torch.compile writes Triton kernels for it",
    triton=True,
    triton_reason="Triton supports compute capability 8.0 and later",
)
_only_float32 = partial(Support, precision=torch.float32, full=("sdpa",), windowed=("sdpa",), triton=False)

_CUDA = (  # newest first: the first row whose `since` a device reaches is its row
    _since_ampere(
        device="Blackwell workstation GPUs (RTX 50 series, RTX PRO)",
        since=(12, 0),
        full=("sdpa", "cudnn", "flex"),
        windowed=("flex", "sdpa"),
        attention_reason=f"FlashAttention 3 and 4 are not for it; {_SKIPS_TILES}",
    ),
    _since_ampere(
        device="Blackwell data-center GPUs (B200, GB200)",
        since=(10, 0),
        full=("flash4", "cudnn", "sdpa", "flex"),
        windowed=("flash4", "flex", "sdpa"),
        attention_reason="flash4 is written for it; cuDNN comes next for full attention, flex for windows",
    ),
    _since_ampere(
        device="Hopper GPUs (H100, H200)",
        since=(9, 0),
        full=("flash4", "flash3", "cudnn", "sdpa", "flex"),
        windowed=("flash4", "flash3", "flex", "sdpa"),
        attention_reason="flash4 and flash3 are written for it and skip what a window hides; cuDNN comes next for full "
        "attention, flex for windows",
    ),
    _since_ampere(
        device="Ampere and Ada workstation GPUs (RTX 30 and 40 series, A40, L4, L40)",
        since=(8, 6),
        full=("sdpa", "cudnn", "flex"),
        windowed=("flex", "sdpa"),
        attention_reason=f"sdpa runs FlashAttention 2 there; {_SKIPS_TILES}",
    ),
    _since_ampere(
        device="Ampere data-center GPUs (A100, A30)",
        since=(8, 0),
        precision_reason="the first tensor cores that multiply bfloat16",
        full=("sdpa", "cudnn", "flex"),
        windowed=("flex", "sdpa"),
        attention_reason=f"sdpa runs FlashAttention 2 there; {_SKIPS_TILES}",
    ),
    _only_float32(
        device="Volta and Turing GPUs (V100, T4, RTX 20 series)",
        since=(7, 0),
        precision_reason=_NO_BFLOAT16,
        attention_reason="sdpa has a memory-efficient kernel for float32; flash and flex kernels need Ampere",
        compiles=True,
        compile_reason="torch.compile supports compute capability 7.0 and later",
        triton_reason=_NO_TRITON,
    ),
    _only_float32(
        device="GPUs before Volta",
        since=(0, 0),
        precision_reason="there are no tensor cores, and bfloat16 is emulated",
        attention_reason="sdpa has a memory-efficient kernel for float32; flash and flex kernels need Ampere",
        compiles=False,
        compile_reason="torch.compile supports compute capability 7.0 and later",
        triton_reason=_NO_TRITON,
    ),
)
_OTHERS = {
    "mps": _only_float32(
        device="Apple GPUs (MPS)",
        since=None,
        precision_reason="float16 is unsafe for training without scaling the loss, and bfloat16 is emulated on M1 and "
        "M2 and missing before macOS 14",
        attention_reason="the other backends need CUDA",
        compiles=False,
        compile_reason="torch's compiler for MPS is a prototype",
        triton_reason="Triton has no backend for MPS",
    ),
    "cpu": _only_float32(
        device="CPUs",
        since=None,
        precision_reason="products in bfloat16 were measured 200 times slower on a CPU without instructions for it",
        attention_reason="the other backends need CUDA",
        compiles=True,
        compile_reason="torch.compile writes C++ for it",
        triton_reason="Triton compiles for GPUs; on a CPU its interpreter is for tests",
    ),
}


def support(device_type: str, capability: Capability | None = None) -> Support:
    """The row of a device: `device_type` as torch names it ("cuda", "mps", "cpu") and, for CUDA, its capability."""
    if device_type == "cuda":
        assert capability is not None, "a CUDA device has a compute capability"
        return next(row for row in _CUDA if row.since is not None and capability >= row.since)
    return _OTHERS[device_type]


def capability_of(device: torch.device) -> Capability | None:
    """The compute capability of a CUDA device that is there, None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def rows() -> tuple[Support, ...]:
    """The whole table, newest CUDA devices first."""
    return (*_CUDA, *_OTHERS.values())


def why_no_compile(device_type: str, capability: Capability | None = None) -> str | None:
    """Why torch.compile is not used on this device by itself, in a sentence; None when it is (given a C++ compiler)."""
    row = support(device_type, capability)
    if not row.compiles:
        return row.compile_reason
    if device_type == "cuda" and not triton_installed():
        return "torch.compile needs Triton for CUDA devices, which is not installed"
    return None


def why_no_triton(device_type: str, capability: Capability | None = None) -> str | None:
    """Why our Triton kernels cannot be used on this device, in a sentence; None when they can."""
    row = support(device_type, capability)
    if not row.triton:
        return row.triton_reason
    return None if triton_installed() else "Triton is not installed: it comes with torch's CUDA builds on Linux"


def why_no_float8(device_type: str, capability: Capability | None = None) -> str | None:
    """Why products cannot be in float8 on this device, in a sentence; None when they can.

    CPUs have no such products, but the formats, so that a run can round to them.
    """
    if device_type == "mps":
        return "Apple GPUs have no float8 formats"
    if capability is not None and capability < _FLOAT8_SINCE:
        return "float8 products need compute capability {}.{}, this device has {}.{}".format(
            *_FLOAT8_SINCE, *capability
        )
    return None


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64 what lies on `device`: there, but on the CPU for Apple's GPUs, which have none."""
    return torch.device("cpu") if device.type == "mps" else device


def triton_installed() -> bool:
    """Whether Triton can be imported; it is not imported here."""
    return importlib.util.find_spec("triton") is not None
