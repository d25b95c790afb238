"""What text transforms share: which one a name means, and the byte counts of transformed text.

A transform is one file of this folder with

    MARKS: str                     characters that it adds, each of which needs a piece of its own in the tokenizer
    encode(text: str) -> str       any text to the text that is tokenized
    decode(text: str) -> str       back, exactly
    silent(text: bytes) -> NDArray[np.bool_]
                                   which bytes of transformed UTF-8 are no bytes of the text, (num_bytes,)
    Decoder()                      decodes text that comes in pieces: feed(text) -> str gives what is certain by now,
                                   finish() -> str the rest; together the same as `decode`

Because a transform loses nothing, a score can count the bytes of the text itself; but how many a token stands for
depends on its neighbours, so they are kept beside the tokens (the sidecar) instead of in a table.
"""

from collections.abc import Collection
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from epigram import plugin
from epigram.byte_tables import ByteTables

PACKAGE = "epigram.data.transforms"


def load(name: str) -> ModuleType:
    """The transform called `name`; UserError with the choices when there is none."""
    return plugin.load(PACKAGE, name)


def marked_by(pieces: Collection[str]) -> list[str]:
    """Names of the transforms all of whose marks are pieces: a tokenizer that has them was made for that."""
    return [name for name in plugin.names(PACKAGE) if set(load(name).MARKS) <= set(pieces)]


def count_original(
    transform: ModuleType, tables: ByteTables, tokens: NDArray[np.uint16], transformed: bytes
) -> NDArray[np.uint16]:
    """Bytes of the text that each token of a document stands for, (T,) uint16, 0 for its BOS.

    transformed: what the tokens spell, whose bytes `tables` shares out among them.
    """
    counts = np.zeros(len(tokens), np.int64)
    counts[1:] = tables.count(tokens[:-1], tokens[1:])
    assert int(counts.sum()) == len(transformed), "the tables must account for every byte"
    heard = np.zeros(len(transformed) + 1, np.int64)
    np.cumsum(~transform.silent(transformed), out=heard[1:])
    ends = np.cumsum(counts)
    return (heard[ends] - heard[ends - counts]).astype(np.uint16)
