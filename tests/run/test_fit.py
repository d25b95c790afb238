"""Finding steps whose file fits its cap, on simulated sizes and times: few tries, and none that is not affordable."""

import random
from collections.abc import Callable

import pytest

from epigram.quant.grid import gaussian_step, step_bits
from epigram.run.fit import MAX_TRIES, Search, Try, search

CODES = ((16_000_000, 4.2), (9_000_000, 3.9), (4_000_000, 5.3))  # number, and bits at factor 1
REST = 900_000  # bytes of what has no steps
Bits = Callable[[float, float], float]


def gaussian(bits: float, factor: float) -> float:
    return step_bits(gaussian_step(bits) * factor)


def heavy_tailed(bits: float, factor: float) -> float:
    """Loses a tenth less than Gaussian weights do."""
    return bits - 0.9 * (bits - gaussian(bits, factor))


def with_floors(bits: float, factor: float) -> float:
    """Only two rows of three have steps that grow."""
    return (bits + 2 * gaussian(bits, factor)) / 3


class Simulated:
    """Packs no file. bits: of a code, by those at factor 1 and the factor. took_s: of a try, at most 20 % more."""

    def __init__(self, bits: Bits = gaussian, took_s: float = 1.0, noise: float = 0.0, seed: int = 0) -> None:
        self._bits, self._took_s, self._noise, self._random = bits, took_s, noise, random.Random(seed)

    def __call__(self, factor: float) -> Try:
        off = 1 + self._noise * self._random.uniform(-1, 1)
        classes = tuple((count, self._bits(bits, factor) * off) for count, bits in CODES)
        size = REST + round(sum(count * bits / 8 for count, bits in classes))
        took_s = self._took_s * self._random.uniform(1.0, 1.2)
        return Try(factor=factor, total_bytes=size, classes=classes, took_s=took_s)


def found(make: Simulated, share: float, left_s: float = float("inf")) -> tuple[Search, int]:
    plain = make(1.0)
    cap = round(share * plain.total_bytes)
    return search(make, plain, cap, left_s), cap


@pytest.mark.parametrize("share", [0.999, 0.97, 0.9, 0.8, 0.75])
@pytest.mark.parametrize(
    ("bits", "noise", "most"),
    [(gaussian, 0.0, 1), (gaussian, 0.0004, 1), (heavy_tailed, 0.0005, 3), (with_floors, 0.0005, 4)],
)
def test_few_tries_end_close_under_the_cap(bits: Bits, noise: float, most: int, share: float) -> None:
    for seed in range(3):
        result, cap = found(Simulated(bits, noise=noise, seed=seed), share)
        assert result.best is not None and 0.997 * cap <= result.best.total_bytes <= cap
        assert result.best.factor == min(one.factor for one in result.tries if one.total_bytes <= cap)
        assert len(result.tries) <= most


@pytest.mark.parametrize("bits", [gaussian, heavy_tailed, with_floors])
@pytest.mark.parametrize("affordable", [0, 1, 2, 3])
def test_no_try_is_begun_that_might_not_be_done_in_time(bits: Bits, affordable: int) -> None:
    """The plain one took the same time, and each may take a fifth more than the shortest."""
    for seed in range(5):
        for share in (0.97, 0.85):
            left_s = affordable * 1.5 + 0.01  # 1.25 times the slowest of at most 1.2
            result, cap = found(Simulated(bits, noise=0.0005, seed=seed), share, left_s)
            assert sum(one.took_s for one in result.tries) <= left_s
            assert (len(result.tries) >= 1) == (affordable >= 1)
            if affordable == 0:
                assert result.no_time and result.best is None
            elif bits is not with_floors or affordable > 1:
                assert result.best is not None and 0.96 * cap < result.best.total_bytes <= cap


@pytest.mark.parametrize("share", [0.98, 0.9, 0.8])
def test_the_only_try_that_is_affordable_aims_lower(share: float) -> None:
    """So that weights which lose a tenth less than Gaussian ones do fit; with more time the first try is closer."""
    once, cap = found(Simulated(heavy_tailed), share, 1.51)
    rest = 1 / share - 1  # of the cap
    assert once.best is not None and len(once.tries) == 1
    assert (0.99 - 0.15 * rest) * cap < once.best.total_bytes <= cap
    more, _ = found(Simulated(heavy_tailed), share, 10.0)
    assert more.tries[0].total_bytes > cap >= more.tries[-1].total_bytes > 0.997 * cap


def test_a_cap_below_what_has_no_steps() -> None:
    """The widest steps are tried, then nothing more."""
    result, _ = found(Simulated(), 0.04)
    assert result == Search(best=None, tries=result.tries)
    assert [one.factor for one in result.tries] == [16.0]


def test_sizes_that_do_not_depend_on_the_steps() -> None:
    """As with a codec that stores a byte for every code."""
    result, _ = found(Simulated(lambda bits, factor: 8.0), 0.9)
    assert result.best is None and len(result.tries) < MAX_TRIES
