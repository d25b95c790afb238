"""Scores a stream of tokens: runs the planned windows through a model and adds up what it lost.

The model is any callable `nll(inputs, targets, rope_len=..., last=...)`: int64 (B, T) and (B, T) in, float32
negative log-likelihoods in nats out, each position computed from the inputs up to it in its own row: those of
all positions, (B, T), or with `last` = n of the last ones only, (B, n), so that the model may leave out what
these do not need. `rope_len` is the method's seq_len: rotary frequencies depend on the length of the window, and
a stream shorter than one window must be turned the same way as a full window.

In a sliding evaluation every window but the first scores at most `stride` targets, those at its end. So the
first window goes alone, and all others ask for their last `stride` losses.

Legend: B windows in a batch, T tokens in a window.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epigram.byte_tables import ByteTables
from epigram.errors import UserError
from epigram.evaluation.bpb import Score, check_bytes, count_bytes
from epigram.evaluation.windows import Method, WindowPlan, batch_size, batches, plan_windows, rank_share
from epigram.progress import Progress


class TokenLoss(Protocol):
    """The model as the scorer sees it; see the module's text."""

    def __call__(self, inputs: Tensor, targets: Tensor, /, *, rope_len: int, last: int | None) -> Tensor: ...


Reduce = Callable[[Tensor], Tensor]  # adds a float64 tensor up over the ranks


@dataclass(frozen=True)
class _Batch:
    """inputs, targets: (B, T) int64 on the device. last: only the losses at so many positions at the end are
    wanted; None for all. scored: (B, last) or (B, T) bool, those of them that count.
    """

    inputs: Tensor
    targets: Tensor
    last: int | None
    scored: Tensor
    num_scored: int


def score(
    nll: TokenLoss,
    tokens: NDArray[np.uint16],
    tables: ByteTables,
    method: Method,
    *,
    device: torch.device,
    batch_tokens: int,
    expected_bytes: int | None,
    byte_counts: NDArray[np.uint16] | None = None,
    rank: int = 0,
    world_size: int = 1,
    reduce: Reduce | None = None,
    progress: bool = True,
) -> Score:
    """What `nll` loses on every token of `tokens` but the first, by `method`.

    tokens: (n + 1,) the whole stream, the same on every rank. expected_bytes: the bytes of text that the
    manifest gives for it; None only where there is no manifest. byte_counts: (n + 1,) bytes of text that each token
    stands for, where the tables do not tell. reduce: needed with more than one rank to get
    the whole score; without it the result is this rank's part, and parts add up. batch_tokens: at most this
    many tokens a forward.

    The sum is kept in float64 on the device and read once at the end. Raises DataError when the bytes differ
    from `expected_bytes`, UserError when a loss is not a finite number.
    """
    plan = plan_windows(len(tokens) - 1, method.seq_len, method.stride)
    all_bytes = check_bytes(tokens, tables, expected_bytes, byte_counts)
    share = rank_share(plan, rank, world_size)
    size = batch_size(len(plan), plan.length, world_size, batch_tokens)
    with torch.no_grad(), Progress(f"score {method.name}", share.num_scored, "tokens") as bar:
        advance = bar.advance if progress else None
        nats, counted = _sum_losses(nll, _batches(tokens, share, size, method, device), method, device, advance)
    num_bytes = torch.tensor(count_bytes(tokens, tables, *share.scored, byte_counts), device=nats.device)
    sums = torch.stack([nats, counted.double(), num_bytes.double()])
    result = _as_score(reduce(sums) if reduce else sums)
    if reduce or world_size == 1:
        assert result.tokens == len(tokens) - 1, "every token must be scored once"
        assert result.bytes == all_bytes, "every byte must be counted once"
    return result


def token_nlls(
    nll: TokenLoss,
    tokens: NDArray[np.uint16],
    method: Method,
    *,
    device: torch.device,
    batch_tokens: int,
) -> NDArray[np.float32]:
    """Loss of each target of `tokens` in nats, float32 (n,), by `method`; their sum is that of `score`."""
    plan = plan_windows(len(tokens) - 1, method.seq_len, method.stride)
    size = batch_size(len(plan), plan.length, 1, batch_tokens)
    found = []
    with torch.no_grad():
        for batch in _batches(tokens, plan, size, method, device):
            losses = _losses(nll, batch, method)
            # Windows follow each other in the order of their targets, and so do the selected positions.
            found.append(losses[batch.scored].cpu().numpy())
    return np.concatenate(found)


def _sum_losses(
    nll: TokenLoss,
    windows: Iterator[_Batch],
    method: Method,
    device: torch.device,
    advance: Callable[[float], None] | None,
) -> tuple[Tensor, Tensor]:
    """The losses that count, added up, and their number: float64 () and int64 (), still on the device."""
    home = torch.device("cpu") if device.type == "mps" else device  # Apple's devices have no float64
    nats = torch.zeros((), dtype=torch.float64, device=home)
    counted = torch.zeros((), dtype=torch.int64, device=home)
    for batch in windows:
        losses = _losses(nll, batch, method)
        # where, not a product: a loss that does not count must not matter even if it is infinite.
        nats += torch.where(batch.scored, losses, 0.0).to(home).sum(dtype=torch.float64)
        counted += batch.scored.sum().to(home)
        if advance:
            advance(batch.num_scored)
    return nats, counted


def _losses(nll: TokenLoss, batch: _Batch, method: Method) -> Tensor:
    losses = nll(batch.inputs, batch.targets, rope_len=method.seq_len, last=batch.last)
    assert losses.shape == batch.scored.shape, f"one loss a target that is asked for, not {tuple(losses.shape)}"
    assert losses.dtype == torch.float32, f"losses in float32, not {losses.dtype}"
    return losses


def _batches(
    tokens: NDArray[np.uint16], plan: WindowPlan, size: int, method: Method, device: torch.device
) -> Iterator[_Batch]:
    """The windows of `plan`, `size` at a time, on the device; copies do not wait for the device.

    The last batch is filled up with repetitions of its last window of which nothing counts, so that all have
    one shape; a window that scores more than the stride goes alone.
    """
    if method.stride >= plan.length:
        for part in batches(plan, size):
            yield _batch(tokens, part, size, None, device)
        return
    num_alone = int(len(plan) > 0 and plan.num_scored_of(0) > method.stride)
    if num_alone:
        yield _batch(tokens, plan[:1], 1, None, device)
    for part in batches(plan[num_alone:], size):
        yield _batch(tokens, part, size, method.stride, device)


def _batch(tokens: NDArray[np.uint16], part: WindowPlan, size: int, last: int | None, device: torch.device) -> _Batch:
    """The windows of `part`, filled up to `size`."""
    length = part.length
    rows = np.minimum(np.arange(size), len(part) - 1)
    skipped = (part.first_scored - part.start)[rows]
    skipped[len(part) :] = length
    wanted = torch.arange(0 if last is None else length - last, length, device=device)
    assert int(skipped.min()) >= (0 if last is None else length - last), "a target that counts is not asked for"
    window = _to_device(tokens[part.start[rows][:, None] + np.arange(length + 1)].astype(np.int64), device)
    scored = wanted >= _to_device(skipped, device)[:, None]
    inputs, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    return _Batch(inputs, targets, last, scored, part.num_scored)


def _to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _as_score(sums: Tensor) -> Score:
    nats, tokens, num_bytes = sums.tolist()
    if not np.isfinite(nats):
        raise UserError(f"the model's loss is {nats}, so it has no score: its weights are damaged or training diverged")
    return Score(nats, round(tokens), round(num_bytes))
