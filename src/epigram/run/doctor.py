"""What this machine has, which paths a run would take on it, and what to do about what is missing.

Every check answers with findings and changes nothing; the probe of the temp folder removes its file.
"""

import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from epigram import plugin
from epigram.errors import UserError
from epigram.run import machine

if TYPE_CHECKING:
    import torch

    from epigram.attention.base import Request
    from epigram.capability import Support

_GIB, _GB = 1 << 30, 10**9
_LEAST_DISK_BYTES = 5 * _GB  # checkpoints of a run of pr1212 take about 0.5 GB each
_LEAST_MEMORY_BYTES = 4 * _GB

# Optional libraries: module, what it is for, how to install it.
_OPTIONAL = (
    ("flash_attn.cute", "attention kernels for Hopper and Blackwell GPUs", "pip install 'epigram[flash4]'"),
    (
        "flash_attn_interface",
        "FlashAttention 3 on Hopper GPUs",
        "build it from source, in the folder hopper of github.com/Dao-AILab/flash-attention",
    ),
    ("triton", "fused kernels and compilation on GPUs", "comes with torch's CUDA builds on Linux"),
    ("pyarrow", ".parquet files as a source of text", "pip install 'epigram[parquet]'"),
    ("tensorboard", "the metrics writer tensorboard", "pip install 'epigram[tensorboard]'"),
    ("wandb", "the metrics writer wandb", "pip install 'epigram[wandb]'"),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the examination.

    status: "ok"; "note", where something is missing that a run can do without; "problem", where runs will
    fail. advice: what to do, empty when all is well.
    """

    part: str
    name: str
    value: str
    status: Literal["ok", "note", "problem"] = "ok"
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """For `epigram doctor --json`."""
        return asdict(self)


def examine(folder: Path | None = None) -> list[Finding]:
    """All findings about this machine; `folder` is where runs would be written (default: the current one)."""
    return [
        *_software(),
        *_hardware(),
        *_compiler(),
        *_storage(folder or Path.cwd()),
        *_optional(),
        *_paths(),
    ]


def _finding(
    part: str, name: str, value: str, advice: str = "", otherwise: Literal["note", "problem"] = "note"
) -> Finding:
    """All is well without an `advice`; with one the status is `otherwise`."""
    return Finding(part=part, name=name, value=value, status=otherwise if advice else "ok", advice=advice)


def _software() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    value = f"{platform.python_version()} on {platform.platform()}"
    yield _finding("software", "python", value, "install Python 3.11 or later" if old else "", "problem")
    versions = machine.versions()
    yield _finding("software", "epigram", versions.get("epigram", "not installed: run from its sources"))
    torch = versions.get("torch")
    yield _finding("software", "torch", torch or "not installed", "" if torch else "pip install torch", "problem")


def _hardware() -> Iterator[Finding]:
    cores, threads, memory = machine.cpu_count(), machine.thread_count(), machine.memory_bytes()
    yield _finding("machine", "processor", f"{machine.cpu_name()}, {cores} usable")
    setting = os.environ.get("OMP_NUM_THREADS")
    few = threads is not None and threads < cores // 2
    advice = f"torch uses {threads} of {cores} processors: unset OMP_NUM_THREADS to train on a CPU" if few else ""
    yield _finding(
        "machine",
        "threads",
        f"{threads or 'unknown'}" + (f" (OMP_NUM_THREADS={setting})" if setting else ""),
        advice,
    )
    small = memory is not None and memory < _LEAST_MEMORY_BYTES
    advice = "large recipes may not fit: use demo or smoke" if small else ""
    yield _finding("machine", "memory", f"{memory / _GIB:.1f} GiB" if memory else "unknown", advice)
    yield from _gpus()


def _gpus() -> Iterator[Finding]:
    found = machine.gpus()
    if not found:
        yield _finding("machine", "GPU", "none that torch can use", _gpu_advice())
        return
    from epigram.capability import support

    for index, gpu in enumerate(found):
        major, minor = gpu["capability"]
        memory = f"{gpu['memory_bytes'] / _GIB:.0f} GiB"
        slow = "bfloat16" not in str(support("cuda", (major, minor)).precision)
        old = "it computes in float32, not in bfloat16 on tensor cores as GPUs from Ampere on do" if slow else ""
        yield _finding("machine", f"GPU {index}", f"{gpu['name']}, capability {major}.{minor}, {memory}", old)


def _gpu_advice() -> str:
    """Tells a machine without a GPU from one whose torch cannot use it."""
    if machine.nvidia_driver() is None:
        return "recipes demo and smoke train on the CPU; the others need a CUDA GPU"
    return "there is an NVIDIA driver: install a build of torch for CUDA that fits it"


def _compiler() -> Iterator[Finding]:
    found, header = machine.cpp_compiler(), machine.python_header()
    advice = "" if found else "runs go without torch.compile, slower: install g++ (apt install g++)"
    yield _finding("compiler", "C++ compiler", found or "none", advice)
    advice = "" if header else "compiled GPU kernels need Python.h: install python3-dev"
    yield _finding("compiler", "Python headers", str(header or "none"), advice)


def _storage(folder: Path) -> Iterator[Finding]:
    temp = Path(tempfile.gettempdir())
    reason = why_not_executable(temp)
    advice = "compiled code is loaded from there: set TMPDIR to a folder on a disk mounted with exec" if reason else ""
    yield _finding("storage", "temp folder", f"{temp}: {reason or 'programs in it run'}", advice, "problem")
    place = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        advice = "choose a folder that you may write to, by --out"
        yield _finding("storage", "run folder", f"{place}: not writable", advice, "problem")
        return
    advice = "" if free >= _LEAST_DISK_BYTES else "data and checkpoints take some GB: free space, or use another disk"
    yield _finding("storage", "run folder", f"{place}, {free / _GB:.0f} GB free", advice)


def why_not_executable(folder: Path) -> str | None:
    """Why a program in `folder` cannot be run (a "noexec" mount, say), found by running one; None when it
    can.

    torch.compile loads its code from the temp folder and slows down or fails there without a word
    (parameter-golf #960).
    """
    if os.name != "posix":
        return None  # only POSIX systems mount folders without execution
    try:
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            program = Path(inside) / "probe"
            program.write_text("#!/bin/sh\nexit 0\n")
            program.chmod(stat.S_IRWXU)
            done = subprocess.run([program], capture_output=True, check=False, timeout=10)
    except PermissionError as error:
        return f"programs in it may not run ({error.strerror})"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else f"a program in it ended with code {done.returncode}"


def _optional() -> Iterator[Finding]:
    for module, purpose, install in _OPTIONAL:
        there = _importable(module)
        advice = "" if there else f"only for {purpose}: {install}"
        yield _finding("optional libraries", module, "installed" if there else "not installed", advice)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package around it is missing or broken
        return False


def _paths() -> Iterator[Finding]:
    """What a run would choose by itself on each kind of device, asked of the code that chooses, and why."""
    try:
        from epigram.dist.context import pick_device
    except ImportError as error:
        yield _finding("paths", "import", str(error), "the installation is incomplete: install again", "problem")
        return
    kinds = {(gpu["name"], tuple(gpu["capability"])) for gpu in machine.gpus()}
    if not kinds:
        device_type = pick_device().type
        yield from explain("paths", device_type, device_type, None)
    for name, capability in sorted(kinds):
        yield from explain("paths" if len(kinds) == 1 else f"paths on {name}", name, "cuda", capability)


def explain(part: str, name: str, device_type: str, capability: tuple[int, int] | None) -> Iterator[Finding]:
    """What a run chooses on the device `name` and why: precision, compilation, kernels and attention."""
    from epigram.capability import support, why_no_compile, why_no_float8, why_no_triton
    from epigram.run.choices import compiler_available

    row = support(device_type, capability)
    yield _finding(part, "device", f"{name}: one of the {row.device}" if capability else name)
    yield _finding(part, "precision", f"{str(row.precision).removeprefix('torch.')}: {row.precision_reason}")
    missing = None if compiler_available() else "there is no C++ compiler, or Python's headers are missing"
    why_not = why_no_compile(device_type, capability) or missing
    no_triton = why_no_triton(device_type, capability)
    where = "on" if no_triton else "on, for flex, and for models with plain kernels"
    yield _finding(part, "compile", f"off: {why_not}" if why_not else f"{where}: {row.compile_reason}")
    yield _finding(part, "Triton kernels", f"off: {no_triton}" if no_triton else f"on: {row.triton_reason}")
    no_float8 = why_no_float8(device_type, capability)
    on_cpu = ", rounded and multiplied in float32: slower than without" if device_type == "cpu" else ""
    yield _finding(part, "float8 products", f"off: {no_float8}" if no_float8 else f"off unless run.float8=true{on_cpu}")
    # As `choices` has it: a model of fused kernels is not compiled, though a backend in it may be.
    compiled, compiles = not why_not and bool(no_triton), not why_not
    for kind, window in (("full", 0), ("windowed", 512)):
        request = _request(device_type, capability, row.precision, window, compiled, compiles)
        yield from _attention(part, kind, row, request)


def _request(
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: "torch.dtype",
    window: int,
    compiled: bool,
    compiles: bool,
) -> "Request":
    """The layers of pr1212: 8 heads of 64 over 4."""
    from epigram.attention.base import Request

    return Request(
        device_type=device_type,
        capability=capability,
        dtype=dtype,
        head_dim=64,
        num_heads=8,
        num_kv_heads=4,
        window=window,
        compiled=compiled,
        compiles=compiles,
    )


def _attention(part: str, kind: str, row: "Support", request: "Request") -> Iterator[Finding]:
    """The backend that a run takes for layers of this kind, and of every other one why not."""
    from epigram.attention.base import ORACLE, PACKAGE, candidates, why_not

    try:
        names = candidates(request)
    except UserError as error:
        names = ()
        yield _finding(part, f"attention, {kind}", "none", str(error), "problem")
    measured = request.device_type == "cuda" and len(names) > 1
    if names:
        chosen = f"the fastest of {', '.join(names)}, measured when a run starts" if measured else names[0]
        yield _finding(part, f"attention, {kind}", f"{chosen}: {row.attention_reason}")
    for name in plugin.names(PACKAGE):
        if reason := why_not(name, request):
            yield _finding(part, f"{name}, {kind}", "not usable here", reason)
        elif name == ORACLE:
            yield _finding(part, f"{name}, {kind}", "usable, but slow: it is what the others are tested against")
        elif measured and name in names:
            yield _finding(part, f"{name}, {kind}", "usable: taken where it is the fastest")
        else:
            value = "used" if name == names[0] else f"usable, but {names[0]} comes first on this device"
            yield _finding(part, f"{name}, {kind}", value)
