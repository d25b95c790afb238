"""The oracle: causal attention written out, in float32 (or float64 for float64 inputs)."""

import torch
from torch import Tensor

from epigram.attention.base import Request, band_mask, expand_heads, with_documents


def check(request: Request) -> str | None:
    """Works everywhere; the full matrix of logits makes it slow and hungry."""
    return None


@with_documents
def attend(q: Tensor, k: Tensor, v: Tensor, window: int, reach: Tensor | None) -> Tensor:
    """See `epigram.attention.base`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (expand_heads(x, q.shape[2]).to(wide) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys) * q.shape[-1] ** -0.5
    visible = band_mask(q.shape[1], k.shape[1], window, q.device, reach)
    visible = visible if reach is None else visible[:, None]
    weights = torch.softmax(logits.masked_fill(~visible, float("-inf")), dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values).to(q.dtype)
