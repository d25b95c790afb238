"""Student's t against printed tables, and the tests against sums done by hand."""

import math

import pytest

from epigram.run.statistics import compare, compare_with_number, summarize, t_quantile, t_survival

# (degrees of freedom, one-sided tail, t) as every table of Student's distribution prints them, to three decimals
TABLE = [
    (1, 0.05, 6.314), (1, 0.025, 12.706), (2, 0.05, 2.920), (2, 0.01, 6.965), (3, 0.005, 5.841), (4, 0.10, 1.533),
    (4, 0.025, 2.776), (5, 0.001, 5.893), (10, 0.01, 2.764), (30, 0.05, 1.697), (120, 0.025, 1.980),
]  # fmt: skip
PUBLISHED = [1.87306, 1.87423, 1.87456, 1.87733, 1.87849]  # five seeds of parameter-golf #1212, nats


@pytest.mark.parametrize(("df", "tail", "t"), TABLE)
def test_the_printed_tables(df: int, tail: float, t: float):
    assert t_quantile(tail, df) == pytest.approx(t, abs=5e-4)
    assert t_survival(t, df) == pytest.approx(tail, rel=2e-3)
    assert t_survival(-t, df) == pytest.approx(1 - tail, rel=2e-3)


@pytest.mark.parametrize("t", [-3.0, -0.2, 0.0, 0.7, 4.0, 50.0])
def test_closed_forms(t: float):
    """One degree of freedom is Cauchy's distribution, two have an algebraic tail."""
    assert t_survival(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-14)
    assert t_survival(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-14)


def test_degrees_that_are_not_whole():
    """Against the density integrated by Simpson's rule."""
    df, t, steps, end = 2.7, 1.3, 200_000, 4000.0
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    low, high = math.log(t), math.log(end)  # in the logarithm, since the tail is long
    width = (high - low) / steps

    def density(u: float) -> float:
        x = math.exp(u)
        return x * scale * (1 + x * x / df) ** (-(df + 1) / 2)

    inner = sum((4 if i % 2 else 2) * density(low + i * width) for i in range(1, steps))
    integral = (density(low) + density(high) + inner) * width / 3
    assert t_survival(t, df) == pytest.approx(integral, abs=1e-8)


def test_the_published_seeds_against_the_record_of_their_day():
    """Mean 1.87554, sd 0.00228, t = 1.61 on 4 degrees of freedom: one-sided p about 0.09."""
    found = compare_with_number(PUBLISHED, 1.88218, margin=0.005)
    assert summarize(PUBLISHED).mean == pytest.approx(1.875534, abs=1e-6)
    assert summarize(PUBLISHED).sd == pytest.approx(0.00228, abs=5e-6)
    assert (found.t, found.df) == (pytest.approx(1.61, abs=0.01), 4)
    assert found.p == pytest.approx(0.09, abs=0.005)


def test_interval_of_a_mean():
    found = summarize([1.0, 2.0, 3.0])
    assert found.sd == 1.0
    assert found.interval == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    assert summarize([1.5]).sd is None


def test_pairs_remove_what_the_seeds_share():
    theirs = {1: 1.10, 2: 1.30, 3: 1.50}
    ours = {3: 1.48, 1: 1.09, 2: 1.27}  # gains 0.01, 0.03, 0.02
    found = compare(ours, theirs)
    assert found.test == "paired"
    assert found.gain == pytest.approx(0.02)
    assert found.t == pytest.approx(0.02 / (0.01 / math.sqrt(3)))
    assert found.p == pytest.approx(0.5 - found.t / (2 * math.sqrt(2 + found.t**2)), rel=1e-9)
    assert found.p < 0.05
    apart = compare({seed + 10: value for seed, value in ours.items()}, theirs)
    assert apart.test == "welch"
    assert apart.p > 0.4  # the spread between seeds hides the gain


def test_welch_with_unequal_spread():
    """Variances 1 and 4 over 2 and 3: s^2 = 11/6; degrees (11/6)^2 / (1/4 + (4/3)^2 / 2)."""
    found = compare({1: 1 - math.sqrt(0.5), 2: 1 + math.sqrt(0.5)}, {3: 3.0, 4: 5.0, 5: 7.0})
    assert found.gain == pytest.approx(4.0)
    assert found.standard_error == pytest.approx(math.sqrt(11 / 6))
    assert found.df == pytest.approx((11 / 6) ** 2 / (0.25 + 8 / 9))
    assert found.p + found.p_worse == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ours", "theirs"), [({1: 1.0}, {1: 2.0}), ({1: 1.0, 2: 1.1}, {1: 2.0}), ({1: 1.0, 2: 1.1}, {1: 2.0, 2: 2.1})]
)
def test_without_spread_nothing_is_tested(ours: dict, theirs: dict):
    found = compare(ours, theirs)
    assert found.test is None
    assert found.p is None
    assert found.reason
    assert found.gain > 0.9
