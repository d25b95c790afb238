"""Products with finished results through quack's kernels: at the speed of the vendor's plain products on Hopper GPUs.

Each epilogue is an ordinary function of one element, which quack compiles into its warp-specialized product; the
compiled kernels are kept on disk. Comes with the extra `flash4`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from quack import activation
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import ColVecLoad, ColVecReduce, RowVecLoad, RowVecReduce, TileLoad
from quack.gemm_config import GemmConfig
from torch import Tensor

from epigram.kernels.products.base import Dims

_ALIGNMENT = 64  # of every width: whole tiles of the depth

# Measured on an H100 at 73,728 tokens; two tiles in turn, so that one is finished while the other is multiplied.
_NARROW = GemmConfig(tile_m=128, tile_n=128, pingpong=True, is_dynamic_persistent=False, cluster_m=2)
_WIDE = GemmConfig(tile_m=128, tile_n=192, pingpong=True, is_dynamic_persistent=False, cluster_m=2)


def check(device_type: str, capability: tuple[int, int] | None, dims: Dims) -> str | None:
    """Hopper GPUs, bfloat16 or float16, widths that are multiples of 64."""
    if device_type != "cuda" or capability is None or capability[0] != 9:
        return "quack's products are used on Hopper GPUs"
    if dims.dtype not in (torch.bfloat16, torch.float16):
        return f"quack's products are for bfloat16 and float16, not {dims.dtype}"
    if odd := [width for width in dims.widths if width % _ALIGNMENT]:
        return f"quack's products need widths that are multiples of {_ALIGNMENT}, not {odd[0]}"
    return None


def _parts_of(kind: Any, name: str) -> dict[str, Any]:
    """An epilogue's sums of products of two values, left in parts: `kind` says over columns or over rows."""
    reduce = kind(name, scaled=True)
    reduce.host_finalize = None  # what reads them adds the parts up
    return {name: reduce}


@gemm_epilogue(ops={"rstd": ColVecLoad("rstd")})
def _scaled(acc: Any, rstd: Any) -> dict[str, Any]:
    return {"D": acc * rstd}


@gemm_epilogue()
def _added(acc: Any, c: Any) -> dict[str, Any]:
    return {"D": acc + c}


@gemm_epilogue(reduces=_parts_of(ColVecReduce, "squares"))
def _added_squares(acc: Any, c: Any) -> dict[str, Any]:
    x = acc + c
    return {"D": x, "squares": (x, x)}


_MIXING = {"own": RowVecLoad("own"), "first": RowVecLoad("first"), "y": TileLoad("y")}
_SKIPPING = {**_MIXING, "skip": RowVecLoad("skip"), "z": TileLoad("z")}


@gemm_epilogue(ops=_MIXING, reduces=_parts_of(ColVecReduce, "squares"))
def _mixed(acc: Any, c: Any, own: Any, y: Any, first: Any) -> dict[str, Any]:
    entering = (acc + c) * own + y * first
    return {"D": entering, "squares": (entering, entering)}


@gemm_epilogue(outputs=("x",), ops=_MIXING, reduces=_parts_of(ColVecReduce, "squares"))
def _mixed_kept(acc: Any, c: Any, own: Any, y: Any, first: Any) -> dict[str, Any]:
    x = acc + c
    entering = x * own + y * first
    return {"D": entering, "x": x, "squares": (entering, entering)}


@gemm_epilogue(ops=_SKIPPING, reduces=_parts_of(ColVecReduce, "squares"))
def _mixed_skip(acc: Any, c: Any, own: Any, y: Any, first: Any, z: Any, skip: Any) -> dict[str, Any]:
    entering = (acc + c) * own + y * first + z * skip
    return {"D": entering, "squares": (entering, entering)}


@gemm_epilogue(outputs=("x",), ops=_SKIPPING, reduces=_parts_of(ColVecReduce, "squares"))
def _mixed_skip_kept(acc: Any, c: Any, own: Any, y: Any, first: Any, z: Any, skip: Any) -> dict[str, Any]:
    x = acc + c
    entering = x * own + y * first + z * skip
    return {"D": entering, "x": x, "squares": (entering, entering)}


_MIXED = {
    (False, False): _mixed,
    (False, True): _mixed_kept,
    (True, False): _mixed_skip,
    (True, True): _mixed_skip_kept,
}


@gemm_epilogue(
    ops={"correction": ColVecLoad("correction"), "y": TileLoad("y"), "own": RowVecLoad("own")},
    reduces=_parts_of(RowVecReduce, "sums"),
)
def _back_own(acc: Any, c: Any, y: Any, correction: Any, own: Any) -> dict[str, Any]:
    return {"D": acc + c * own + y * correction, "sums": (c, y)}


@gemm_epilogue(ops={"correction": ColVecLoad("correction"), "y": TileLoad("y")})
def _back(acc: Any, c: Any, y: Any, correction: Any) -> dict[str, Any]:
    return {"D": acc + c + y * correction}


@functools.cache
def _up_epilogue(slope: float) -> Any:
    @gemm_epilogue(outputs=("hidden",), ops={"rstd": ColVecLoad("rstd")})
    def up_epilogue(acc: Any, rstd: Any) -> dict[str, Any]:
        p = acc * rstd
        bent = p * slope + activation.relu(p) * (1.0 - slope)
        return {"D": p, "hidden": bent * bent}

    return up_epilogue


@functools.cache
def _hidden_epilogue(slope: float) -> Any:
    @gemm_epilogue(ops={"rstd": ColVecLoad("rstd")})
    def hidden_epilogue(acc: Any, rstd: Any) -> dict[str, Any]:
        p = acc * rstd
        bent = p * slope + activation.relu(p) * (1.0 - slope)
        return {"D": bent * bent}

    return hidden_epilogue


@functools.cache
def _down_back_epilogue(slope: float) -> Any:
    below = 2.0 * slope * slope

    @gemm_epilogue(ops={"rstd": ColVecLoad("rstd")}, reduces=_parts_of(ColVecReduce, "sums"))
    def down_back_epilogue(acc: Any, c: Any, rstd: Any) -> dict[str, Any]:
        g = acc * (activation.relu(c) * (2.0 - below) + c * below)
        return {"D": g * rstd, "sums": (g, c)}

    return down_back_epilogue


def scaled(a: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """See the folder's base."""
    result: Tensor = _scaled(a, weight.T, config=_NARROW, tuned=False, rstd=rstd[None])["D"]
    return result


def added(a: Tensor, weight: Tensor, c: Tensor, squares: bool) -> tuple[Tensor, Tensor | None]:
    """See the folder's base."""
    epilogue = _added_squares if squares else _added
    found = epilogue(a, weight.T, c, config=_NARROW, tuned=False)
    return found["D"], _parts(found["squares"]) if squares else None


def up(a: Tensor, weight: Tensor, rstd: Tensor, slope: float, keep: bool) -> tuple[Tensor | None, Tensor]:
    """See the folder's base."""
    if keep:
        found = _up_epilogue(slope)(a, weight.T, config=_WIDE, tuned=False, rstd=rstd[None])
        return found["D"], found["hidden"]
    return None, _hidden_epilogue(slope)(a, weight.T, config=_WIDE, tuned=False, rstd=rstd[None])["D"]


def down_back(grad: Tensor, weight: Tensor, p: Tensor, rstd: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """See the folder's base."""
    found = _down_back_epilogue(slope)(grad, weight, p, config=_WIDE, tuned=False, rstd=rstd[None])
    return found["D"], _parts(found["sums"])


def back(
    a: Tensor, weight: Tensor, c: Tensor, y: Tensor, correction: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """See the folder's base."""
    arguments = {"config": _NARROW, "tuned": False, "y": y, "correction": correction[None]}
    if own is None:
        return _back(a, weight, c, **arguments)["D"], None
    found = _back_own(a, weight, c, own=own[None], **arguments)
    return found["D"], found["sums"].reshape(-1, c.shape[1]).sum(0)


def mixed(
    a: Tensor, weight: Tensor, c: Tensor, own: Tensor, streams: Sequence[tuple[Tensor, Tensor]], keep: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See the folder's base."""
    operands = {"own": own[None], "first": streams[0][0][None], "y": streams[0][1]}
    if len(streams) > 1:
        operands |= {"skip": streams[1][0][None], "z": streams[1][1]}
    found = _MIXED[len(streams) > 1, keep](a, weight.T, c, config=_NARROW, tuned=False, **operands)
    return found["D"], found["x"] if keep else None, _parts(found["squares"])


def _parts(partials: Tensor) -> Tensor:
    """(N, parts) of partial sums that come with a leading batch of one."""
    return partials.reshape(-1, partials.shape[-1])
