"""Attention through `torch.nn.attention.flex_attention`: whole tiles outside the window are never touched (CUDA).

The tile map of a causal band has a closed form, so it is built from a few small tensors inside the compiled graph
instead of by evaluating the mask at every pair of positions. Documents keep it closed: the first key that a query may
see never moves back from one query to the next, so a row of tiles is decided by its first and its last query.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from epigram.attention.base import Request, with_documents
from epigram.compiling import compile_shapes

_TILE = 128
_LISTS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip
"""A BlockMask's lists of tiles: of each row of queries, then of each column of keys; first those with a mask."""


def check(request: Request) -> str | None:
    """CUDA from compute capability 8.0 on, where it can be compiled: else it would write out the matrix of logits."""
    if request.device_type != "cuda":
        return "flex attention is for CUDA devices; sdpa is right here"
    if request.capability is not None and request.capability < (8, 0):
        return f"flex attention needs compute capability 8.0, this device has {request.capability}"
    if not (request.compiled or request.compiles):
        return "flex attention is fast only where it is compiled, for each shape; sdpa is right here"
    if request.head_dim < 16 or request.head_dim & (request.head_dim - 1):
        return f"flex attention needs a head size that is a power of two of at least 16, not {request.head_dim}"
    return None


@with_documents
def attend(q: Tensor, k: Tensor, v: Tensor, window: int, reach: Tensor | None) -> Tensor:
    """See `epigram.attention.base`. On CUDA it is compiled by itself where the model around it is not."""
    by_itself = q.device.type == "cuda" and not torch.compiler.is_compiling()
    return (_compiled() if by_itself else _attend)(q, k, v, window, reach)


attend.compiles_itself = True  # type: ignore[attr-defined]


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]:
    compiled: Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor] = compile_shapes(_attend)
    return compiled


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int, reach: Tensor | None) -> Tensor:
    mask = block_mask(q.shape[1], k.shape[1], window, q.device, reach)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def block_mask(
    num_queries: int, num_keys: int, window: int, device: torch.device, reach: Tensor | None = None
) -> BlockMask:
    """The tiles of a causal band of `window` (0: the whole prefix): which are computed, and which need no mask.

    With `reach` (B, T), see `epigram.attention.base`, each sequence has tiles of its own.
    """
    offset = num_keys - num_queries
    reach = None if reach is None else reach[:, -num_queries:]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + offset
        inside = key <= position
        inside = inside & (key >= position - window) if window else inside
        return inside if reach is None else inside & (key >= position - reach[batch, query])

    rows = torch.arange(-(-num_queries // _TILE), device=device)[:, None]
    columns = torch.arange(-(-num_keys // _TILE), device=device)[None, :]
    first = rows * _TILE + offset  # first and last position of the row of tiles
    last = (first + _TILE - 1).clamp(max=num_keys - 1)
    left, right = columns * _TILE, columns * _TILE + _TILE - 1
    touched = left <= last
    full = right <= first
    if window:
        touched = touched & (right >= first - window)
        full = full & (left >= last - window)
    if reach is not None:
        first_reach = reach[:, None, ::_TILE, None]  # of the first query of each row of tiles, (B, 1, rows, 1)
        last_reach = reach.index_select(1, (last[:, 0] - offset))[:, None, :, None]
        touched = touched & (right >= first - first_reach)
        full = full & (left >= last - last_reach)
    maps = [tiles if tiles.dim() == 4 else tiles[None, None] for tiles in (touched & ~full, full)]
    lists = [part for tiles in (*maps, *(tiles.mT for tiles in maps)) for part in _ordered(tiles)]
    return BlockMask(
        seq_lengths=(num_queries, num_keys),
        **dict(zip(_LISTS, laid_out(lists), strict=True)),
        BLOCK_SIZE=(_TILE, _TILE),
        mask_mod=visible,
    )


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Number of chosen tiles in each row, and their columns first: (B, 1, rows) and (B, 1, rows, columns) int32.

    tiles: (B, 1, rows, columns).
    """
    count = tiles.sum(-1, dtype=torch.int32)
    order = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return count, order


@torch.library.custom_op("epigram::laid_out", mutates_args=())
def laid_out(tensors: list[Tensor]) -> list[Tensor]:
    """Copies, every stride of them the product of the sizes behind it.

    The kernels step along a list by one, whatever its stride is, and from one sequence to the next by the stride of the
    heads' axis. The compiler may order what it computes as it likes, and choose anything for an axis with one entry:
    lists would be read across, all sequences would get the first one's tiles, or any memory's contents. It chooses
    nothing for what an operator returns.
    """
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


@laid_out.register_fake
def _(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in tensors]
