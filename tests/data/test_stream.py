"""The order of windows: each block of a pass once, groups apart, nothing but seed and lengths in it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from epigram.data.lanes import Lane, length_groups
from epigram.data.passes import Segment, segments_of_pass
from epigram.data.stream import WindowStream, draw_walk
from epigram.errors import DataError

PUBLISHED = (Lane(seq_len=2048, num_seqs=36),) * 5 + (Lane(seq_len=6144, num_seqs=10),) * 3
some_lanes = st.lists(
    st.builds(Lane, seq_len=st.sampled_from([3, 5, 8]), num_seqs=st.integers(1, 6)), min_size=1, max_size=5
)
shard_lists = st.lists(st.integers(0, 400), min_size=1, max_size=12)


def streams_for(shard_tokens, lanes, seed=0) -> list[WindowStream]:
    groups = length_groups(lanes)
    return [WindowStream(shard_tokens, groups, index, seed) for index in range(len(groups))]


def draw(stream: WindowStream, steps: int) -> list[tuple[int, int]]:
    return [tuple(window) for _ in range(steps) for window in stream.draw().tolist()]


def fits(shard_tokens, lanes) -> bool:
    return max(shard_tokens) > max(lane.seq_len for lane in lanes)


@given(st.integers(0, 50), st.integers(5, 300), st.integers(1, 5), st.integers(0, 9))
def test_a_walk_visits_each_block_once(start: int, length: int, seq_len: int, seed: int) -> None:
    segment = Segment(shard=3, start=start, stop=start + length)
    walk = draw_walk(segment, seq_len, np.random.default_rng(seed))
    places = [walk.place(k, seq_len) for k in range(walk.count)]
    assert sorted(places) == [walk.origin + seq_len * block for block in range(walk.count)]
    assert walk.origin >= segment.start
    assert segment.stop - seq_len < max(places) + seq_len <= segment.stop
    assert walk.origin - segment.start < seq_len
    assert math.gcd(walk.stride, walk.count) == 1


@settings(max_examples=60)
@given(shard_lists, some_lanes, st.integers(0, 5), st.integers(0, 4))
def test_groups_of_a_pass_share_nothing(shard_tokens, lanes, seed: int, index: int) -> None:
    assume(fits(shard_tokens, lanes))
    groups = length_groups(lanes)
    parts = segments_of_pass(shard_tokens, groups, seed, index)
    owners = [np.zeros(max(n, 1), int) for n in shard_tokens]
    whole = [all(segment.num_tokens == shard_tokens[segment.shard] - 1 for segment in segments) for segments in parts]
    for segments, group, is_whole in zip(parts, groups, whole, strict=True):
        assert segments, "each group has something to read"
        for segment in segments:
            assert 0 <= segment.start < segment.stop < shard_tokens[segment.shard]  # the target of the last exists
            assert segment.num_tokens >= group.seq_len
            if not is_whole:  # a group without room of its own reads everything
                owners[segment.shard][segment.start : segment.stop] += 1
    assert all(owner.max() <= 1 for owner in owners)


def test_groups_share_the_text_by_their_tokens_and_see_all_of_it_in_time() -> None:
    groups = length_groups(PUBLISHED)
    for shard_tokens in ([3_000_000], [700_000] * 9, [100_000] * 200):
        total, seen = sum(shard_tokens), [[np.zeros(n, bool) for n in shard_tokens] for _ in groups]
        for index in range(12):
            parts = segments_of_pass(shard_tokens, groups, 0, index)
            shares = [sum(segment.num_tokens for segment in segments) / total for segments in parts]
            assert shares == pytest.approx([2 / 3, 1 / 3], abs=0.03)
            for segments, marks in zip(parts, seen, strict=True):
                for segment in segments:
                    marks[segment.shard][segment.start : segment.stop] = True
        covered = [sum(int(mark.sum()) for mark in marks) / total for marks in seen]
        assert min(covered) > 0.97


def test_a_group_sees_text_from_everywhere_in_one_pass() -> None:
    """Not one end of an ordered corpus: each tenth of it gives each group between half and double its share."""
    groups = length_groups(PUBLISHED)
    segments = segments_of_pass([30_000_000], groups, 0, 0)[1]
    tenths = np.zeros(10)
    for segment in segments:
        for tenth in range(10):
            low, high = max(segment.start, 3_000_000 * tenth), min(segment.stop, 3_000_000 * (tenth + 1))
            tenths[tenth] += max(high - low, 0)
    assert (tenths > 500_000).all()
    assert (tenths < 2_000_000).all()


@settings(max_examples=60, deadline=None)
@given(shard_lists, some_lanes, st.integers(0, 5))
def test_every_block_of_a_pass_is_drawn_once(shard_tokens, lanes, seed: int) -> None:
    """Whatever the steps, the windows drawn are those of the first pass, then those of the second, and so on."""
    assume(fits(shard_tokens, lanes))
    groups = length_groups(lanes)
    passes = streams_for(shard_tokens, lanes, seed)
    for group, stream, other in zip(groups, streams_for(shard_tokens, lanes, seed), passes, strict=True):
        drawn: list[tuple[int, int]] = []
        for index in range(3):
            other._begin(index)
            blocks = sorted((w.shard, w.place(k, group.seq_len)) for w in other._walks for k in range(w.count))
            while len(drawn) < len(blocks):
                drawn += draw(stream, 1)
            assert sorted(drawn[: len(blocks)]) == blocks
            drawn = drawn[len(blocks) :]
            for shard, start in blocks:
                assert start >= 0
                assert start + group.seq_len < shard_tokens[shard]
            for (shard, start), (after, following) in itertools.pairwise(blocks):
                assert shard != after or start + group.seq_len <= following


def test_windows_of_all_groups_are_disjoint_within_a_pass() -> None:
    shard_tokens = [9000, 70_000, 31_000]
    lanes = [Lane(seq_len=16, num_seqs=8), Lane(seq_len=64, num_seqs=1), Lane(seq_len=16, num_seqs=4)]
    used = [np.zeros(n, int) for n in shard_tokens]
    for stream, group in zip(streams_for(shard_tokens, lanes), length_groups(lanes), strict=True):
        steps = int(stream._counts.sum()) // group.num_windows
        for shard, start in draw(stream, steps):
            used[shard][start : start + group.seq_len] += 1
    assert max(int(one.max()) for one in used) == 1
    assert sum(int(one.sum()) for one in used) > 0.97 * sum(shard_tokens)


def test_groups_end_their_pass_together() -> None:
    steps = []
    for stream, group in zip(streams_for([4_000_000] * 5, PUBLISHED), length_groups(PUBLISHED), strict=True):
        steps.append(int(stream._counts.sum()) / group.num_windows)
    assert steps[0] == pytest.approx(steps[1], rel=0.02)
    assert steps[0] == pytest.approx(20_000_000 / 552_960, rel=0.03)


def test_the_order_depends_on_seed_and_lengths_only() -> None:
    lanes, shard_tokens = [Lane(seq_len=8, num_seqs=6), Lane(seq_len=5, num_seqs=4)], [500, 300, 900]
    first = [draw(stream, 30) for stream in streams_for(shard_tokens, lanes, 0)]
    assert first == [draw(stream, 30) for stream in streams_for(shard_tokens, lanes, 0)]
    for other in (streams_for(shard_tokens, lanes, 1), streams_for([500, 600, 900], lanes, 0)):
        assert all(draw(stream, 30) != one for stream, one in zip(other, first, strict=True))


def test_seeds_share_no_order() -> None:
    """Orders of different seeds agree no more than chance: 60 windows, expected agreement 1."""
    orders = [draw(streams_for([960 * 8 + 1], [Lane(seq_len=8, num_seqs=60)], seed)[0], 1) for seed in range(6)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 8


def test_seeds_draw_from_other_shards() -> None:
    """Which of a hundred equal shards a window of the first step is from, apart from where in it: expected agreement 1
    of 100 or less."""
    lanes = [Lane(seq_len=8, num_seqs=100)]
    shards = [[shard for shard, _ in draw(streams_for([801] * 100, lanes, seed)[0], 1)] for seed in range(4)]
    for i, one in enumerate(shards):
        for other in shards[i + 1 :]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 25


def test_a_step_mixes_shards() -> None:
    """With many shards a step comes from at least min(8, lanes) of them at first, from up to 64 later."""
    shard_tokens = [20_000] * 100
    lanes = [Lane(seq_len=10, num_seqs=36)] * 8
    (stream,) = streams_for(shard_tokens, lanes)
    early = len({shard for shard, _ in stream.draw().tolist()})
    stream._step = 1800
    late = len({shard for shard, _ in stream.draw().tolist()})
    assert (early, late) == (8, 64)
    (window,) = stream.draw()[:1].tolist()
    assert 0 <= window[0] < 100


def test_neighbours_rarely_follow_each_other() -> None:
    (stream,) = streams_for([100_001], [Lane(seq_len=10, num_seqs=100)])
    drawn = draw(stream, 100)
    assert sum(b[1] - a[1] == 10 for a, b in itertools.pairwise(drawn)) < 100


def test_less_text_than_a_step() -> None:
    (stream,) = streams_for([25], [Lane(seq_len=8, num_seqs=10)])  # three blocks at most
    for _ in range(20):
        windows = stream.draw()
        assert windows.shape == (10, 2)
        assert (windows[:, 1] <= 25 - 9).all()
    assert stream.passes > 60


def test_one_group_without_room_of_its_own_reads_everything() -> None:
    lanes = [Lane(seq_len=4, num_seqs=9), Lane(seq_len=30, num_seqs=1)]
    short, long = segments_of_pass([40], length_groups(lanes), 0, 0)
    assert long == [Segment(shard=0, start=0, stop=39)]
    assert short


@pytest.mark.parametrize("shard_tokens", [[8], [1, 0, 8, 5], [0], []])
def test_text_without_room_for_a_window_is_refused(shard_tokens: list[int]) -> None:
    with pytest.raises(DataError, match=rf"needs 9 in one shard, and the longest has {max([*shard_tokens, 0])}"):
        streams_for(shard_tokens, [Lane(seq_len=8, num_seqs=1)])


def test_exactly_one_window() -> None:
    (stream,) = streams_for([9], [Lane(seq_len=8, num_seqs=2)])
    assert draw(stream, 3) == [(0, 0)] * 6


@settings(max_examples=40, deadline=None)
@given(shard_lists, some_lanes, st.integers(0, 9), st.integers(0, 3))
def test_state_goes_in_and_out(shard_tokens, lanes, before: int, seed: int) -> None:
    assume(fits(shard_tokens, lanes))
    for stream, fresh in zip(
        streams_for(shard_tokens, lanes, seed), streams_for(shard_tokens, lanes, seed), strict=True
    ):
        draw(stream, before)
        state = stream.state()
        expected = draw(stream, 7)
        draw(fresh, 2)
        fresh.restore(state)
        assert draw(fresh, 7) == expected
        assert fresh.state() == stream.state()
        stream.restore(state)
        assert draw(stream, 7) == expected
