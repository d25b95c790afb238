"""What every attention backend offers, and how one is chosen.

A backend is one file in this folder with two functions:

    check(request) -> str | None    why it cannot serve the request, in a sentence; None when it can
    attend(q, k, v, window) -> out  causal attention

Legend: B sequences, Tq queries, Tk >= Tq keys (the queries are the last Tq positions of the keys), H query heads, K
key/value heads, D head size. q is (B, Tq, H, D), k and v are (B, Tk, K, D), out is (B, Tq, H, D); query head h reads
key/value head h // (H // K); logits are scaled by D ** -0.5. `window` = w > 0 lets position t see keys t-w..t, which
are w + 1 keys (the convention of the FlashAttention family); 0 means the whole prefix.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from epigram import plugin
from epigram.errors import UserError

PACKAGE = "epigram.attention"
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a layer needs.

    capability: the CUDA compute capability (major, minor), None elsewhere. compiled: called inside a compiled graph.
    """

    device_type: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int
    window: int
    compiled: bool = False


def expand_heads(k: Tensor, num_heads: int) -> Tensor:
    """Repeat key/value heads for grouped attention: (B, T, K, D) -> (B, T, H, D)."""
    groups = num_heads // k.shape[2]
    return k if groups == 1 else k.repeat_interleave(groups, dim=2)


def band_mask(num_queries: int, num_keys: int, window: int, device: torch.device | str) -> Tensor:
    """(Tq, Tk) bool, True where the query may see the key."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    visible = key <= query
    return visible & (key >= query - window) if window else visible


def usable(request: Request) -> dict[str, str | None]:
    """Every backend of the folder with the reason why it cannot serve `request` (None: it can)."""
    reasons: dict[str, str | None] = {}
    for name in plugin.names(PACKAGE):
        try:
            reasons[name] = plugin.load(PACKAGE, name).check(request)
        except UserError as error:  # its library is not installed
            reasons[name] = str(error)
    return reasons


def choose(name: str, request: Request) -> tuple[str, Attend]:
    """The backend called `name`, or for "auto" the preferred one among those that can serve `request`.

    Raises UserError when the named backend cannot honour the request: nothing falls back silently.
    """
    if name == "auto":
        name = _preferred(request)
    module = plugin.load(PACKAGE, name)
    if reason := module.check(request):
        raise UserError(f"attention = {name!r} cannot be used here: {reason}")
    return name, module.attend


def _preferred(request: Request) -> str:
    """flash4 wherever it runs; else on CUDA flex for windows, since it skips whole tiles; else sdpa."""
    windowed_on_cuda = request.device_type == "cuda" and request.window > 0
    order = ("flash4", "flex", "sdpa", "reference") if windowed_on_cuda else ("flash4", "sdpa", "reference")
    reasons = usable(request)
    for name in order:
        if reasons.get(name) is None:
            return name
    raise UserError(
        "no attention backend can serve this model here: " + "; ".join(f"{n}: {r}" for n, r in reasons.items())
    )
