"""Every target in exactly one window, with the promised context, whatever the sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epigram.errors import UserError
from epigram.evaluation.windows import EvalConfig, Method, batch_size, batches, plan_windows, rank_share

sizes = st.tuples(st.integers(1, 700), st.integers(1, 90)).flatmap(
    lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), st.integers(1, pair[1]))
)


def times_scored(plan, num_targets):
    counter = np.zeros(num_targets, dtype=int)
    for first, end in zip(plan.first_scored, plan.end, strict=True):
        counter[first:end] += 1
    return counter


@given(sizes)
def test_every_target_is_scored_once(drawn):
    num_targets, seq_len, stride = drawn
    plan = plan_windows(num_targets, seq_len, stride)
    assert times_scored(plan, num_targets).tolist() == [1] * num_targets


@given(sizes)
def test_every_window_is_as_long_as_can_be_and_inside_the_stream(drawn):
    num_targets, seq_len, stride = drawn
    plan = plan_windows(num_targets, seq_len, stride)
    assert set(plan.end - plan.start) == {min(seq_len, num_targets)} == {plan.length}
    assert plan.start[0] == 0
    assert plan.end[-1] == num_targets
    assert np.all(np.diff(plan.start) <= stride)


@given(sizes)
def test_no_target_has_less_context_than_promised(drawn):
    """All tokens before it in the first window, at least seq_len - stride of them beyond."""
    num_targets, seq_len, stride = drawn
    plan = plan_windows(num_targets, seq_len, stride)
    context = plan.first_scored - plan.start
    assert context[0] == 0
    assert np.all(context[1:] >= seq_len - stride)


def test_published_sizes_leave_no_target_twice():
    """62,017,536 targets at 6144 / 128: #1212 had 47 windows more, all for the last 128 targets."""
    plan = plan_windows(62_017_536, 6144, 128)
    assert len(plan) == 484_512 - 47
    assert int((plan.end - plan.first_scored).sum()) == 62_017_536


def test_blocks_do_not_overlap_but_for_the_last():
    plan = plan_windows(10, 4, 4)
    assert list(zip(plan.start, plan.first_scored, plan.end, strict=True)) == [
        (0, 0, 4),
        (4, 4, 8),
        (6, 8, 10),
    ]


@given(sizes, st.integers(1, 12), st.integers(1, 400))
def test_ranks_and_batches_partition_the_plan(drawn, world_size, batch_tokens):
    num_targets, seq_len, stride = drawn
    plan = plan_windows(num_targets, seq_len, stride)
    size = batch_size(len(plan), plan.length, world_size, batch_tokens)
    assert size == 1 or size * plan.length <= batch_tokens
    counter = np.zeros(num_targets, dtype=int)
    shares = [rank_share(plan, rank, world_size) for rank in range(world_size)]
    for share in shares:
        parts = list(batches(share, size))
        assert all(len(part) == size for part in parts[:-1])
        for part in parts:
            counter += times_scored(part, num_targets)
    assert counter.tolist() == [1] * num_targets
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("num_targets", "seq_len", "stride", "words"),
    [
        (9, 4, 5, "use a stride of at most 4"),
        (9, 4, 0, "stride = 0"),
        (9, 0, 1, "seq_len = 0"),
        (0, 4, 4, "two tokens"),
    ],
)
def test_impossible_sizes_are_refused(num_targets, seq_len, stride, words):
    with pytest.raises(UserError, match=words):
        plan_windows(num_targets, seq_len, stride)


def test_config_reports_all_problems_at_once():
    with pytest.raises(UserError) as caught:
        EvalConfig(seq_len=128, stride=256, methods=("blocks", "windows"), batch_tokens=64)
    for words in ("stride = 256", "'windows'", "batch_tokens = 64", "; "):
        assert words in str(caught.value)


@pytest.mark.parametrize("methods", [(), ("blocks", "blocks")])
def test_config_refuses_no_or_repeated_methods(methods):
    with pytest.raises(UserError, match="methods"):
        EvalConfig(seq_len=128, stride=32, methods=methods)


def test_methods_of_a_config():
    config = EvalConfig(seq_len=128, stride=32)
    assert config.method("blocks") == Method(name="blocks", seq_len=128, stride=128)
    assert config.method("sliding") == Method(name="sliding", seq_len=128, stride=32)
    with pytest.raises(UserError, match="choose from blocks, sliding"):
        config.method("everything")
    with pytest.raises(UserError, match="stride = seq_len"):
        Method(name="blocks", seq_len=128, stride=32)
