"""Text to the ids that a model was trained on, and back: the tokenizer, and in front of it maybe a text transform."""

import re
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from epigram.data.tokenizer import Tokenizer
from epigram.data.transforms.base import count_original, load
from epigram.errors import UserError

_SURROGATE = re.compile("[\ud800-\udfff]")


class Decoder(Protocol):
    """Turns ids into text as they come: `feed` gives what an id makes certain, `finish` the rest."""

    def feed(self, id: int, /) -> str: ...

    def finish(self) -> str: ...


class TextCodec:
    """Encodes text as `epigram data build` does. transform: a name in `data.transforms`, "" for none."""

    def __init__(self, tokenizer: Tokenizer, transform: str = "") -> None:
        self._tokenizer = tokenizer
        self._transform: ModuleType | None = load(transform) if transform else None

    def encode(self, text: str) -> NDArray[np.uint16]:
        """The BOS and the ids of `text`, (n + 1,); UserError where they would not stand for it."""
        tokenizer = self._tokenizer
        if half := _SURROGATE.search(text):  # of a pair, or what Python makes of bytes that it could not decode
            raise UserError(
                f"the tokenizer cannot represent this text: it is not valid UTF-8 at character {half.start() + 1:,}: "
                "convert it to UTF-8 (for example with iconv), or leave that character out"
            )
        if self._transform is None:
            if tokenizer.can_encode(text):
                return np.array([tokenizer.bos_id, *tokenizer.encode(text)], np.uint16)
        else:
            transformed = self._transform.encode(tokenizer.normalize(text))
            ids = tokenizer.encode_normalized(transformed)
            if tokenizer.decode_bytes(ids) == transformed.encode("utf-8"):
                return ids
        raise UserError("the tokenizer cannot represent this text: it has characters outside its alphabet")

    def count_bytes(self, ids: NDArray[np.uint16]) -> NDArray[np.int64]:
        """Bytes of text that each id of a document stands for, its BOS excepted: (n + 1,) to (n,)."""
        tables = self._tokenizer.byte_tables()
        if self._transform is None:
            return tables.count(ids[:-1], ids[1:])
        return count_original(self._transform, tables, ids, self._tokenizer.decode_bytes(ids))[1:].astype(np.int64)

    def decoder(self, ids: NDArray[np.uint16]) -> Decoder:
        """Decoder for ids that follow `ids`, a document's beginning with its BOS."""
        inner = self._tokenizer.stream_decoder(int(ids[-1]))
        if self._transform is None:
            return inner
        restoring = self._transform.Decoder()
        restoring.feed(self._tokenizer.decode(ids))  # what the beginning opened, as a word in capitals, goes on
        return _Restored(inner, restoring)


class _Restored:
    """What one decoder gives, through another that takes a transform back."""

    def __init__(self, inner: Decoder, restoring: Any) -> None:
        self._inner, self._restoring = inner, restoring

    def feed(self, id: int, /) -> str:
        return str(self._restoring.feed(self._inner.feed(id)))

    def finish(self) -> str:
        return str(self._restoring.feed(self._inner.finish()) + self._restoring.finish())
