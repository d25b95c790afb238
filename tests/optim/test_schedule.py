"""Schedules at published points and by their properties."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epigram.errors import UserError
from epigram.optim.schedule import ScheduleConfig, lr_multiplier, mile_gamma, muon_momentum, qat_active, shortfalls

PUBLISHED = ScheduleConfig(warmdown_steps=4000, momentum_warmup_steps=1500, mile_peak=0.75, qat_threshold=0.15)


@st.composite
def configs(draw: st.DrawFn, warmup: bool = True) -> ScheduleConfig:
    by_steps = draw(st.booleans())
    return ScheduleConfig(
        warmdown_steps=draw(st.integers(1, 300)) if by_steps else 0,
        warmdown_frac=0.0 if by_steps else draw(st.floats(0.01, 1)),
        lr_warmup_steps=draw(st.integers(0, 20)) if warmup else 0,
        min_lr=draw(st.floats(0, 1)),
        momentum_warmup_steps=draw(st.integers(0, 100)),
    )


def _curve(config: ScheduleConfig, num_steps: int, step_s: float) -> list[float]:
    budget_s = num_steps * step_s
    return [lr_multiplier(min(k * step_s, budget_s), k, budget_s, config) for k in range(num_steps + 1)]


def test_published_curve() -> None:
    """Steps of 69.6 ms in 586 s: the warm-down starts near step 4420 and crosses 0.15 near step 7830."""

    def at(step: int) -> float:
        return lr_multiplier(step * 0.0696, step, 586.0, PUBLISHED)

    assert at(4400) == 1.0
    assert at(4430) == pytest.approx((586 / 0.0696 - 4430) / 4000)
    assert at(7800) > 0.15 > at(7830)
    assert not qat_active(at(7800), 7800, PUBLISHED)
    assert qat_active(at(7830), 7830, PUBLISHED)
    assert lr_multiplier(600.0, 8430, 586.0, PUBLISHED) == 0.0


@given(config=configs(warmup=False), num_steps=st.integers(1, 400), step_s=st.floats(1e-3, 10))
def test_starts_at_one_ends_at_the_minimum_and_never_rises(
    config: ScheduleConfig, num_steps: int, step_s: float
) -> None:
    curve = _curve(config, num_steps, step_s)
    assert curve[0] == 1.0
    assert curve[-1] == config.min_lr
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(curve))
    assert min(curve) >= config.min_lr


@given(config=configs(), num_steps=st.integers(1, 400), step_s=st.floats(1e-3, 10))
def test_time_driven_equals_step_driven_for_equal_steps(config: ScheduleConfig, num_steps: int, step_s: float) -> None:
    by_step = [lr_multiplier(k, k, num_steps, config) for k in range(num_steps + 1)]
    assert _curve(config, num_steps, step_s) == pytest.approx(by_step, abs=1e-6)


@given(config=configs(), num_steps=st.integers(50, 400))
def test_warmup_rises_linearly_and_then_changes_nothing(config: ScheduleConfig, num_steps: int) -> None:
    curve = _curve(config, num_steps, 1.0)
    without = _curve(replace(config, lr_warmup_steps=0), num_steps, 1.0)
    steps = config.lr_warmup_steps
    assert curve[steps:] == without[steps:]
    for k in range(steps):
        assert curve[k] == pytest.approx(without[k] * (k + 1) / steps)


def test_fraction_of_the_budget() -> None:
    config = ScheduleConfig(warmdown_frac=0.25, momentum_warmup_steps=0, min_lr=0.1)
    values = [lr_multiplier(t, 1, 200.0, config) for t in (0, 149, 150, 175, 194, 197, 200, 250)]
    assert values == pytest.approx([1, 1, 1, 0.5, 0.12, 0.1, 0.1, 0.1])


def test_constant_rate() -> None:
    config = ScheduleConfig(warmdown_frac=0.5, momentum_warmup_steps=0, min_lr=1.0)
    assert set(_curve(config, 30, 1.0)) == {1.0}


def test_momentum_ramp() -> None:
    assert muon_momentum(0, PUBLISHED) == 0.92
    assert muon_momentum(750, PUBLISHED) == pytest.approx(0.9525)
    assert muon_momentum(1500, PUBLISHED) == muon_momentum(9000, PUBLISHED) == pytest.approx(0.985)
    assert muon_momentum(0, replace(PUBLISHED, momentum_warmup_steps=0)) == pytest.approx(0.985)


def test_mile_triangle() -> None:
    values = [mile_gamma(q, PUBLISHED) for q in (0, 0.2, 0.4, 0.7, 1.0, 1.1)]
    assert values == pytest.approx([0, 0.375, 0.75, 0.375, 0, 0])
    assert mile_gamma(0.4, replace(PUBLISHED, mile_peak=0.0)) == 0


def test_quantization_aware_training_ignores_the_warmup() -> None:
    config = replace(PUBLISHED, lr_warmup_steps=100)
    first = lr_multiplier(0.0, 0, 586.0, config)
    assert first < config.qat_threshold
    assert not qat_active(first, 0, config)
    assert qat_active(0.1, 100, config)
    assert not qat_active(0.0, 8000, replace(config, qat_threshold=0.0))


def test_schedules_that_a_short_run_has_no_room_for() -> None:
    """The published system for 240 s on two GPUs: 1,141 steps instead of 8,430."""
    published = replace(PUBLISHED, made_for_steps=8430)
    rates, momentum = shortfalls(published, 1141)
    assert rates == (
        "schedule.warmdown_steps = 4,000 is longer than what the budget has time for, about 1,141 steps: the learning "
        "rates never reach their full values, but start at 28.5 %; try --set schedule.warmdown_steps=0 --set "
        "schedule.warmdown_frac=0.47, as in the 8,430 steps that the recipe was made for"
    )
    assert "momentum_warmup_steps = 1,500 is longer than what the budget has time for, about 1,141 steps:" in momentum
    assert "--set schedule.momentum_warmup_steps=203, as in the 8,430 steps" in momentum
    assert list(shortfalls(published, 8430)) == []
    rates, momentum = shortfalls(published, 4395)
    assert "is 91 % of what the budget has time for, about 4,395 steps: the learning rates are full for a" in rates
    assert "is 34.1 % of what the budget has time for" in momentum
    assert list(shortfalls(published, 4500)) == [], "a warm-down of 89 %, a rise of 33.3 %"
    rates, momentum = shortfalls(replace(PUBLISHED, min_lr=0.1), 40)
    assert "start at 10 %; try --set schedule.warmdown_steps=0 --set schedule.warmdown_frac=0.5" in rates
    assert momentum.endswith("try --set schedule.momentum_warmup_steps=6"), "a sixth, where the recipe says nothing"
    still = ScheduleConfig(warmdown_steps=4000, momentum_warmup_steps=1500, min_lr=1.0, momentum_start=0.985)
    assert list(shortfalls(still, 40)) == [], "nothing falls, nothing rises"
    assert list(shortfalls(replace(still, lr_warmup_steps=20), 40)) == []
    (rise,) = shortfalls(replace(still, lr_warmup_steps=21), 40)
    assert "schedule.lr_warmup_steps = 21 is more than half" in rise
    assert rise.endswith("--set schedule.lr_warmup_steps=2")


@given(config=configs(warmup=False), num_steps=st.integers(2, 400), made_for=st.integers(0, 500))
def test_what_is_said_of_a_short_run_is_so_and_what_is_advised_mends_it(
    config: ScheduleConfig, num_steps: int, made_for: int
) -> None:
    config = replace(config, made_for_steps=made_for)
    said = " ".join(shortfalls(config, num_steps))
    if start := re.search(r"start at ([\d.]+) %", said):
        begun = lr_multiplier(1e-9, 1, num_steps * 1e-9, config)  # after one step, when one still has its share
        assert begun < 1
        assert float(start[1]) / 100 == pytest.approx(max(begun, config.min_lr), abs=1e-3 + 1 / config.warmdown_steps)
    elif config.warmdown_steps and config.min_lr < 1:
        assert config.warmdown_steps <= num_steps
    advised = {key: float(value) for key, value in re.findall(r"--set schedule\.(\w+)=([\d.e-]+)", said)}
    if rise := advised.pop("momentum_warmup_steps", None):
        wanted = min(config.momentum_warmup_steps / made_for, 1) if made_for else 1 / 6
        assert wanted * num_steps - 1 < rise <= wanted * num_steps < config.momentum_warmup_steps
    if advised:
        mended = replace(config, warmdown_steps=0, warmdown_frac=advised["warmdown_frac"])
        assert "warmdown" not in " ".join(shortfalls(mended, num_steps))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "make exactly one of them positive"),
        ({"warmdown_steps": 10, "warmdown_frac": 0.5}, "warmdown_steps = 10 .* make exactly one"),
        ({"warmdown_frac": 1.5}, r"warmdown_frac = 1.5 is out of range: choose a number between 0 and 1"),
        ({"warmdown_steps": 10, "min_lr": 0.2, "qat_threshold": 0.15}, "never reached"),
        ({"warmdown_steps": 10, "momentum_end": 1.0, "min_lr": -1.0}, "min_lr.*; .*momentum_end"),
        ({"warmdown_steps": 10, "mile_peak_at": 1.0}, "mile_peak_at"),
    ],
)
def test_config_problems(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScheduleConfig(momentum_warmup_steps=100, **settings)
