"""What every codec of the artifact offers, and the types it works on.

A codec is a module of this folder. For integer matrices, class by class, it offers

    new_encoder() -> Encoder, new_decoder() -> Decoder
        Both keep what they learn from one class to the next, so a decoder must see the classes in the order
        in which the encoder saw them.
    BYTES: str
        The codec that carries plain bytes (scales, small tensors, tokenizer) beside this one; often itself.
    forecast_bits(order0_bits) -> float
        Bits a weight that it will store where an ideal fixed table for each matrix would need `order0_bits`.

and, if BYTES is its own name,

    pack(data, item_bytes) -> bytes
    unpack(stored, raw_bytes, item_bytes) -> writable uint8 array
        `item_bytes` is the size of one number (1 for text), a hint for reordering.

`pack` and `encode` are deterministic. `unpack` and `decode` raise ArtifactError for bytes that no encoder
wrote, produce exactly the declared number of bytes, and never hold more than about twice that.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int8]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """What a decoder knows of a matrix before its codes.

    Its name, its shape, the largest |code| (1 to 127), and the rows' scales, float16 (rows,), which come
    first.
    """

    name: str
    rows: int
    cols: int
    qmax: int
    scale: NDArray[np.float16]

    @property
    def size(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What became of one class of matrices.

    matrix_bits: bits that each matrix needed; they add up to about 8 * len(stored).
    model_bits: the entropy of the codes under the codec's own model, for codecs that have one.
    """

    stored: bytes
    matrix_bits: tuple[float, ...]
    model_bits: float | None = None


class Encoder(Protocol):
    """Turns the matrices of one class after another into bytes."""

    def encode(self, matrices: Sequence[tuple[Layout, Codes]]) -> Encoded: ...


class Decoder(Protocol):
    """The way back: the codes, int8 (rows, cols), of the matrices of the next class."""

    def decode(self, stored: bytes, layouts: Sequence[Layout]) -> list[Codes]: ...


def tensor_class(name: str) -> str:
    """The class of a tensor: its name with every number replaced, so that all layers share one class."""
    return re.sub(r"\d+", "#", name)


def order0_bits(codes: Codes) -> float:
    """Bits that the codes need with one ideal fixed table for the whole matrix: size times the entropy."""
    counts = np.bincount(codes.reshape(-1).view(np.uint8), minlength=256)
    counts = counts[counts > 0]
    return float(counts @ np.log2(codes.size / counts)) if codes.size else 0.0


def share_bits(stored_bytes: int, matrices: Sequence[tuple[Layout, Codes]]) -> tuple[float, ...]:
    """Divide the bits of one stream among its matrices, in proportion to their order-0 entropy."""
    weights = np.array([order0_bits(codes) + 1.0 for _, codes in matrices])
    return tuple(float(bits) for bits in 8.0 * stored_bytes * weights / weights.sum())


def join_codes(matrices: Sequence[tuple[Layout, Codes]]) -> bytes:
    """All codes, matrix after matrix, row by row, one byte each."""
    return b"".join(np.ascontiguousarray(codes).tobytes() for _, codes in matrices)


def split_codes(data: Bytes, layouts: Sequence[Layout]) -> list[Codes]:
    """The matrices in `data`, as views; `data` must have exactly their size."""
    assert len(data) == sum(layout.size for layout in layouts)
    matrices, start = [], 0
    for layout in layouts:
        matrices.append(data[start : start + layout.size].view(np.int8).reshape(layout.rows, layout.cols))
        start += layout.size
    return matrices
