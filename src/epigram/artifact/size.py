"""The arithmetic of the cap: what ships, counted before training by forecast and after packing by fact.

Sizes are decimal bytes: the challenge's cap of "16 MB" is 16,000,000. What counts is the artifact and the
code beside it, as the files lie in the folder that is handed in (parameter-golf #1835 was refused over a
count of its own).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

FLOAT16_BITS = 13.0  # of a trained float16 control value behind byte shuffle and brotli
SCALE_BITS = 10.0  # of a row's float16 scale, likewise; next to nothing where a floor makes all scales equal
HEADER_BYTES = 1200
HEADER_BYTES_PER_TENSOR = 5


@dataclass(frozen=True, kw_only=True)
class CapCheck:
    """Artifact and code against the cap, all in bytes; no cap if `cap_bytes` is None."""

    artifact_bytes: int
    code_bytes: int
    cap_bytes: int | None

    @property
    def total_bytes(self) -> int:
        return self.artifact_bytes + self.code_bytes

    @property
    def margin_bytes(self) -> int | None:
        """Bytes that are left; negative if the cap is exceeded."""
        return None if self.cap_bytes is None else self.cap_bytes - self.total_bytes

    @property
    def fits(self) -> bool:
        return self.margin_bytes is None or self.margin_bytes >= 0

    def __str__(self) -> str:
        parts = f"{self.artifact_bytes:,} artifact + {self.code_bytes:,} code = {self.total_bytes:,} bytes"
        if self.margin_bytes is None:
            return f"{parts}, no cap"
        side = "under" if self.fits else "over"
        return f"{parts}, {abs(self.margin_bytes):,} {side} the cap of {self.cap_bytes:,}"


@dataclass(frozen=True, kw_only=True)
class TensorFormat:
    """Shape and cost of a tensor before it exists: stored bits of one element, and how many scales come
    with it."""

    shape: tuple[int, ...]
    bits_per_weight: float
    num_scales: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def forecast(formats: Iterable[TensorFormat], *, tokenizer_bytes: int = 0, scale_bits: float = SCALE_BITS) -> int:
    """Bytes of the artifact that tensors of these formats will make.

    tokenizer_bytes: of the packed tokenizer section. scale_bits: of one scale.
    """
    formats = list(formats)
    bits = sum(tensor.size * tensor.bits_per_weight + tensor.num_scales * scale_bits for tensor in formats)
    return math.ceil(bits / 8) + HEADER_BYTES + HEADER_BYTES_PER_TENSOR * len(formats) + tokenizer_bytes
