"""Comparing a figure that is claimed with one that is known."""

import math
from typing import TypeGuard

ROUNDED = 5e-5  # scores are often given with four digits
_LEAST, _MOST = 1e-6, 1e6  # of a score: squares of differences between such neither vanish nor overflow


def is_number(value: object) -> TypeGuard[int | float]:
    """A finite one: 1e999 is JSON, and infinite; so is an integer of 400 digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_score(value: object) -> bool:
    """Whether it can be nats a token or bits per byte: a number above 0, of a size that statistics can be made of."""
    return is_number(value) and _LEAST < value < _MOST


def agrees(said: object, known: float, tolerance: float = 0.0) -> bool:
    """Whether `said` is a number, and `known` within `tolerance`."""
    return is_number(said) and abs(float(said) - known) <= tolerance


def figure(value: object) -> str:
    return f"{value:,}" if is_number(value) else repr(value)
