"""Lanes and length groups: every drawn window goes to exactly one lane."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epigram.data.lanes import Lane, length_groups
from epigram.errors import UserError

PUBLISHED = (Lane(seq_len=2048, num_seqs=36),) * 5 + (Lane(seq_len=6144, num_seqs=10),) * 3
lanes = st.lists(st.builds(Lane, seq_len=st.integers(1, 4), num_seqs=st.integers(1, 9)), min_size=1, max_size=9)


def test_the_published_step() -> None:
    short, long = length_groups(PUBLISHED)
    assert (short.lanes, short.num_windows, short.num_tokens) == ((0, 1, 2, 3, 4), 180, 368_640)
    assert (long.lanes, long.num_windows, long.num_tokens) == ((5, 6, 7), 30, 184_320)
    assert sum(lane.num_tokens for lane in PUBLISHED) == 552_960
    assert short.deal() == tuple(tuple(range(lane, 180, 5)) for lane in range(5))  # a stride, as published


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 300))
def test_parts_are_equal_and_as_few_as_fit(num_seqs: int, seq_len: int, most: int) -> None:
    lane = Lane(seq_len=seq_len, num_seqs=num_seqs)
    fitting = [n for n in range(1, num_seqs + 1) if num_seqs % n == 0 and num_seqs // n * seq_len <= most]
    assert lane.parts(most) == (fitting[0] if fitting else num_seqs)
    assert lane.parts(None) == 1


@given(lanes)
def test_each_window_goes_to_one_lane(lanes: list[Lane]) -> None:
    groups = length_groups(lanes)
    assert sorted(lane for group in groups for lane in group.lanes) == list(range(len(lanes)))
    assert len({group.seq_len for group in groups}) == len(groups)
    for group in groups:
        dealt = group.deal()
        assert sorted(place for places in dealt for place in places) == list(range(group.num_windows))
        assert [len(places) for places in dealt] == [lanes[lane].num_seqs for lane in group.lanes]
        assert all(lanes[lane].seq_len == group.seq_len for lane in group.lanes)


def test_unequal_lanes_take_turns() -> None:
    (group,) = length_groups([Lane(seq_len=8, num_seqs=1), Lane(seq_len=8, num_seqs=3)])
    assert group.deal() == ((0,), (1, 2, 3))


def test_impossible_lanes() -> None:
    with pytest.raises(UserError, match=r"seq_len = 0 .*; num_seqs = -1 "):
        Lane(seq_len=0, num_seqs=-1)
    with pytest.raises(UserError, match="at least one lane"):
        length_groups([])
