"""Comparing a figure that is claimed with one that is known."""

import math

ROUNDED = 5e-5  # scores are often given with four digits


def is_number(value: object) -> bool:
    """A finite one: 1e999 is JSON, and infinite; so is an integer of 400 digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def agrees(said: object, known: float, tolerance: float = 0.0) -> bool:
    """Whether `said` is a number, and `known` within `tolerance`."""
    return is_number(said) and abs(float(str(said)) - known) <= tolerance


def figure(value: object) -> str:
    return f"{value:,}" if is_number(value) else repr(value)
