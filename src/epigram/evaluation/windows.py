"""Which token is scored in which window: a pure plan, made before anything is computed.

A stream of n + 1 tokens has n targets; target t is token t + 1, predicted after token t. A window (start,
first_scored, end) feeds the tokens start..end-1, and of the predictions it makes only those of the targets
first_scored..end-1 count.

The tail. Windows advance by `stride`; the last one is moved back so that it ends with the last target, and
scores what the one before it left. So every target is scored exactly once whatever n, length and stride, no
target has less context than the method promises, and all windows of a plan have the same length: a compiled
model sees one shape. (Published evaluators either drop the ragged tail or score it many times: parameter-golf
#174, #558; #1218 shortens it.)
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from epigram.errors import UserError
from epigram.evaluation.adapt_config import AdaptConfig

METHODS = ("blocks", "sliding", "streaming")
_MANY_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """How method streaming reads a text: segment after segment, each chunk by chunk, with keys and values carried on.

    segment_tokens: length of a segment. Segments are the same whatever the number of processes, which share them.
    overlap: each segment reads so many windows of seq_len of the one before again, for context only. chunk_tokens:
    tokens of a segment that one forward reads, 0 for as many as a forward may have; with fewer, a forward reads several
    segments at a time (speed, not score). limits: positions that each layer looks back at most, its own included; none
    for the seq_len of the score everywhere. A windowed layer keeps its window.
    """

    segment_tokens: int = 1 << 18
    overlap: int = 2
    chunk_tokens: int = 0
    limits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.segment_tokens < 1:
            problems.append(f"segment_tokens = {self.segment_tokens} must be at least 1")
        if self.overlap < 0 or self.chunk_tokens < 0:
            problems.append(f"overlap = {self.overlap} and chunk_tokens = {self.chunk_tokens} must not be negative")
        if any(limit < 0 for limit in self.limits):
            problems.append(f"limits = {list(self.limits)} must be positions to look back, or 0 for seq_len")
        if problems:
            raise ValueError("; ".join(problems))


def usual_stride(seq_len: int) -> int:
    """That of sliding windows where none is given: an eighth of a window."""
    return max(seq_len // 8, 1)


def stride_of(method: str, seq_len: int, stride: int) -> int:
    """The stride of a method: `stride` where it is free, the one that there is for blocks and streaming."""
    return {"blocks": seq_len, "streaming": 1}.get(method, stride)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to score: windows of `seq_len` tokens that start every `stride` tokens. "blocks" has stride = seq_len.
    "streaming" reads on through the text, and each token sees the last `seq_len`: the limit of a stride of 1.

    `seq_len` is also the length that position encodings are chosen for, whatever a short stream leaves of a
    window. streaming: only for the method of that name.
    """

    name: str
    seq_len: int
    stride: int
    streaming: StreamingConfig = field(default_factory=StreamingConfig)

    def __post_init__(self) -> None:
        problems = [p for p in (_unknown_method(self.name), *_bad_window(self.seq_len, self.stride)) if p]
        if self.stride != stride_of(self.name, self.seq_len, self.stride):
            words = "seq_len" if self.name == "blocks" else "1"
            problems.append(f"method {self.name} has stride = {words}, not {self.stride} and {self.seq_len}")
        if self.name == "streaming":
            problems += _bad_segments(self.seq_len, self.streaming)
        if problems:
            raise UserError("; ".join(problems))

    @property
    def is_streaming(self) -> bool:
        return self.name == "streaming"

    @property
    def span(self) -> int:
        """Tokens of a window, or of a stream's segment."""
        return self.streaming.segment_tokens if self.is_streaming else self.seq_len

    def plan(self, num_targets: int) -> "WindowPlan":
        """Who scores what: windows, or the segments of a stream."""
        if not self.is_streaming:
            return plan_windows(num_targets, self.seq_len, self.stride)
        return plan_windows(num_targets, self.span, self.span - self.streaming.overlap * self.seq_len)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a model is scored.

    methods: from `METHODS`, each gives a line of the result. seq_len: tokens in a window. stride: tokens
    between windows, and so the number that each window scores, in method sliding. batch_tokens: at most this
    many tokens in one forward (it changes speed and memory, not the score). streaming: of the method of that name.
    adapt: one more line of the result, of a model that learns from what is scored, beside that of method sliding.
    """

    seq_len: int
    stride: int
    methods: tuple[str, ...] = ("blocks", "sliding")
    batch_tokens: int = 65_536
    streaming: StreamingConfig = field(default_factory=StreamingConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)

    def __post_init__(self) -> None:
        problems = [p for p in map(_unknown_method, self.methods) if p] + _bad_window(self.seq_len, self.stride)
        if not self.methods:
            problems.append(f"methods is empty: name at least one of {', '.join(METHODS)}")
        if len(set(self.methods)) < len(self.methods):
            problems.append(f"methods names one twice: {', '.join(self.methods)}")
        if "streaming" in self.methods:
            problems += _bad_segments(self.seq_len, self.streaming)
        if self.adapt.kind != "none" and "sliding" not in self.methods:
            problems.append(
                f"adapt.kind = {self.adapt.kind!r} shows the unadapted score of method sliding beside its own: add "
                'sliding to methods, or set adapt.kind = "none"'
            )
        problems += self.adapt.problems(self.seq_len)
        if self.batch_tokens < self.seq_len:
            problems.append(
                f"batch_tokens = {self.batch_tokens} does not hold one window of seq_len = {self.seq_len}: "
                f"raise batch_tokens to at least {self.seq_len}"
            )
        if problems:
            raise UserError("; ".join(problems))

    def method(self, name: str) -> Method:
        """The method called `name` with this config's sizes; UserError for an unknown one."""
        stride = stride_of(name, self.seq_len, self.stride)
        return Method(name=name, seq_len=self.seq_len, stride=stride, streaming=self.streaming)


def _unknown_method(name: str) -> str | None:
    return None if name in METHODS else f"there is no method {name!r}: choose from {', '.join(METHODS)}"


def _bad_window(seq_len: int, stride: int) -> list[str]:
    problems = []
    if seq_len < 1:
        problems.append(f"seq_len = {seq_len} must be at least 1")
    if stride < 1:
        problems.append(f"stride = {stride} must be at least 1")
    if stride > seq_len >= 1:
        problems.append(
            f"stride = {stride} is over seq_len = {seq_len}, so tokens between windows would be left out: "
            f"use a stride of at most {seq_len}"
        )
    return problems


def _bad_segments(seq_len: int, config: StreamingConfig) -> list[str]:
    again = config.overlap * seq_len
    if 0 <= again < config.segment_tokens:
        return []
    return [
        f"segments of {config.segment_tokens} tokens leave nothing to score beside an overlap of {config.overlap} "
        f"windows of {seq_len}: raise streaming.segment_tokens above {again}"
    ]


@dataclass(frozen=True)
class WindowPlan:
    """Windows in the order of the targets they score; three int64 arrays of one length.

    start: first input. first_scored, end: the targets first_scored..end-1 count. `end - start` is the same
    for all.
    """

    start: NDArray[np.int64]
    first_scored: NDArray[np.int64]
    end: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert len(self.start) == len(self.first_scored) == len(self.end)
        assert np.all(self.start <= self.first_scored), "a window scores its own targets"
        assert np.all(self.first_scored < self.end), "every window scores something"
        assert np.all(self.first_scored[1:] == self.end[:-1]), "scored ranges must follow each other"

    def __len__(self) -> int:
        return len(self.start)

    @property
    def length(self) -> int:
        """Tokens in each window; 0 for a plan without windows."""
        return int(self.end[0] - self.start[0]) if len(self) else 0

    @property
    def scored(self) -> tuple[int, int]:
        """The targets first..end-1 that this plan scores."""
        return (int(self.first_scored[0]), int(self.end[-1])) if len(self) else (0, 0)

    @property
    def num_scored(self) -> int:
        """How many targets this plan scores."""
        first, end = self.scored
        return end - first

    def num_scored_of(self, window: int) -> int:
        """How many targets window number `window` scores."""
        return int(self.end[window] - self.first_scored[window])

    def __getitem__(self, part: slice) -> "WindowPlan":
        return WindowPlan(self.start[part], self.first_scored[part], self.end[part])


def plan_windows(num_targets: int, seq_len: int, stride: int) -> WindowPlan:
    """Windows of `seq_len` tokens, or of all tokens when there are fewer, that score `num_targets` once each.

    The first window scores all its targets, the others the last `stride`, the last one what is left. So a
    target beyond the first window has at least seq_len - stride tokens of context before its own input token.
    Raises UserError for sizes below one and for stride > seq_len. Source: the sliding evaluation of
    parameter-golf #1212; the tail as the module's text says.
    """
    if num_targets < 1:
        raise UserError("there is nothing to score: the text needs at least two tokens")
    if problems := _bad_window(seq_len, stride):
        raise UserError("; ".join(problems))
    length = min(seq_len, num_targets)
    num_windows = 1 + -(-(num_targets - length) // stride)
    end = np.minimum(length + stride * np.arange(num_windows, dtype=np.int64), num_targets)
    first_scored = np.concatenate([np.zeros(1, np.int64), end[:-1]])
    return WindowPlan(end - length, first_scored, end)


def rank_share(plan: WindowPlan, rank: int, world_size: int) -> WindowPlan:
    """The contiguous part of `plan` that `rank` scores; empty when there are more ranks than windows."""
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    return plan[len(plan) * rank // world_size : len(plan) * (rank + 1) // world_size]


def batch_size(num_windows: int, length: int, world_size: int, batch_tokens: int) -> int:
    """Windows in one forward: as many as `batch_tokens` holds (at least one), evened out over the batches of
    a rank.

    Evening out keeps the rows that fill up the last batch fewer than the batches; the same on every rank.
    """
    assert min(num_windows, length) > 0
    per_rank = -(-num_windows // world_size)
    most = max(1, batch_tokens // length)
    num_batches = -(-per_rank // most)
    # With many batches a padded last one costs little, and one size for all methods is one graph to compile.
    return most if num_batches >= _MANY_BATCHES else -(-per_rank // num_batches)


def batches(plan: WindowPlan, size: int) -> Iterator[WindowPlan]:
    """`plan` in order, in pieces of `size` windows; the last piece may have fewer."""
    for first in range(0, len(plan), size):
        yield plan[first : first + size]
