"""What every attention backend offers, and how one is chosen.

A backend is one file in this folder with two functions:

    check(request) -> str | None    why it cannot serve the request, in a sentence; None when it can
    attend(q, k, v, window) -> out  causal attention

Legend: B sequences, Tq queries, Tk >= Tq keys (the queries are the last Tq positions of the keys), H query heads, K
key/value heads, D head size. q is (B, Tq, H, D), k and v are (B, Tk, K, D), out is (B, Tq, H, D); query head h reads
key/value head h // (H // K); logits are scaled by D ** -0.5. `window` = w > 0 lets position t see keys t-w..t, which
are w + 1 keys (the convention of the FlashAttention family); 0 means the whole prefix. The inputs may be views into a
larger tensor. A backend whose backward pass is quicker with as many key/value heads as query heads sets
`attend.equal_heads = True`: kernels that write the heads anyway then write them repeated.

Within documents: `attend.within(reach)` is the same function for tokens whose documents are kept apart. `reach`
(B, T) int32 says how many positions before its own the document of each position goes back, so t sees keys t - reach..t
of those that the window leaves; the queries are its last Tq positions. It is a tensor, because it changes from batch to
batch where a shape may not. What layers share is made when `within` is called, or at the first of them. A backend that
cannot keep documents apart has no `within`.

A backend that is nothing without the compiler sets `attend.compiles_itself = True`. "auto" takes it in a model that is
not compiled only where the table prefers it to all others that can serve: compiling it for every shape, just to see
that it is no faster, would cost each start of a run many seconds.

"auto" takes the fastest of the backends that can serve the request, as `measure` finds them, and without one the first
in the order of `epigram.capability`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from epigram import plugin
from epigram.capability import Capability, rows, support
from epigram.errors import UserError

PACKAGE = "epigram.attention"
ORACLE = "reference"
"""The backend that "auto" never takes: it writes out the whole matrix of logits."""

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]

TOO_MANY_DOCUMENTS = (
    "documents are isolated and a batch has more of them than FlashAttention has room for (one a row, 64, and one for "
    "each 128 tokens)"
)
"""What else can be wrong where a loss is NaN; see `epigram.attention._flash`."""

HALF_PRECISIONS = (torch.bfloat16, torch.float16)
"""What the kernels for tensor cores are written for."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a layer needs.

    capability: the CUDA compute capability (major, minor), None elsewhere. compiled: called inside a compiled graph.
    compiles: outside of one a backend may compile itself, since it will be called with few shapes, and often with each.
    backward: gradients are needed, which is not so for scoring. longer_keys: many queries follow keys of before, as in
    a streaming score (a few queries of a generation every backend must serve). documents: they are kept apart.
    """

    device_type: str
    capability: Capability | None
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int
    window: int
    compiled: bool = False
    compiles: bool = False
    backward: bool = True
    longer_keys: bool = False
    documents: bool = False


Measure = Callable[[Mapping[str, Attend], Request], Mapping[str, float]]
"""Milliseconds of each backend for a request; infinity for one that failed. All processes must get the same numbers."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The backend that serves a kind of layer. times_ms: what was measured to choose it, empty where nothing was."""

    name: str
    attend: Attend
    times_ms: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """In a line: `flash4 (0.52 ms; cudnn 0.61, flex 0.8)`."""
        if self.name not in self.times_ms:
            return self.name
        others = sorted((ms, name) for name, ms in self.times_ms.items() if name != self.name)
        words = [f"{name} {ms:.3g}" if math.isfinite(ms) else f"{name} failed" for ms, name in others]
        return f"{self.name} ({self.times_ms[self.name]:.3g} ms" + ("; " + ", ".join(words) if words else "") + ")"


def expand_heads(k: Tensor, num_heads: int) -> Tensor:
    """Repeat key/value heads for grouped attention: (B, T, K, D) -> (B, T, H, D)."""
    groups = num_heads // k.shape[2]
    return k if groups == 1 else k.repeat_interleave(groups, dim=2)


def with_documents(attend: Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]) -> Attend:
    """A backend's `attend`, and its `within`, of one function that takes the documents' `reach` last, None without."""

    @wraps(attend)
    def whole(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return attend(q, k, v, window, None)

    def within(reach: Tensor) -> Attend:
        return lambda q, k, v, window: attend(q, k, v, window, reach)

    whole.within = within  # type: ignore[attr-defined]
    return whole


def within(attend: Attend, reach: Tensor | None) -> Attend:
    """`attend` within documents; as it is for None. Backends without `within` have been refused before."""
    if reach is None:
        return attend
    make: Callable[[Tensor], Attend] = attend.within  # type: ignore[attr-defined]
    return make(reach)


def band_mask(
    num_queries: int, num_keys: int, window: int, device: torch.device | str, reach: Tensor | None = None
) -> Tensor:
    """(Tq, Tk) bool, True where the query may see the key; with `reach` (B, T) one for each row, (B, Tq, Tk)."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    visible = key <= query
    visible = visible & (key >= query - window) if window else visible
    return visible if reach is None else visible & (key >= query - reach[:, -num_queries:, None])


def usable(request: Request) -> dict[str, str | None]:
    """Every backend of the folder with the reason why it cannot serve `request` (None: it can)."""
    return {name: why_not(name, request) for name in plugin.names(PACKAGE)}


def why_not_heads(name: str, request: Request, most_head_dim: int) -> str | None:
    """Why kernels cannot serve that take half precision and head sizes of whole eights; None when they can."""
    if request.dtype not in HALF_PRECISIONS:
        return f"{name} needs bfloat16 or float16, not {request.dtype}"
    if request.head_dim % 8 or request.head_dim > most_head_dim:
        return f"{name} needs a head size that is a multiple of 8 up to {most_head_dim}, not {request.head_dim}"
    return None


def why_not(name: str, request: Request) -> str | None:
    """Why backend `name` cannot serve `request`, in a sentence; None when it can."""
    try:
        module = plugin.load(PACKAGE, name)
    except UserError as error:  # its library is not installed, or does not load
        return _other_device(name, request) or str(error)
    return _reason(module, name, request)


def _other_device(name: str, request: Request) -> str | None:
    """That the table names the backend for other devices alone, in a sentence: what can be said without its library."""
    row = support(request.device_type, request.capability)
    meant = [other.device for other in rows() if name in (*other.full, *other.windowed)]
    if not meant or row.device in meant:
        return None
    return f"{name} is not for {row.device}, only for {' and '.join(meant)}"


def _reason(module: Any, name: str, request: Request) -> str | None:
    reason: str | None = module.check(request)
    if reason is None and request.documents and not hasattr(module.attend, "within"):
        return f"{name} cannot keep documents apart: it sees whole windows"
    return reason


def candidates(request: Request) -> tuple[str, ...]:
    """The backends that "auto" chooses from: those that can serve `request`, in the order of the capability table.

    What the table does not name for this kind of device is not even loaded; what it does not name at all, because
    somebody added it to the folder, comes last. Raises UserError when there is none.
    """
    row = support(request.device_type, request.capability)
    known = {ORACLE}.union(*((*any_row.full, *any_row.windowed) for any_row in rows()))
    added = [name for name in plugin.names(PACKAGE) if name not in known]
    # Documents leave as little to see as a window does: what skips the rest comes first.
    ordered = row.windowed if request.window or request.documents else row.full
    reasons = {name: why_not(name, request) for name in (*ordered, *added)}
    found = tuple(name for name, reason in reasons.items() if reason is None)
    if not request.compiled:
        found = tuple(name for name in found if name == found[0] or not _compiles_itself(name))
    if not found:
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UserError(f"no attention backend can serve this model here: {said}")
    return found


def _compiles_itself(name: str) -> bool:
    return getattr(plugin.load(PACKAGE, name).attend, "compiles_itself", False)


def choose(name: str, request: Request, measure: Measure | None = None) -> Choice:
    """The backend called `name`, or for "auto" the best one among those that can serve `request`.

    Raises UserError when the named backend cannot honour the request, or when every one that was measured failed:
    nothing falls back silently.
    """
    if name != "auto":
        return Choice(name=name, attend=_load(name, request))
    names = candidates(request)
    if measure is None:
        return Choice(name=names[0], attend=_load(names[0], request))
    # The numbers decide, and not this process's own list: they are the same in every process, the list may not be.
    times_ms = measure({n: _load(n, request) for n in names}, request)
    best = min(times_ms, key=lambda n: times_ms[n])
    if not math.isfinite(times_ms[best]):
        raise UserError(
            f"every attention backend failed that was tried here ({', '.join(times_ms)}); the warnings before this "
            "say how. Choose one by run.attention to see its error in full"
        )
    return Choice(name=best, attend=_load(best, request), times_ms=times_ms)


def _load(name: str, request: Request) -> Attend:
    if reason := why_not(name, request):
        raise UserError(f"attention = {name!r} cannot be used here: {reason}")
    attend: Attend = plugin.load(PACKAGE, name).attend
    return attend
