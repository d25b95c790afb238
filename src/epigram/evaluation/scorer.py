"""Scores a stream of tokens: adds up what a model loses on every token, each counted once.

Who scores what is planned by `epigram.evaluation.windows` and read by `epigram.evaluation.passes`; here the losses that
count are summed in float64, and the bytes of text that they stand for are counted and compared with the data's own.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epigram.attention.base import TOO_MANY_DOCUMENTS
from epigram.byte_tables import ByteTables
from epigram.capability import float64_device
from epigram.errors import UserError
from epigram.evaluation.adapt import Adapter, chunks
from epigram.evaluation.bpb import Score, check_bytes, count_bytes
from epigram.evaluation.passes import OpenStream, Part, TokenLoss, parts
from epigram.evaluation.windows import Method, WindowPlan, rank_share
from epigram.progress import Progress

Reduce = Callable[[Tensor], Tensor]  # adds a float64 tensor up over the ranks

Pace = Callable[[float], None]
"""Is told what share of the work is done, and may raise to end it."""


class MiscountError(AssertionError):
    """Tokens or bytes that were counted twice or not at all: a fault of the scorer, whoever uses it."""


def score(
    nll: TokenLoss | OpenStream,
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
    adapter: Adapter | None = None,
    chunk_tokens: int = 0,
    pace: Pace | None = None,
) -> Score:
    """What `nll` loses on every token of `tokens` but the first, by `method`.

    nll: a TokenLoss, for method streaming an OpenStream. tokens: (n + 1,) the whole stream, the same on every rank.
    expected_bytes: the bytes of text that the manifest gives for it; None only where there is no manifest. byte_counts:
    (n + 1,) bytes of text that each token stands for, where the tables do not tell. reduce: needed with more than one
    rank to get the whole score; without it the result is this rank's part, and parts add up. batch_tokens: at most this
    many tokens a forward. adapter, chunk_tokens: who learns from each chunk of so many tokens after it was scored.
    pace: is told after each chunk what share of them is done.

    The sum is kept in float64 on the device and read once at the end. Raises DataError when the bytes differ
    from `expected_bytes`, UserError when a loss is not a finite number.
    """
    groups = _groups(method.plan(len(tokens) - 1), adapter, chunk_tokens)
    all_bytes = check_bytes(tokens, tables, expected_bytes, byte_counts)
    shares = [rank_share(group, rank, world_size) for group in groups]
    found = _released(nll, tokens, groups, method, device, batch_tokens, adapter, rank, world_size, pace)
    total = sum(share.num_scored for share in shares)
    with torch.no_grad(), Progress(f"score {method.name}", total, "tokens", shown=progress) as bar:
        nats, counted = sum_losses(found, device, bar.advance)
    own_bytes = sum(count_bytes(tokens, tables, *share.scored, byte_counts) for share in shares)
    num_bytes = torch.tensor(own_bytes, device=nats.device)
    sums = torch.stack([nats, counted.double(), num_bytes.double()])
    return as_score(
        reduce(sums) if reduce else sums, (len(tokens) - 1, all_bytes) if reduce or world_size == 1 else None
    )


def token_nlls(
    nll: TokenLoss | OpenStream,
    tokens: NDArray[np.uint16],
    method: Method,
    *,
    device: torch.device,
    batch_tokens: int,
    adapter: Adapter | None = None,
    chunk_tokens: int = 0,
) -> NDArray[np.float32]:
    """Loss of each target of `tokens` in nats, float32 (n,), by `method`; their sum is that of `score`.

    Raises UserError when one is not a finite number.
    """
    num_targets = len(tokens) - 1
    found, times = np.zeros(num_targets, np.float32), np.zeros(num_targets, np.int64)
    groups = _groups(method.plan(num_targets), adapter, chunk_tokens)
    with torch.no_grad():
        for part in _released(nll, tokens, groups, method, device, batch_tokens, adapter):
            targets, nats = part.counted()
            found[targets] = nats
            np.add.at(times, targets, 1)
    if len(wrong := np.flatnonzero(times != 1)):
        raise MiscountError(f"token {int(wrong[0]) + 1} is scored {int(times[wrong[0]])} times")
    _require_finite(float(found.sum(dtype=np.float64)))
    return found


def _require_finite(nats: float) -> None:
    if not np.isfinite(nats):
        raise UserError(
            f"the model's loss is {nats}, so it has no score: its weights are damaged, training diverged, or "
            f"{TOO_MANY_DOCUMENTS}: then lower batch_tokens (--batch-tokens, in a recipe score.batch_tokens)"
        )


def _groups(plan: WindowPlan, adapter: Adapter | None, chunk_tokens: int) -> list[WindowPlan]:
    return [plan] if adapter is None else chunks(plan, chunk_tokens)


def _released(
    nll: TokenLoss | OpenStream,
    tokens: NDArray[np.uint16],
    groups: list[WindowPlan],
    method: Method,
    device: torch.device,
    batch_tokens: int,
    adapter: Adapter | None,
    rank: int = 0,
    world_size: int = 1,
    pace: Pace | None = None,
) -> Iterator[Part]:
    """This rank's losses, group after group; a group is handed to the adapter when all its losses are out.

    The last one is not: nothing would be scored with what it taught.
    """
    for number, group in enumerate(groups):
        share = rank_share(group, rank, world_size)
        yield from parts(
            nll, tokens, share, method,
            batch_tokens=batch_tokens, world_size=world_size, device=device, num_windows=len(group),
        )  # fmt: skip
        if adapter is not None and number < len(groups) - 1:
            first, end = group.scored
            adapter.learn(tokens[first : end + 1].copy(), number, len(groups))
        if pace is not None:
            pace((number + 1) / len(groups))


def sum_losses(
    found: Iterable[Part], device: torch.device, advance: Callable[[float], None] | None = None
) -> tuple[Tensor, Tensor]:
    """The losses that count, added up, and their number: float64 () and int64 (), still on the device."""
    home = float64_device(device)
    nats = torch.zeros((), dtype=torch.float64, device=home)
    counted = torch.zeros((), dtype=torch.int64, device=home)
    for part in found:
        # where, not a product: a loss that does not count must not matter even if it is infinite.
        nats += torch.where(part.scored, part.losses, 0.0).to(home).sum(dtype=torch.float64)
        counted += part.scored.sum().to(home)
        if advance:
            advance(part.num_scored)
    return nats, counted


def as_score(sums: Tensor, whole: tuple[int, int] | None) -> Score:
    """The score that nats, tokens and bytes (3,) make. whole: the tokens and bytes that it must have; None for a part.

    Raises UserError when a loss is not a finite number, MiscountError when tokens or bytes are not those.
    """
    nats, tokens, num_bytes = sums.tolist()
    _require_finite(nats)
    found = Score(nats, round(tokens), round(num_bytes))
    if whole is not None:
        if found.tokens != whole[0]:
            raise MiscountError(f"{found.tokens:,} tokens are scored of {whole[0]:,}")
        if found.bytes != whole[1]:
            raise MiscountError(f"{found.bytes:,} bytes are counted of {whole[1]:,}")
    return found
