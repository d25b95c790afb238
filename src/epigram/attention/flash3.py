"""Attention through FlashAttention 3: kernels for Hopper GPUs, which users build from source.

There is no package of it on PyPI. It is built in the folder `hopper` of the flash-attention repository, which installs
the module `flash_attn_interface`. Its inner functions were renamed and reordered between releases, so they are called
by the names of their parameters, and `check` says what an installed release lacks.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from epigram.attention._flash import LENGTHS, Lengths, register
from epigram.attention.base import Request, why_not_heads
from epigram.errors import UserError

try:
    import flash_attn_interface
except ModuleNotFoundError as error:
    raise UserError(
        f"'flash3' needs FlashAttention 3 (there is no module {error.name}): build it from source, "
        "in the folder hopper of github.com/Dao-AILab/flash-attention"
    ) from error
try:
    from flash_attn_config import CONFIG  # what this build was made without
except ImportError:  # earlier releases do not say
    CONFIG = {}

_MOST_HEAD_DIM = 256
_FORWARD = ("q", "k", "v", "softmax_scale", "causal", "num_splits")
_BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "softmax_scale")


def check(request: Request) -> str | None:
    """CUDA of compute capability 9, half precision, head sizes that are multiples of 8 up to 256."""
    if request.device_type != "cuda" or request.capability is None:
        return "flash3 is for CUDA devices"
    if request.capability[0] != 9:
        major, minor = request.capability
        return f"flash3 is for Hopper GPUs, this one has compute capability {major}.{minor}"
    return why_not_heads("flash3", request, _MOST_HEAD_DIM) or _why_old(request.documents) or _left_out(request)


def _why_old(documents: bool) -> str | None:
    """What the installed module lacks of the interface that is used here."""
    more = LENGTHS if documents else ()
    for name, needed in (("_flash_attn_forward", _FORWARD + more), ("_flash_attn_backward", _BACKWARD + more)):
        function = getattr(flash_attn_interface, name, None)
        there = _parameters(function) if function is not None else {}
        missing = [parameter for parameter in needed if parameter not in there]
        if function is not None and not {"window_size", "window_size_left"} & there.keys():
            missing.append("window_size")
        if function is None or missing:
            lack = f"no {name}" if function is None else f"a {name} without {', '.join(missing)}"
            return f"the installed flash_attn_interface has {lack}: build release 3.0 or later of FlashAttention 3"
    return None


def _left_out(request: Request) -> str | None:
    """What this build was made without and the request needs."""
    flags = CONFIG.get("build_flags", {})
    needs = {
        "FLASHATTENTION_DISABLE_BACKWARD": ("gradients", request.backward),
        "FLASHATTENTION_DISABLE_LOCAL": ("windows", request.window > 0),
        "FLASHATTENTION_DISABLE_FP16": ("float16", request.dtype == torch.float16),
        "FLASHATTENTION_DISABLE_VARLEN": ("sequences of different lengths", request.documents),
    }
    missing = [what for flag, (what, needed) in needs.items() if needed and flags.get(flag)]
    return f"the installed FlashAttention 3 was built without {' and '.join(missing)}" if missing else None


def _parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Names of the parameters, each with whether it must be given."""
    # Later releases make a custom operator of the function, whose own signature is (*args, **kwargs).
    found = inspect.signature(getattr(function, "_init_fn", function)).parameters
    return {name: parameter.default is inspect.Parameter.empty for name, parameter in found.items()}


def _arguments(function: Callable[..., Any], window: int, **values: Any) -> dict[str, Any]:
    """Arguments of `function`: `values`, causal with `window`, and None for what else must be given."""
    there = _parameters(function)
    band = (window, 0) if window else (-1, -1)  # -1: all keys
    values["is_causal" if "is_causal" in there else "causal"] = True
    if "window_size" in there:
        values["window_size"] = band
    else:
        values["window_size_left"], values["window_size_right"] = band
    return {name: None for name, needed in there.items() if needed} | values


def _forward(q: Tensor, k: Tensor, v: Tensor, window: int, lengths: Lengths) -> tuple[Tensor, Tensor]:
    function = flash_attn_interface._flash_attn_forward
    arguments = _arguments(function, window, q=q, k=k, v=v, softmax_scale=q.shape[-1] ** -0.5, **lengths)
    out, lse, *_ = function(**arguments)
    return out, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, window: int,
    dq: Tensor, dk: Tensor, dv: Tensor, lengths: Lengths,
) -> None:  # fmt: skip
    function = flash_attn_interface._flash_attn_backward
    tensors = dict(dout=grad, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv)
    function(**_arguments(function, window, softmax_scale=q.shape[-1] ** -0.5, **tensors, **lengths))


attend = register("flash3", _forward, _backward)
