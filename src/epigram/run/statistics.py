"""Is one side better than the other? Means, spreads and one-sided t-tests of scores, lower being better.

Seeds are the samples. Sides with the same seeds are compared pair by pair, others by Welch's test, which takes each
side's spread as it is; a published number, which has none, by the test of one sample. A single seed has no spread, and
equal scores have none either: both give a difference, but no winner. Sources: Student 1908; Welch 1947; the challenge's
rule for a record: better by at least 0.005 nats, p < 0.01.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mpmath

from epigram.errors import UserError

RECORD_NATS = 0.005
RECORD_P = 0.01
CONFIDENCE = 0.95
NO_SPREAD = "all seeds give the same difference: without spread there is nothing to test"
ROUNDING = 1e-12  # of the mean of equal scores


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Scores of one side. sd: of the sample (n - 1), None for one score. interval: of the mean, at CONFIDENCE."""

    num: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Ours against theirs. gain: by how much ours is lower. margin: what it is tested against.

    test: "paired", "welch", "one sample", or None where there is no spread to test with; then `reason` says why, and
    standard_error, df, t, p and interval are None. p: probability of a t at least as large if the true gain were
    `margin`. p_worse: that of one at most as small. interval: of the gain, two-sided, at CONFIDENCE.
    """

    gain: float
    margin: float
    test: str | None
    reason: str | None = None
    standard_error: float | None = None
    df: float | None = None
    t: float | None = None
    p: float | None = None
    p_worse: float | None = None
    interval: tuple[float, float] | None = None


def t_survival(t: float, df: float) -> float:
    """P(T >= t) of Student's distribution with `df` > 0 degrees of freedom, which need not be whole.

    By the regularized incomplete beta function: half of I(df / (df + t^2); df / 2, 1 / 2) for t >= 0.
    """
    tail = 0.5 * float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))
    return tail if t >= 0 else 1.0 - tail


def t_quantile(tail: float, df: float) -> float:
    """The t with P(T >= t) = `tail`, 0 < tail < 0.5, by bisection to the last bits of a float."""
    assert 0 < tail < 0.5
    low, high = 0.0, 1.0
    while t_survival(high, df) > tail:
        high *= 2
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if t_survival(middle, df) > tail else (low, middle)
    return high


def summarize(scores: Sequence[float]) -> Summary:
    """Mean, spread and confidence interval of at least one score."""
    mean = statistics.fmean(scores)
    if len(scores) < 2:
        return Summary(num=1, mean=mean, sd=None, interval=None)
    sd = statistics.stdev(scores)
    half = t_quantile((1 - CONFIDENCE) / 2, len(scores) - 1) * sd / math.sqrt(len(scores))
    return Summary(num=len(scores), mean=mean, sd=sd, interval=(mean - half, mean + half))


def compare(ours: Mapping[int, float], theirs: Mapping[int, float], margin: float = 0.0) -> Comparison:
    """Scores by seed, at least one a side. Paired where both sides have the same seeds, else by Welch's test."""
    if ours.keys() == theirs.keys() and len(ours) > 1:
        gain = statistics.fmean(theirs.values()) - statistics.fmean(ours.values())
        gains = [theirs[seed] - ours[seed] for seed in sorted(ours)]
        return _test("paired", gain, margin, statistics.stdev(gains) / math.sqrt(len(gains)), len(gains) - 1)
    return welch(list(ours.values()), list(theirs.values()), margin)


def welch(ours: Sequence[float], theirs: Sequence[float], margin: float = 0.0) -> Comparison:
    """Scores as independent samples, each side with its own spread, whichever seeds they have."""
    gain = statistics.fmean(theirs) - statistics.fmean(ours)
    if min(len(ours), len(theirs)) < 2:
        return Comparison(gain=gain, margin=margin, test=None, reason="one seed on a side has no spread")
    parts = [(statistics.variance(side) / len(side), len(side) - 1) for side in (ours, theirs)]
    total = sum(variance for variance, _ in parts)
    # Welch and Satterthwaite: the degrees of freedom of a sum of two variances.
    df = total**2 / sum(variance**2 / degrees for variance, degrees in parts) if total else 0.0
    return _test("welch", gain, margin, math.sqrt(total), df)


def record_to_beat(nats: float) -> float:
    """The mean of a record, in nats a token, as somebody typed it. Raises UserError for what no score can be."""
    if not 0 < nats < math.inf:
        raise UserError(f"the record to beat, {nats} nats a token, must be a positive number")
    return nats


def compare_with_number(ours: Sequence[float], number: float, margin: float = 0.0) -> Comparison:
    """Scores of several seeds against a published mean whose spread is not known."""
    gain = number - statistics.fmean(ours)
    if len(ours) < 2:
        return Comparison(gain=gain, margin=margin, test=None, reason="one seed has no spread")
    return _test("one sample", gain, margin, statistics.stdev(ours) / math.sqrt(len(ours)), len(ours) - 1)


def _test(test: str, gain: float, margin: float, standard_error: float, df: float) -> Comparison:
    if standard_error <= ROUNDING:  # runs that are copies, not samples
        return Comparison(gain=gain, margin=margin, test=None, reason=NO_SPREAD)
    t = (gain - margin) / standard_error
    half = t_quantile((1 - CONFIDENCE) / 2, df) * standard_error
    return Comparison(
        gain=gain,
        margin=margin,
        test=test,
        standard_error=standard_error,
        df=df,
        t=t,
        p=t_survival(t, df),
        p_worse=t_survival(-t, df),
        interval=(gain - half, gain + half),
    )
