"""How far the codes of a matrix spread, by row and by column: what the entropy codec knows before it looks.

In trained matrices the codes are as good as independent Gaussians once each row and each column has its own
spread: variance[r, c] = a[r] * b[c]. (In a model of pr1212's shapes, trained on one H100, dividing by both
leaves a kurtosis of 3.00 and no correlation with the neighbours above, to the left, or in the layer before.)
The encoder measures a and sends it; b starts from a guess and is learned from the rows as they go by. A good
guess is often there: the columns of a down-projection belong to the neurons that are the rows of the
up-projection (correlation 0.99 in the logarithm), and columns that read the residual stream repeat from
matrix to matrix.

Measuring (`describe`) is the encoder's own affair and uses floating point freely. Everything else runs on
both sides and is exact: see `_tables`. Logarithms are to base 2, of variances, in units of 1/LOG_ONE.
"""

import struct
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epigram.artifact.codecs._tables import LOG_ONE, Floats, Ints, exp2, log2
from epigram.artifact.codecs.base import Codes, Layout
from epigram.errors import ArtifactError

ROW_SYMBOLS = 128  # a row's spread as a step from the matrix's base, or "all zero"
ZERO_ROW = ROW_SYMBOLS - 1
NO_SOURCE = 0xFF
MAX_PROFILE = 1 << 16  # longer ones are not kept

_MIDDLE = ROW_SYMBOLS // 2
_STEP = LOG_ONE // 4  # an eighth of an octave of standard deviation
_STRENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)  # rows that the guess counts for
_GAIN_ONE = 16
_MAX_LOG = 16 * LOG_ONE
_FIXED = float(1 << 24)  # unit of the column sums
_PACKED = struct.Struct("<BbBBh")

RowSymbols = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is sent about a matrix beside its rows' spreads.

    source: the profile (see `Profiles`) that the columns' guess follows, or NO_SOURCE for equal columns.
    gain: sixteenths of the profile's logarithms that are believed. strength: index into the rows that the
    guess counts for. stride: eighths of an octave between two steps of a row's spread. base: the spread of
    the middle step.
    """

    source: int
    gain: int
    strength: int
    stride: int
    base: int

    BYTES = _PACKED.size

    def pack(self) -> bytes:
        return _PACKED.pack(self.source, self.gain, self.strength, self.stride, self.base)

    @classmethod
    def unpack(cls, data: bytes, start: int) -> "Description":
        """Raises ArtifactError for values that no encoder writes."""
        source, gain, strength, stride, base = _PACKED.unpack_from(data, start)
        if strength >= len(_STRENGTHS) or not 1 <= stride <= 8:
            raise ArtifactError("an entropy section describes a matrix in impossible terms")
        return cls(source=source, gain=gain, strength=strength, stride=stride, base=base)


class Profiles:
    """Spreads of the rows and the columns of the latest matrices, of weights (not codes), latest first.

    Two a matrix, so that 255 of them reach from a down-projection back to the same layer's up-projection
    in models of up to sixty layers.
    """

    def __init__(self) -> None:
        self._latest: deque[NDArray[np.int16]] = deque(maxlen=NO_SOURCE)

    def add(self, logs: Ints) -> None:
        """Remember `logs`, less their mean."""
        if 0 < len(logs) <= MAX_PROFILE:
            centred = np.clip(logs - int(logs.sum()) // len(logs), -_MAX_LOG, _MAX_LOG)
            self._latest.appendleft(centred.astype(np.int16))

    def get(self, source: int, length: int) -> Ints:
        """Raises ArtifactError unless there is such a profile of that length."""
        if source >= len(self._latest) or len(self._latest[source]) != length:
            raise ArtifactError("an entropy section refers to a matrix that is not there")
        return self._latest[source].astype(np.int64)

    def candidates(self, length: int) -> list[tuple[int, Ints]]:
        """The profiles of that length, with the numbers that `get` knows them by."""
        return [(i, logs.astype(np.int64)) for i, logs in enumerate(self._latest) if len(logs) == length]


class Spread:
    """The variances of one matrix as its rows go by; the same numbers on both sides."""

    def __init__(self, cols: int, sent: Description, profiles: Profiles) -> None:
        self._sent = sent
        guess = np.zeros(cols, np.int64)
        if sent.source != NO_SOURCE:
            guess = profiles.get(sent.source, cols) * sent.gain // _GAIN_ONE
        self._count = _STRENGTHS[sent.strength]
        logs = np.clip(guess, -_MAX_LOG, _MAX_LOG)
        self._sums = np.rint(exp2(logs) * (_FIXED * self._count)).astype(np.int64)

    def row_logs(self, symbols: RowSymbols) -> Ints:
        """The rows' spreads that these symbols stand for."""
        steps = np.where(symbols == ZERO_ROW, -32, symbols.astype(np.int64) - _MIDDLE)
        return np.clip(self._sent.base + _STEP * self._sent.stride * steps, -_MAX_LOG, _MAX_LOG)

    def variances(self, row_logs: Ints) -> Floats:
        """(rows, cols) expected variances of the codes of rows of these spreads, given all rows before them."""
        columns = self._sums.astype(np.float64) / (_FIXED * self._count)
        return exp2(row_logs)[:, None] * columns

    def learn(self, row_logs: Ints, codes: Ints) -> None:
        """Take in the codes, (rows, cols), of rows whose variances were asked for."""
        inverse = np.rint(exp2(-row_logs) * _FIXED).astype(np.int64)
        self._sums += (codes * codes * inverse[:, None]).sum(0)
        self._count += len(codes)

    def finish(self, symbols: RowSymbols, scale: NDArray[np.float16], profiles: Profiles) -> None:
        """Record the matrix's profiles, rows first, for the matrices to come."""
        if len(symbols) <= MAX_PROFILE:
            wide = scale.astype(np.float64)
            usable = np.isfinite(wide) & (wide > 0)
            profiles.add(self.row_logs(symbols) + log2(np.where(usable, wide * wide, 1.0)))
        profiles.add(log2(np.maximum(self._sums, 1).astype(np.float64)))


def describe(layout: Layout, codes: Codes, profiles: Profiles) -> tuple[Description, RowSymbols]:
    """Measure a matrix: what to send about it, and the symbol of each row."""
    squares = codes.astype(np.float32) ** 2
    used = squares.any(axis=1)
    symbols = np.full(layout.rows, ZERO_ROW, np.uint8)
    stride = 1 if layout.cols >= 300 else 2 if layout.cols >= 75 else 4  # where half a bit more a row pays
    if not used.any():
        return Description(source=NO_SOURCE, gain=0, strength=0, stride=stride, base=0), symbols
    row_logs, column_logs = _separate(squares[used])
    source, gain, guess = _best_source(column_logs, profiles)
    row_logs += (column_logs - guess).mean()
    base = int(np.clip(np.rint(LOG_ONE * row_logs.mean()), -_MAX_LOG, _MAX_LOG))
    steps = np.rint((LOG_ONE * row_logs - base) / (_STEP * stride)) + _MIDDLE
    symbols[used] = np.clip(steps, 0, ZERO_ROW - 1).astype(np.uint8)
    strength = _strength(column_logs - guess, int(used.sum()))
    return Description(source=source, gain=gain, strength=strength, stride=stride, base=base), symbols


def _separate(squares: np.ndarray) -> tuple[Floats, Floats]:
    """Logarithms (base 2) of a and b with squares[r, c] about a[r] * b[c], by alternating means."""
    columns = np.maximum(squares.mean(0, dtype=np.float64), 1e-3)
    columns /= np.exp(np.log(columns).mean())
    for _ in range(4):
        rows = np.maximum((squares @ (1.0 / columns)) / squares.shape[1], 2.0**-14)
        columns = np.maximum(((1.0 / rows) @ squares) / len(rows), 1e-3)
        columns /= np.exp(np.log(columns).mean())
    rows = np.maximum((squares @ (1.0 / columns)) / squares.shape[1], 2.0**-14)
    return np.log2(rows), np.log2(columns)


def _best_source(column_logs: Floats, profiles: Profiles) -> tuple[int, int, Floats]:
    """The earlier profile that predicts the columns best, and its gain; none if none explains much."""
    best = NO_SOURCE, 0, np.zeros_like(column_logs)
    least = 0.95 * float(((column_logs - column_logs.mean()) ** 2).sum())
    for source, logs in profiles.candidates(len(column_logs)):
        known = logs / LOG_ONE
        slope = float(known @ column_logs) / max(float(known @ known), 1e-9)
        gain = int(np.clip(np.rint(slope * _GAIN_ONE), -127, 127))
        rest = column_logs - known * (gain / _GAIN_ONE)
        error = float(((rest - rest.mean()) ** 2).sum())
        if error < least:
            best, least = (source, gain, known * (gain / _GAIN_ONE)), error
    return best


def _strength(errors: Floats, num_rows: int) -> int:
    """How many rows the guess is worth: 2 / the variance of its error in natural logarithms, less noise."""
    variance = float(np.var(errors)) * np.log(2.0) ** 2 - 2.0 / num_rows
    worth = 2.0 / max(variance, 1e-3)
    return int(np.argmin(np.abs(np.log(_STRENGTHS) - np.log(worth))))
