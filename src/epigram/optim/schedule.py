"""Learning rate, momentum, loss weighting and quantization-aware training as functions of time.

All are pure. The clock that drives them is the caller's: seconds against a budget of seconds, a recorded
clock, or steps against a number of steps (pass the step as the elapsed time and the number of steps as the
budget).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from epigram.optim.base import outside, refuse

LONGEST_WARMDOWN, LONGEST_RISE = 0.9, 1 / 3
"""Shares of a run beyond which a warm-down, and the rise of the momentum, are taken for a mistake, unless the recipe
was made for them."""
_NEARLY = 1.05  # times the share that the recipe was made for: still what its author meant
_USUAL_WARMDOWN, _USUAL_RISE = 0.5, 1 / 6  # of a run, where the recipe does not say how many steps it was made for


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Settings of the schedules. In parameter-golf #1212: warmdown_steps 4000, momentum_warmup_steps 1500,
    mile_peak 0.75.

    warmdown_steps: length of the warm-down in steps of mean duration. warmdown_frac: its length as a fraction
    of the budget. Exactly one of the two is positive; for a constant learning rate set min_lr = 1.
    lr_warmup_steps: steps over which the learning rate rises to its peak. min_lr: afterwards it never falls
    below this share of it. momentum_*: of Muon, rising linearly. mile_peak: the highest gamma of the MiLe
    loss (0 turns it off), reached at progress mile_peak_at. qat_threshold: quantization-aware training is on
    once the warm-down's multiplier is below it; 0 is never. made_for_steps: of the run for which what counts in
    steps was chosen, 0 if that is not known; it changes no step, but what `shortfalls` advises.
    """

    warmdown_steps: int = 0
    warmdown_frac: float = 0.0
    lr_warmup_steps: int = 0
    min_lr: float = 0.0
    momentum_start: float = 0.92
    momentum_end: float = 0.985
    momentum_warmup_steps: int
    mile_peak: float = 0.0
    mile_peak_at: float = 0.4
    qat_threshold: float = 0.0
    made_for_steps: int = 0

    def __post_init__(self) -> None:
        problems = []
        if (self.warmdown_steps > 0) == (self.warmdown_frac > 0):
            problems.append(
                f"schedule.warmdown_steps = {self.warmdown_steps} and schedule.warmdown_frac = "
                f"{self.warmdown_frac}: make exactly one of them positive and the other 0"
            )
        for name in ("warmdown_steps", "lr_warmup_steps", "momentum_warmup_steps", "mile_peak", "made_for_steps"):
            problems += outside(f"schedule.{name}", getattr(self, name), 0)
        for name in ("warmdown_frac", "min_lr", "qat_threshold"):
            problems += outside(f"schedule.{name}", getattr(self, name), 0, 1)
        for name in ("momentum_start", "momentum_end"):
            problems += outside(f"schedule.{name}", getattr(self, name), 0, 0.9999)
        problems += outside("schedule.mile_peak_at", self.mile_peak_at, 0.001, 0.999)
        if 0 < self.qat_threshold <= self.min_lr:
            problems.append(
                f"schedule.qat_threshold = {self.qat_threshold} is never reached with schedule.min_lr = "
                f"{self.min_lr}: raise the first above the second, or set it to 0"
            )
        refuse(problems)


def lr_multiplier(elapsed_s: float, step: int, budget_s: float, config: ScheduleConfig) -> float:
    """Factor of every base learning rate at `step`, after `elapsed_s` of a budget of `budget_s` seconds.

    1 until the remaining time is that of the warm-down, then linear to 0 at the end of the budget, never
    below min_lr; during the first lr_warmup_steps times (step + 1) / lr_warmup_steps. A warm-down longer than
    the budget starts below 1 from step 1 on. Source: parameter-golf #1212; min_lr #1787.
    """
    warmup = 1.0
    if step < config.lr_warmup_steps:
        warmup = (step + 1) / config.lr_warmup_steps
    return warmup * max(_warmdown(elapsed_s, step, budget_s, config), config.min_lr)


def _warmdown(elapsed_s: float, step: int, budget_s: float, config: ScheduleConfig) -> float:
    assert budget_s > 0
    assert min(elapsed_s, step) >= 0
    if config.warmdown_steps:
        warmdown_s = config.warmdown_steps * elapsed_s / max(step, 1)
    else:
        warmdown_s = config.warmdown_frac * budget_s
    remaining_s = max(budget_s - elapsed_s, 0.0)
    return 1.0 if remaining_s > warmdown_s else remaining_s / warmdown_s


def muon_momentum(step: int, config: ScheduleConfig) -> float:
    """Muon's momentum at `step`: linear from momentum_start to momentum_end, then constant."""
    done = min(step / config.momentum_warmup_steps, 1.0) if config.momentum_warmup_steps else 1.0
    return config.momentum_start + (config.momentum_end - config.momentum_start) * done


def mile_gamma(progress: float, config: ScheduleConfig) -> float:
    """Exponent of the MiLe loss at `progress` (elapsed / budget): a triangle 0, mile_peak, 0.

    Source: parameter-golf #1130.
    """
    peak_at = config.mile_peak_at
    height = progress / peak_at if progress < peak_at else 1 - (progress - peak_at) / (1 - peak_at)
    return config.mile_peak * max(height, 0.0)


def qat_active(multiplier: float, step: int, config: ScheduleConfig) -> bool:
    """Whether quantization-aware training is on at the learning rate `multiplier` of `step`.

    The small multipliers of a learning rate warm-up do not count.
    """
    return step >= config.lr_warmup_steps and multiplier < config.qat_threshold


def shortfalls(config: ScheduleConfig, num_steps: int) -> Iterator[str]:
    """Schedules that count more steps than `num_steps`, those of the whole budget, have room for: in sentences, each
    with the settings that mend it.

    A warm-down longer than LONGEST_WARMDOWN of the run leaves the rates below their full values nearly all the time,
    and a rise longer than LONGEST_RISE the momentum, unless the recipe was made for about that share. Nothing is
    said of a warm-down that is given as a share: it is what was asked for in a run of any length.
    """
    assert num_steps >= 1
    room = f"what the budget has time for, about {num_steps:,} steps"
    whole = config.made_for_steps
    made_for = f", as in the {whole:,} steps that the recipe was made for" if whole else ""
    warmdown, rise = config.warmdown_steps, config.momentum_warmup_steps
    share = min(warmdown / whole, 1.0) if whole else _USUAL_WARMDOWN
    if warmdown > _limit(LONGEST_WARMDOWN, share) * num_steps and config.min_lr < 1:
        if warmdown > num_steps:
            start = _percent(max(num_steps / warmdown, config.min_lr))
            trouble = f"longer than {room}: the learning rates never reach their full values, but start at {start}"
        else:
            trouble = f"{_percent(warmdown / num_steps)} of {room}: the learning rates are full for a short while only"
        yield (
            f"schedule.warmdown_steps = {warmdown:,} is {trouble}; try --set schedule.warmdown_steps=0 "
            f"--set schedule.warmdown_frac={share:.2g}{made_for}"
        )
    if 2 * config.lr_warmup_steps > num_steps:
        yield (
            f"schedule.lr_warmup_steps = {config.lr_warmup_steps:,} is more than half of {room}: the learning rates "
            f"rise nearly all the time; try --set schedule.lr_warmup_steps={num_steps // 20}"
        )
    share = min(rise / whole, 1.0) if whole else _USUAL_RISE
    if rise > _limit(LONGEST_RISE, share) * num_steps and config.momentum_start != config.momentum_end:
        size = "longer than" if rise > num_steps else f"{_percent(rise / num_steps)} of"
        yield (
            f"schedule.momentum_warmup_steps = {rise:,} is {size} {room}: Muon's momentum rises for too long; "
            f"try --set schedule.momentum_warmup_steps={int(share * num_steps)}{made_for}"
        )


def _limit(usual: float, share: float) -> float:
    """Of a run, what is not yet too much for a recipe made for `share` of it: never more than the whole run."""
    return min(max(usual, _NEARLY * share), 1.0)


def _percent(share: float) -> str:
    """Rounded down: what is less than all does not look like all."""
    return f"{math.floor(1000 * share) / 10:g} %"
