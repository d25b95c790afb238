"""Nothing at all: one byte per code. For tests, and to see what the others gain."""

from collections.abc import Sequence

import numpy as np

from epigram.artifact.codecs.base import Bytes, Codes, Encoded, Layout, join_codes, share_bits, split_codes
from epigram.errors import ArtifactError

BYTES = "store"


class _Codes:
    def encode(self, matrices: Sequence[tuple[Layout, Codes]]) -> Encoded:
        stored = pack(join_codes(matrices), 1)
        return Encoded(stored=stored, matrix_bits=share_bits(len(stored), matrices))

    def decode(self, stored: bytes, layouts: Sequence[Layout]) -> list[Codes]:
        return split_codes(unpack(stored, sum(layout.size for layout in layouts), 1), layouts)


def new_encoder() -> _Codes:
    return _Codes()


def new_decoder() -> _Codes:
    return _Codes()


def forecast_bits(order0_bits: float) -> float:
    return 8.0


def pack(data: bytes, item_bytes: int) -> bytes:
    return bytes(data)


def unpack(stored: bytes, raw_bytes: int, item_bytes: int) -> Bytes:
    if len(stored) != raw_bytes:
        raise ArtifactError(f"a section holds {len(stored):,} bytes and declares {raw_bytes:,}")
    return np.frombuffer(bytearray(stored), np.uint8)
