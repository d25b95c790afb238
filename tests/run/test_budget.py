"""The clock: what counts, on whose watch, and that counted and recorded time make runs repeatable."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import assert_same_training, losses_of, result_of, saved_tensors, train_run

from epigram.config import BudgetConfig
from epigram.errors import UserError
from epigram.run import budget
from epigram.run.budget import (
    CLOCK_FILE,
    RecordedClock,
    WallClock,
    make_clock,
    not_counted,
    read_clock,
    timed,
    write_clock,
)


class FakeTime:
    """Stands in for the module `time`; it passes only by `sleep`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def fake(monkeypatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(budget, "time", fake)
    return fake


def test_wall_clock_counts_from_its_start_and_from_an_earlier_run(fake):
    clock = WallClock()
    fake.sleep(5)
    clock.start()
    fake.sleep(2.5)
    assert clock.elapsed_s(7) == 2.5
    clock.start(40.0)
    fake.sleep(1)
    assert clock.elapsed_s(0) == 41.0


def test_pauses_do_not_count_on_any_of_the_clocks(fake):
    first, second, untouched = WallClock(), WallClock(), WallClock()
    for clock in (first, second, untouched):
        clock.start()
    fake.sleep(1)
    with not_counted(first, second):
        fake.sleep(30)
    with suppress(RuntimeError), not_counted(first, second):
        fake.sleep(30)
        raise RuntimeError
    fake.sleep(1)
    assert (first.elapsed_s(0), second.elapsed_s(0), untouched.elapsed_s(0)) == (2.0, 2.0, 62.0)


def test_timed_adds_up_also_when_the_work_fails(fake):
    times = {"pack_s": 1.0}
    with suppress(ValueError), timed(times, "pack_s"):
        fake.sleep(0.5)
        raise ValueError("full")
    assert times == {"pack_s": 1.5}


@given(st.floats(0.01, 5000), st.integers(1, 20_000))
def test_counted_clock_gives_exactly_so_many_steps(train_s: float, steps: int):
    """372.811180955081 * 797 / 797 is less than what it began with: a step too many, once."""
    config = BudgetConfig(train_s=train_s, calibrate_s=0.0, clock="steps", steps=steps)
    clock = make_clock(config)
    assert clock.elapsed_s(0) == 0
    assert clock.elapsed_s(steps - 1) < config.optimize_s
    assert clock.elapsed_s(steps) == config.optimize_s
    assert clock.elapsed_s(steps + 1) == float("inf")
    assert clock.elapsed_s(steps // 3) == pytest.approx(config.optimize_s * (steps // 3) / steps, rel=1e-12)


def test_counted_clock_cannot_be_moved():
    clock = RecordedClock([0.0, 0.5])
    clock.start(100.0)
    clock.skip(100.0)
    assert [clock.elapsed_s(step) for step in range(3)] == [0.0, 0.5, float("inf")]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50).map(sorted))
def test_a_recorded_clock_is_read_back_to_the_bit(tmp_path_factory, times_s: list[float]):
    run = tmp_path_factory.mktemp("clock")
    write_clock(run, times_s)
    assert read_clock(run) == times_s
    assert [path.name for path in run.iterdir()] == [CLOCK_FILE]
    config = BudgetConfig(train_s=9.0, calibrate_s=0.0, clock="replay", replay=str(run))
    assert [make_clock(config).elapsed_s(step) for step in range(len(times_s))] == times_s


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 12,
        np.array([0.0, np.nan]).tobytes(),
        np.array([0.0, 2.0, 1.0]).tobytes(),
        np.array([-1.0]).tobytes(),
    ],
)
def test_a_damaged_clock_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / CLOCK_FILE).write_bytes(content)
    with pytest.raises(UserError, match="give .*run folder"):
        read_clock(tmp_path)


def test_a_replayed_run_is_the_run_again(data_path: Path, tmp_path: Path):
    """Steps, losses, weights, moments and averages: all to the bit, though the clock of the first was the wall."""
    wall = ("budget.clock=wall", "budget.steps=0", "budget.train_s=1.0", "budget.calibrate_s=0.4")
    train_run(data_path, tmp_path / "wall", *wall, until="train")
    replay = ("budget.clock=replay", "budget.steps=0", f"budget.replay={tmp_path / 'wall'}", *wall[2:])
    train_run(data_path, tmp_path / "replay", *replay, until="train")
    assert result_of(tmp_path / "wall")["steps"] >= 1
    assert losses_of(tmp_path / "wall") == losses_of(tmp_path / "replay")
    assert_same_training(tmp_path / "wall", tmp_path / "replay")
    assert read_clock(tmp_path / "replay") == read_clock(tmp_path / "wall")


def test_one_seed_is_one_run(data_path: Path, finished: Path, tmp_path: Path):
    train_run(data_path, tmp_path / "again", until="train")
    assert_same_training(finished, tmp_path / "again")
    assert losses_of(finished) == losses_of(tmp_path / "again")
    train_run(data_path, tmp_path / "other", "seed=2", until="train")
    assert not torch.equal(
        saved_tensors(finished)["model.banks.qkv"], saved_tensors(tmp_path / "other")["model.banks.qkv"]
    )
    assert set(losses_of(finished)).isdisjoint(losses_of(tmp_path / "other"))
