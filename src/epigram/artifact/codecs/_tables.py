"""Numbers that an encoder and a decoder must compute alike on every machine.

Logarithms and error functions differ in their last bit from one C library to another, and one bit is enough
to turn the rest of a stream into noise. So everything here is made of integers, or of the operations that
IEEE 754 rounds exactly (+ - * / on float64, one element at a time, no sums over an axis).
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

LOG_ONE = 1024  # fixed-point unit of logarithms: one octave
LEVELS_PER_OCTAVE = 8  # of variance
NUM_LEVELS = 26 * LEVELS_PER_OCTAVE  # variances of codes from 2**-12 to 2**14
TABLE_TOTAL = 1 << 17  # sum of a level's table, about

_LOWEST_EXPONENT = -12
_MANTISSA_BITS = 52
_SUBLEVEL_BITS = 3
_FIRST_LEVEL = (1023 + _LOWEST_EXPONENT) << _SUBLEVEL_BITS
_LOG_INDEX_BITS = 10
_NODES = 8  # subintervals of the integral over one code

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@cache
def _log2_table() -> Ints:
    """round(LOG_ONE * log2(1 + (i + 1/2) / 2**10)), bit by bit: squaring a number doubles its logarithm."""
    result = []
    for i in range(1 << _LOG_INDEX_BITS):
        value, one, log = (2 * i + 1 + (2 << _LOG_INDEX_BITS)) << (62 - _LOG_INDEX_BITS - 1), 1 << 62, 0
        for _ in range(11):
            value, log = value * value >> 62, 2 * log
            if value >= 2 * one:
                value, log = value >> 1, log + 1
        result.append((log + 1) // 2)
    return np.array(result, np.int64)


@cache
def _exp2_table() -> Floats:
    """2**(i / LOG_ONE) for i = 0 .. LOG_ONE - 1, to 60 bits, then rounded to float64."""
    root = 2 << 120
    for _ in range(10):
        root = math.isqrt(root << 120)
    value, result = 1 << 120, []
    for _ in range(LOG_ONE):
        result.append(float(value >> 60) / float(1 << 60))
        value = value * root >> 120
    return np.array(result)


def log2(values: Floats) -> Ints:
    """LOG_ONE * log2 of finite values > 0, to about half a unit."""
    bits = values.view(np.int64)
    index = bits >> (_MANTISSA_BITS - _LOG_INDEX_BITS) & (1 << _LOG_INDEX_BITS) - 1
    return ((bits >> _MANTISSA_BITS) - 1023) * LOG_ONE + _log2_table()[index]


def exp2(logs: Ints) -> Floats:
    """2**(logs / LOG_ONE), for results between 2**-500 and 2**500."""
    return np.ldexp(_exp2_table()[logs % LOG_ONE], (logs // LOG_ONE).astype(np.int32))


def levels(variances: Floats) -> Ints:
    """The level, 0 to NUM_LEVELS - 1, of each variance >= 0: exponent and top bits of the mantissa."""
    found = (variances.view(np.int64) >> (_MANTISSA_BITS - _SUBLEVEL_BITS)) - _FIRST_LEVEL
    return np.clip(found, 0, NUM_LEVELS - 1)


def _exp_minus(values: Floats) -> Floats:
    """exp(-values) for 0 <= values <= 60, from a Taylor polynomial and ten squarings."""
    small = values / 1024.0
    result = np.ones_like(small)
    for divisor in (7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0):
        result = 1.0 - small / divisor * result
    for _ in range(10):
        result = result * result
    return result


def _density_integral(variance: Floats, qmax: int) -> Floats:
    """(levels, 2 qmax + 1): a Gaussian's mass between k - 1/2 and k + 1/2 by Simpson's rule, unnormalised."""
    codes = np.arange(-qmax, qmax + 1).astype(np.float64)
    mass = np.zeros((len(variance), len(codes)))
    for node in range(_NODES + 1):
        weight = 1.0 if node in (0, _NODES) else 4.0 if node % 2 else 2.0
        place = codes + (node / _NODES - 0.5)
        mass = mass + weight * _exp_minus(np.minimum(place * place / (2.0 * variance[:, None]), 60.0))
    return mass / (3.0 * _NODES)


@cache
def gaussian_tables(qmax: int) -> Ints:
    """How often each code is expected at each level: positive integers (NUM_LEVELS, 2 qmax + 1).

    A row sums to about TABLE_TOTAL. A code is a rounded Gaussian, clipped at qmax; its variance is 1/12 above
    that of the Gaussian. Below a variance of 1/4 nearly all codes are 0, 1 or -1, and the variance is the
    share of the ones.
    """
    level = np.arange(NUM_LEVELS)
    mantissa = 1.0 + (level % LEVELS_PER_OCTAVE + 0.5) / LEVELS_PER_OCTAVE
    variance = np.ldexp(mantissa, (level // LEVELS_PER_OCTAVE + _LOWEST_EXPONENT).astype(np.int32))
    inner = np.maximum(variance - 1.0 / 12.0, 1.0 / 6.0)
    mass = _density_integral(inner, qmax) / np.sqrt(2.0 * np.pi * inner)[:, None]
    tail = np.ones(NUM_LEVELS)
    for code in range(2 * qmax + 1):  # one after the other: a sum's order would be the library's choice
        tail = tail - mass[:, code]
    mass[:, 0] += np.maximum(tail, 0.0) / 2.0
    mass[:, -1] += np.maximum(tail, 0.0) / 2.0
    sparse = variance < 0.25
    mass[sparse] *= variance[sparse, None]  # what is beyond one is rarer still
    mass[sparse, qmax] = 1.0 - variance[sparse]
    mass[sparse, qmax - 1] = mass[sparse, qmax + 1] = variance[sparse] / 2.0
    return np.maximum(np.floor(mass * TABLE_TOTAL), 1.0).astype(np.int64)
