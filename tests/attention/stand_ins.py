"""Stand-ins for the FlashAttention libraries, in plain torch.

What they are given counts, so that a wrong argument gives wrong numbers. Their parameters have the names and the order
of the real ones, as far as a caller can tell them apart.
"""

from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """data_ptr of the tensors that a kernel got, and the strides of the first."""

    pointers: tuple[int, ...]
    strides: tuple[int, ...]


CALLS: list[Call] = []


def visible(q: Tensor, k: Tensor, causal: bool, left: int | None, right: int | None) -> Tensor:
    """(Tq, Tk): keys from `left` before the query to `right` after it; None is no limit. Last query, last key."""
    right = 0 if causal else right
    distance = torch.arange(k.shape[1]) - torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return seen


def logits(q: Tensor, k: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """(B, H, Tq, Tk) float64."""
    k = k.double().repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, float("-inf"))


def record(*tensors: Tensor) -> None:
    """Refuse what a kernel could not take."""
    for x in tensors:
        rows = x.is_contiguous() or all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
        assert x.stride(-1) == 1 and rows and x.data_ptr() % 16 == 0, f"strides {x.stride()}"
    CALLS.append(Call(tuple(x.data_ptr() for x in tensors), tensors[0].stride()))


def run_forward(q, k, v, causal, left, right, scale=None, starts=(None, None)) -> tuple[Tensor, Tensor]:
    """starts: the first query and the first key of each of several sequences that lie behind each other."""
    if starts[0] is not None:
        return each_sequence(q, k, v, causal, left, right, scale, *starts)
    record(q, k, v)
    scores = logits(q, k, visible(q, k, causal, left, right), scale)
    lse = torch.logsumexp(scores, dim=-1)
    values = v.double().repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    out = torch.einsum("bhqk,bkhd->bqhd", torch.exp(scores - lse[..., None]), values)
    return out.to(q.dtype).contiguous(), lse.float()


def each_sequence(q, k, v, causal, left, right, scale, starts_q, starts_k) -> tuple[Tensor, Tensor]:
    """(N, H, D) and (H, N) of sequences that begin at `starts_q` and `starts_k`, int32 (S + 1,); some are empty."""
    check_starts(q, k, starts_q, starts_k)
    out, lse = q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    for (first, end), (first_k, end_k) in zip(spans(starts_q), spans(starts_k), strict=True):
        if end > first:
            parts = (x[None, a:b] for x, a, b in ((q, first, end), (k, first_k, end_k), (v, first_k, end_k)))
            found, own_lse = run_forward(*(x.clone() for x in parts), causal, left, right, scale)
            out[first:end], lse[:, first:end] = found[0], own_lse[0]
    return out, lse


def each_sequence_backward(q, k, v, out, grad, lse, dq, dk, dv, causal, left, right, scale, starts_q, starts_k) -> None:
    check_starts(q, k, starts_q, starts_k)
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[1], q.shape[0])
    for x in (dq, dk, dv):
        x.zero_()
    for (first, end), (first_k, end_k) in zip(spans(starts_q), spans(starts_k), strict=True):
        if end > first:
            own, keys = slice(first, end), slice(first_k, end_k)
            tensors = (q[own], k[keys], v[keys], out[own], grad[own], lse[:, own], dq[own], dk[keys], dv[keys])
            copies = [x[None].clone() for x in tensors]
            run_backward(*copies, causal, left, right, scale)
            for place, found in zip(tensors[6:], copies[6:], strict=True):
                place.copy_(found[0])


def check_starts(q, k, starts_q, starts_k) -> None:
    for starts, x in ((starts_q, q), (starts_k, k)):
        assert starts.dtype == torch.int32 and starts.is_contiguous() and starts[0] == 0 and starts[-1] == len(x)
        assert bool((starts.diff() >= 0).all())
    assert starts_q.shape == starts_k.shape


def spans(starts: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(starts.tolist()))


def run_backward(
    q, k, v, out, grad, lse, dq, dk, dv, causal, left, right, scale=None, starts=(None, None)
) -> None:  # fmt: skip
    """The gradient as the kernels compute it: from the stored output and denominators, not from autograd."""
    if starts[0] is not None:
        each_sequence_backward(q, k, v, out, grad, lse, dq, dk, dv, causal, left, right, scale, *starts)
        return
    record(q, k, v, out, grad, dq, dk, dv)
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    groups = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = logits(q, k, visible(q, k, causal, left, right), scale)
    weights = torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))
    assert torch.allclose(torch.logsumexp(scores, -1).float(), lse, rtol=1e-3, atol=1e-3), "lse of other inputs"
    keys, values = (x.double().repeat_interleave(groups, dim=2) for x in (k, v))
    grad = grad.double()
    own = (grad * out.double()).sum(-1).transpose(1, 2)[..., None]
    dscores = weights * (torch.einsum("bqhd,bkhd->bhqk", grad, values) - own) * scale
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", dscores, keys))
    dk.copy_(torch.einsum("bhqk,bqhd->bkhd", dscores, q.double()).unflatten(2, (-1, groups)).sum(3))
    dv.copy_(torch.einsum("bhqk,bqhd->bkhd", weights, grad).unflatten(2, (-1, groups)).sum(3))


def flash_attn_4() -> dict[str, ModuleType]:
    """The modules of flash-attn-4."""
    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    interface = ModuleType("flash_attn.cute.interface")

    def forward(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        starts = cu_seqlens_q, cu_seqlens_k
        found = run_forward(q, k, v, causal, window_size_left, window_size_right, softmax_scale, starts)
        return *(found if return_lse else (found[0], None)), None, None, None

    def backward(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        dq, dk, dv = (torch.empty_like(x) if d is None else d for x, d in ((q, dq), (k, dk), (v, dv)))
        band = causal, window_size_left, window_size_right
        run_backward(q, k, v, out, dout, lse, dq, dk, dv, *band, softmax_scale, (cu_seqlens_q, cu_seqlens_k))
        return dq, dk, dv

    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward
    return {"flash_attn": package, "flash_attn.cute": cute, "flash_attn.cute.interface": interface}


def open_end(size: int) -> int | None:
    """FlashAttention 3 says -1 for no limit."""
    return None if size < 0 else size


def flash_attn_3(release: str) -> dict[str, ModuleType]:
    """The module of FlashAttention 3: "beta" (2024), "tuple" (windows as pairs) or "operators" (2025)."""
    module = ModuleType("flash_attn_interface")
    if release == "beta":

        def forward(q, k, v, softmax_scale, causal, window_size, descale_q=None, descale_k=None, gqa_parallel=False):
            raise AssertionError("its results are in another order")

        def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1)):
            raise AssertionError("its results are in another order")

    elif release == "tuple":

        def forward(
            q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, max_seqlen_q,
            max_seqlen_k, page_table, q_descale, softmax_scale, causal,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, sm_margin=0,
        ):  # fmt: skip
            assert all(x is None for x in (k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, page_table, q_descale))
            starts, band = (cu_seqlens_q, cu_seqlens_k), map(open_end, window_size)
            return *run_forward(q, k, v, causal, *band, softmax_scale, starts), None, None

        def backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q,
            max_seqlen_k, dq, dk, dv, softmax_scale, causal,
            window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
        ):  # fmt: skip
            assert sequed_q is sequed_k is None
            band = causal, *map(open_end, window_size)
            starts = cu_seqlens_q, cu_seqlens_k
            run_backward(q, k, v, out, dout, softmax_lse, dq, dk, dv, *band, softmax_scale, starts)
            return dq, dk, dv, softmax_lse

    else:

        @torch.library.custom_op("stand_in::forward", mutates_args=())
        def forward(
            q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
            cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
            softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1,
            window_size_right: int = -1, num_splits: int = 1,
        ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
            band = causal, open_end(window_size_left), open_end(window_size_right)
            return *run_forward(q, k, v, *band, softmax_scale, (cu_seqlens_q, cu_seqlens_k)), torch.empty(0)

        @torch.library.custom_op("stand_in::backward", mutates_args=("dq", "dk", "dv"))
        def backward(
            dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
            cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
            max_seqlen_k: int | None = None, dq: Tensor | None = None, dk: Tensor | None = None,
            dv: Tensor | None = None, softmax_scale: float | None = None, is_causal: bool = False,
            window_size_left: int = -1, window_size_right: int = -1,
        ) -> Tensor:  # fmt: skip
            band = is_causal, open_end(window_size_left), open_end(window_size_right)
            starts = cu_seqlens_q, cu_seqlens_k
            run_backward(q, k, v, out, dout, softmax_lse, dq, dk, dv, *band, softmax_scale, starts)
            return torch.empty(0)

    module._flash_attn_forward, module._flash_attn_backward = forward, backward
    return {"flash_attn_interface": module}
