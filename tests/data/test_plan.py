"""Plans of lanes over processes, against all assignments there are."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epigram.data.plan import plan_lanes
from epigram.errors import UserError

times_of = st.lists(st.one_of(st.integers(1, 9).map(float), st.floats(0.1, 100)), min_size=1, max_size=6)


def least_possible(times: list[float], world_size: int) -> float:
    """The smallest largest load over every assignment that gives each process a lane."""
    best = math.inf
    for owners in itertools.product(range(world_size), repeat=len(times)):
        if len(set(owners)) == world_size:
            best = min(best, max(math.fsum(t for t, o in zip(times, owners, strict=True) if o == r)
                                 for r in range(world_size)))  # fmt: skip
    return best


@given(times_of, st.data())
def test_the_slowest_process_is_as_fast_as_any_assignment_allows(times: list[float], data: st.DataObject):
    world_size = data.draw(st.integers(1, len(times)))
    plan = plan_lanes(times, world_size)
    assert len(plan.ranks) == world_size
    assert all(plan.ranks), "each has a lane"
    assert sorted(itertools.chain(*plan.ranks)) == list(range(len(times))), "each lane has one process"
    assert max(plan.loads) == pytest.approx(least_possible(times, world_size), rel=1e-8)
    assert plan == plan_lanes(list(times), world_size), "every process finds the same"
    assert plan.ranks == plan_lanes([1000 * time for time in times], world_size).ranks or len(set(times)) > 1
    assert 0 < plan.balance <= 1 + 1e-12
    assert plan.speedup == pytest.approx(plan.balance * world_size)
    assert [plan.rank_of(lane) for lanes in plan.ranks for lane in lanes] == [
        rank for rank, lanes in enumerate(plan.ranks) for _ in lanes
    ]


def test_a_case_in_which_the_longest_first_is_not_best():
    """Graham's own example: longest first gives 11, but 3 3 3 | 5 4 | 5 4 is 9."""
    plan = plan_lanes([5, 5, 4, 4, 3, 3, 3], 3)
    assert (max(plan.loads), plan.balance) == (9, 1)


@given(st.lists(st.floats(1, 2), min_size=40, max_size=60), st.integers(2, 9))
def test_many_lanes_are_shared_well_where_not_all_can_be_tried(times: list[float], world_size: int):
    plan = plan_lanes(times, world_size)
    assert sorted(itertools.chain(*plan.ranks)) == list(range(len(times)))
    assert max(plan.loads) <= 4 / 3 * max(math.fsum(times) / world_size, max(times))


def test_any_number_of_lanes_on_one_process():
    assert plan_lanes([1.0] * 5000, 1).ranks == (tuple(range(5000)),)
    assert plan_lanes([1.0] * 500, 2).balance == 1
    with pytest.raises(UserError, match="501 lanes are too many to share"):
        plan_lanes([1.0] * 501, 2)


def test_more_processes_than_lanes():
    with pytest.raises(UserError, match="2 lanes cannot be shared by 3 processes, each needs one: use 1 to 2 proc"):
        plan_lanes([1.0, 1.0], 3)
    with pytest.raises(UserError, match="use 1 process, or give the recipe more lanes"):
        plan_lanes([1.0], 2)
