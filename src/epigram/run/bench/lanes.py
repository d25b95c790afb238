"""How long a lane takes by its length and number of sequences, and which numbers would take equally long.

A step is over when the slowest process is. Where each process has one lane, as in parameter-golf #1212 with 36 x 2048
and 10 x 6144, the numbers of sequences decide who waits for whom; which numbers are right depends on the machine.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from epigram.config import LaneGroup
from epigram.data.lanes import Lane
from epigram.run.bench._lane import time_lane
from epigram.run.bench.base import Bench, lane_name
from epigram.run.warmup import prepare_lane

REPEATS = 10
OPTIONS: frozenset[str] = frozenset()

_SHARES = (1.25, 1.0, 0.75, 0.5)
"""Of the recipe's number of sequences. The largest comes first: what is recorded later fits into its memory."""


class Line(NamedTuple):
    """Time of a lane by its number of sequences: base_ms, and seq_ms for each of them."""

    base_ms: float
    seq_ms: float

    def ms(self, num_seqs: float) -> float:
        return self.base_ms + self.seq_ms * num_seqs


def run(bench: Bench) -> None:
    measured: dict[int, dict[int, float]] = {}
    for lane in _shapes(bench.engine.config.lanes):
        try:
            measured.setdefault(lane.seq_len, {})[lane.num_seqs] = _time(bench, lane)
        except torch.OutOfMemoryError:
            bench.left_out[lane_name(lane)] = "it needs more memory than this device has"
    groups = bench.engine.config.lanes
    if any(not measured.get(group.seq_len) for group in groups):
        return
    lines = {seq_len: fit(times) for seq_len, times in measured.items()}
    proposed = propose(groups, lines)
    bench.figures["tokens_per_step"] = sum(g.count * g.seq_len * g.num_seqs for g in proposed)
    bench.paste = toml(groups, proposed, lines)


def _shapes(groups: Sequence[LaneGroup]) -> list[Lane]:
    """Around the recipe's own number of sequences of each length, most tokens first."""
    lanes = {
        Lane(seq_len=group.seq_len, num_seqs=max(round(share * group.num_seqs), 1))
        for group in groups
        for share in _SHARES
    }
    return sorted(lanes, key=lambda lane: (-lane.num_tokens, lane.seq_len))


def _time(bench: Bench, lane: Lane) -> float:
    """Median ms of forward and backward as a run would execute them."""
    if bench.engine.capture is not None:
        prepare_lane(bench.engine, lane, None)
    return time_lane(bench, lane_name(lane), lane).timing.median_ms


def fit(times: Mapping[int, float]) -> Line:
    """The line through measured ms by number of sequences, least squares; through 0 where there is one number only.

    A measurement so noisy that more sequences would take less time, or none a negative one, also gets a line through 0.
    """
    num_seqs, ms = np.array(list(times), dtype=float), np.array(list(times.values()))
    if len(times) > 1:
        seq_ms, base_ms = np.polyfit(num_seqs, ms, 1)
        if seq_ms > 0 <= base_ms:
            return Line(float(base_ms), float(seq_ms))
    return Line(0.0, float((num_seqs @ ms) / (num_seqs @ num_seqs)))


def propose(groups: Sequence[LaneGroup], lines: Mapping[int, Line]) -> tuple[LaneGroup, ...]:
    """The groups with numbers of sequences for which all lanes take equally long, and `ms` as `lines` predict it.

    The time is the one at which a step has as many tokens as before: with lines, the tokens of all lanes grow with the
    time by a constant rate, so that it follows in closed form. Numbers are rounded, and 1 at least.
    """
    before = sum(g.count * g.seq_len * g.num_seqs for g in groups)
    rate = sum(g.count * g.seq_len / lines[g.seq_len].seq_ms for g in groups)  # tokens a ms, over all lanes
    offset = sum(g.count * g.seq_len * lines[g.seq_len].base_ms / lines[g.seq_len].seq_ms for g in groups)
    target_ms = (before + offset) / rate
    proposed = []
    for group in groups:
        line = lines[group.seq_len]
        num_seqs = max(round((target_ms - line.base_ms) / line.seq_ms), 1)
        ms = float(f"{line.ms(num_seqs):.4g}")
        proposed.append(LaneGroup(count=group.count, seq_len=group.seq_len, num_seqs=num_seqs, ms=ms))
    return tuple(proposed)


def toml(before: Sequence[LaneGroup], groups: Sequence[LaneGroup], lines: Mapping[int, Line]) -> str:
    """`groups` as a recipe writes them, with the spread of their times and of those of `before`."""
    now, then = _spread([g.ms for g in groups]), _spread([lines[g.seq_len].ms(g.num_seqs) for g in before])
    tables = [
        f"[[lanes]]\ncount = {g.count}\nseq_len = {g.seq_len}\nnum_seqs = {g.num_seqs}\n"
        f"ms = {g.ms}  # forward + backward of one, measured\n"
        for g in groups
    ]
    head = f"# The slowest lane takes {now:.1f} % longer than the fastest; with the recipe's numbers {then:.1f} %.\n"
    return head + "\n".join(tables)


def _spread(times_ms: Sequence[float]) -> float:
    """Percent by which the slowest exceeds the fastest."""
    return 100 * (max(times_ms) / min(times_ms) - 1)
