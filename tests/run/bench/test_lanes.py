"""Numbers of sequences that take equally long."""

import tomllib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import short

from epigram.config import LaneGroup
from epigram.dist.context import Context
from epigram.run.bench import _lane, lanes
from epigram.run.bench.base import Bench
from epigram.run.bench.lanes import Line, fit, propose, toml
from epigram.run.setup import build_engine

PUBLISHED = (LaneGroup(count=5, seq_len=2048, num_seqs=36), LaneGroup(count=3, seq_len=6144, num_seqs=10))


def test_the_published_numbers_are_equal_times():
    """Where a sequence of 6144 takes 3.6 times one of 2048, 36 and 10 are what is proposed, from whatever numbers."""
    lines = {2048: Line(0.0, 1.8), 6144: Line(0.0, 6.48)}
    assert [(g.num_seqs, g.ms) for g in propose(PUBLISHED, lines)] == [(36, 64.8), (10, 64.8)]
    tokens = sum(g.count * g.seq_len * g.num_seqs for g in PUBLISHED)
    for num_seqs in (3, 18):
        short_seqs = (tokens - 3 * 6144 * num_seqs) // (5 * 2048)
        other = (LaneGroup(count=5, seq_len=2048, num_seqs=short_seqs),
                 LaneGroup(count=3, seq_len=6144, num_seqs=num_seqs))  # fmt: skip
        assert [g.num_seqs for g in propose(other, lines)] == [36, 10]


lines_of = st.builds(Line, st.floats(0, 20), st.floats(0.05, 5))


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(40, 90), lines_of), min_size=1, max_size=4))
def test_times_are_equal_up_to_a_sequence_and_tokens_stay(parts: list[tuple[int, int, Line]]):
    groups = [LaneGroup(count=count, seq_len=64 << i, num_seqs=n) for i, (count, n, _) in enumerate(parts)]
    lines = {64 << i: line for i, (_, _, line) in enumerate(parts)}
    proposed = propose(groups, lines)
    if any(group.num_seqs == 1 for group in proposed):
        return  # a length for which the time is too short
    half = max(line.seq_ms for line in lines.values()) / 2
    times = [lines[g.seq_len].ms(g.num_seqs) for g in proposed]
    assert max(times) - min(times) <= 2 * half + 1e-6
    tokens, before = (sum(g.count * g.seq_len * g.num_seqs for g in some) for some in (proposed, groups))
    assert abs(tokens - before) <= sum(g.count * g.seq_len for g in groups) / 2 + 1e-6
    assert [g.ms for g in proposed] == pytest.approx(times, rel=1e-3)


def test_the_line_through_what_was_measured():
    assert fit({10: 25.0, 20: 45.0, 30: 65.0}) == pytest.approx((5.0, 2.0))
    assert fit({4: 10.0}) == pytest.approx((0.0, 2.5))
    assert fit({1: 5.0, 2: 4.0}) == pytest.approx((0.0, 13 / 5)), "noise: least squares through 0"
    assert fit({1: 1.0, 2: 4.0}) == pytest.approx((0.0, 9 / 5)), "none of no sequences takes less than no time"


def test_what_is_printed_for_the_recipe():
    lines = {2048: Line(0.0, 1.8), 6144: Line(0.0, 6.48)}
    text = toml((PUBLISHED[0], LaneGroup(count=3, seq_len=6144, num_seqs=15)), propose(PUBLISHED, lines), lines)
    assert "takes 0.0 % longer than the fastest; with the recipe's numbers 50.0 %." in text
    assert tomllib.loads(text)["lanes"] == [
        {"count": 5, "seq_len": 2048, "num_seqs": 36, "ms": 64.8},
        {"count": 3, "seq_len": 6144, "num_seqs": 10, "ms": 64.8},
    ]


def test_a_shape_that_needs_too_much_memory_is_left_out(monkeypatch):
    """The others still give a line; where none of a length is left, nothing is proposed."""
    bench = Bench(engine=build_engine(short(), Context()), repeats=1)
    real = _lane.lane_step

    def limited(engine, batch, *rest):
        if batch.shape[1] - 1 == 128 and batch.shape[0] > limit:
            raise torch.OutOfMemoryError("too much")
        return real(engine, batch, *rest)

    monkeypatch.setattr(_lane, "lane_step", limited)
    limit = 1
    lanes.run(bench)
    assert list(bench.left_out) == ["2 x 128"]
    assert len(tomllib.loads(bench.paste)["lanes"]) == 2
    limit, bench.paste = 0, ""
    lanes.run(bench)
    assert list(bench.left_out) == ["2 x 128", "1 x 128"]
    assert bench.paste == ""
