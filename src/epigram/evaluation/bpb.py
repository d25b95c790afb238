"""Bits per byte: a model's loss over the bytes of the text it predicted, comparable between tokenizers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epigram.byte_tables import ByteTables
from epigram.errors import DataError

_CHUNK = 1 << 22  # tokens looked up at once, so that memory does not grow with the text


@dataclass(frozen=True)
class Score:
    """What a model lost on a text. Scores of parts of a text add up.

    nats: float64 sum of the negative log-likelihoods. tokens: targets scored, begin-of-document tokens
    included. bytes: UTF-8 bytes these targets stand for (as tokenized: of the normalised text where the
    tokenizer normalises).
    """

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def val_nats(self) -> float:
        """Mean loss of a token in nats."""
        return self.nats / self.tokens

    @property
    def val_bpb(self) -> float:
        """Bits per byte of text. Raises DataError when the scored tokens stand for no text at all."""
        if self.bytes == 0:
            raise DataError(
                "the scored tokens stand for no text, so bits per byte have no meaning: score a longer text"
            )
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, float | int]:
        """The four numbers as result.json holds them."""
        return {
            "val_bpb": self.val_bpb,
            "val_nats": self.val_nats,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def _pieces(tokens: NDArray[np.integer], first: int, end: int) -> Iterator[tuple[NDArray, NDArray]]:
    for start in range(first, end, _CHUNK):
        stop = min(start + _CHUNK, end)
        yield tokens[start:stop], tokens[start + 1 : stop + 1]


def count_bytes(
    tokens: NDArray[np.integer],
    tables: ByteTables,
    first: int = 0,
    end: int | None = None,
    byte_counts: NDArray[np.integer] | None = None,
) -> int:
    """Bytes of the targets first..end-1 of a stream (target t is token t + 1); by default of all.

    byte_counts: of each token, where a transform of the text makes them differ from the tables (parameter-golf #1729).
    Raises DataError for an id that the tables do not have (the text was made by another tokenizer), and for byte counts
    of another stream.
    """
    end = len(tokens) - 1 if end is None else end
    if byte_counts is not None:
        if len(byte_counts) != len(tokens):
            raise DataError(f"there are byte counts for {len(byte_counts):,} tokens, and {len(tokens):,} to be scored")
        return int(byte_counts[first + 1 : end + 1].sum(dtype=np.int64))
    vocab_size, total = len(tables.token_bytes), 0
    for previous, targets in _pieces(tokens, first, end):
        largest = int(max(previous.max(), targets.max()))
        if largest >= vocab_size:
            raise DataError(
                f"the text holds token {largest}, but the tokenizer has {vocab_size} pieces: "
                "use the data and the tokenizer that belong together"
            )
        total += int(tables.count(previous, targets).sum())
    return total


def check_bytes(
    tokens: NDArray[np.integer],
    tables: ByteTables,
    expected_bytes: int | None,
    byte_counts: NDArray[np.integer] | None = None,
) -> int:
    """Bytes of all targets, compared with what the data's manifest says before time is spent on scoring.

    `expected_bytes` None: the data has no manifest, nothing to compare with. Raises DataError when they
    differ: then the denominator of the score would be wrong (parameter-golf #1719, #1923, #2071).
    """
    found = count_bytes(tokens, tables, byte_counts=byte_counts)
    if expected_bytes is not None and found != expected_bytes:
        raise DataError(
            f"the tokens to be scored stand for {found:,} bytes of text, but the manifest says "
            f"{expected_bytes:,}: the shards or the tokenizer are not the ones it describes "
            "(check them with `epigram data check`)"
        )
    return found
