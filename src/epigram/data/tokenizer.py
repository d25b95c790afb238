"""Text to token ids and back, around a SentencePiece model, with an exact account of bytes.

The ids of a document are those that SentencePiece gives for it, found faster: no BPE merge reaches over the
start of a word, so words are looked up in a cache. Two texts that SentencePiece cannot give back are written
with byte pieces: a blank at the very start (after the BOS it would cost nothing, parameter-golf #1719) and
the character U+2581, which SentencePiece itself uses for the blank. With identity normalisation every text
comes back byte for byte.
"""

import codecs
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from epigram.byte_tables import ByteTables
from epigram.data.model_proto import normalization, without_normalization
from epigram.errors import DataError

SPACE = "\u2581"  # stands for a blank inside pieces
MAX_VOCAB_SIZE = 1 << 16  # ids are stored as uint16
_WORD = re.compile(" +[^ ]*|[^ ]+")
_CACHED_CHARS = 64  # longer words are not remembered
_CACHED_WORDS = 100_000  # and as many older ones, together about 40 MB
_BLOCK_IDS = 1 << 18  # ids that are looked at at once, so that a long document takes little memory
_LONGEST_RUN = 1 << 16  # characters that SentencePiece is given at once


class Tokenizer:
    """A SentencePiece model, checked to be usable; raises DataError for one that is not.

    proto: the model file's bytes. sha256: their hash, in hex. vocab_size: number of ids. bos_id: put before
    each document. normalization: the rule's name. lossless: text comes back as it was, whatever it is.
    """

    def __init__(self, proto: bytes, name: str = "the tokenizer") -> None:
        import sentencepiece

        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self._settings = normalization(proto)
            self._raw_model: Any = sentencepiece.SentencePieceProcessor(model_proto=without_normalization(proto))
        except (RuntimeError, ValueError, TypeError) as error:
            raise DataError(f"{name} is no SentencePiece model: give the .model file that its trainer wrote") from error
        self.proto = proto
        self.sha256 = hashlib.sha256(proto).hexdigest()
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id: int = self._model.bos_id()
        self.unk_id: int = self._model.unk_id()
        self._check(name)
        self.pieces: list[str] = self._model.id_to_piece(list(range(self.vocab_size)))
        self._byte_ids = {int(piece[3:5], 16): id for id, piece in enumerate(self.pieces) if self._model.is_byte(id)}
        self.normalization = self._settings.name
        self.lossless = self._settings.identity and len(self._byte_ids) == 256
        self._words = _WordCache(self._encode_run)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The model in `path`; DataError when there is none, or none that can be used."""
        try:
            proto = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read: {error.strerror or error}") from error
        return cls(proto, f"tokenizer {path}")

    @classmethod
    def from_bytes(cls, proto: bytes) -> Self:
        """The model whose file holds `proto`."""
        return cls(proto)

    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]:
        return type(self), (self.proto,)

    def _check(self, name: str) -> None:
        problems = []
        if self.vocab_size > MAX_VOCAB_SIZE:
            problems.append(f"it has {self.vocab_size:,} pieces, above the {MAX_VOCAB_SIZE:,} that 16 bits can number")
        if self.bos_id < 0:
            problems.append("it has no BOS piece to begin a document with (train it with bos_id >= 0)")
        if self._model.piece_to_id(SPACE) == self.unk_id:
            problems.append("it has no piece for a lone blank (U+2581), so blanks would be counted as three bytes each")
        if self._settings.suffix:
            problems.append("its pieces end with the blank instead of beginning with it")
        if problems:
            raise DataError(f"{name} cannot be used: {'; '.join(problems)}")

    # Text to ids

    def normalize(self, text: str) -> str:
        """The text that the ids stand for: `text` itself with identity normalisation."""
        normalized = self._normalize(text)
        return normalized[1:] if self._settings.dummy_prefix else normalized

    def _normalize(self, text: str) -> str:
        if self._settings.identity:
            return text
        return self._model.normalize(text).replace(SPACE, " ")

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as at the start of a document, without BOS."""
        return self._encode_normalized(self._normalize(text)).tolist()

    def encode_document(self, text: str) -> tuple[NDArray[np.uint16], bytes]:
        """The BOS and the ids of `text`, and the normalised text in UTF-8 that they stand for."""
        normalized = self.normalize(text)
        return self.encode_normalized(normalized), normalized.encode("utf-8")

    def encode_normalized(self, normalized: str) -> NDArray[np.uint16]:
        """The BOS and the ids of a text that is normalised already."""
        prefix = " " if self._settings.dummy_prefix and normalized else ""
        return np.concatenate([np.array([self.bos_id], np.uint16), self._encode_normalized(prefix + normalized)])

    def _encode_normalized(self, text: str) -> NDArray[np.uint16]:
        encoded: list[bytes] = []
        if text.startswith(" ") and not self._settings.dummy_prefix:
            encoded, text = [self._bytes_as_ids(" ")], text[1:]
        words, mark = self._words, self._bytes_as_ids(SPACE)
        for index, section in enumerate(text.split(SPACE)):
            if index:
                encoded.append(mark)
            encoded += map(words.__getitem__, self._units(section))
        return np.frombuffer(b"".join(encoded), np.uint16)

    def _units(self, text: str) -> Iterable[str]:
        """`text` in pieces that can be encoded one by one with the same result as at once."""
        if len(text) <= _LONGEST_RUN:
            return [text] if self._pairs_over_words else _WORD.findall(text)
        words = [text] if self._pairs_over_words else (found[0] for found in _WORD.finditer(text))
        return (part for word in words for part in self._cut(word))

    def _cut(self, text: str) -> Iterator[str]:
        """A very long run in parts of bounded length, cut where no piece of the vocabulary could reach across.

        Where there is no such place in a whole part (one character repeated, say), it is cut anyway: the ids
        still stand for the same text, but are not those that SentencePiece would choose.
        """
        start, pairs = 0, self._pairs
        while len(text) - start > _LONGEST_RUN:
            end = start + _LONGEST_RUN
            safe = (
                place
                for place in range(end, start + _LONGEST_RUN // 2, -1)
                if (pair := text[place - 1 : place + 1]) not in pairs and pair[0] in self._alphabet
            )
            end = next(safe, end)
            yield text[start:end]
            start = end
        yield text[start:]

    @cached_property
    def _pairs(self) -> frozenset[str]:
        """Neighbouring characters inside the pieces, with blanks as in text."""
        spelled = (self.pieces[id].replace(SPACE, " ") for id in range(self.vocab_size) if self._is_text(id))
        return frozenset(piece[i : i + 2] for piece in spelled for i in range(len(piece) - 1))

    @cached_property
    def _pairs_over_words(self) -> bool:
        """Some piece reaches from one word into the next, so that words cannot be encoded alone."""
        return any(pair[0] != " " and pair[1] == " " for pair in self._pairs)

    @cached_property
    def _alphabet(self) -> frozenset[str]:
        return frozenset(piece.replace(SPACE, " ") for piece in self.pieces if len(piece) == 1)

    def _bytes_as_ids(self, text: str) -> bytes:
        """`text` in byte pieces (the unknown id for a vocabulary without them), as stored ids."""
        ids = [self._byte_ids.get(byte, self.unk_id) for byte in text.encode("utf-8")]
        return np.array(ids, np.uint16).tobytes()

    def _encode_run(self, text: str) -> bytes:
        """What SentencePiece makes of normalised `text`, as stored ids."""
        return np.array(self._raw_model.encode(text), np.uint16).tobytes()

    # Ids to text

    def _is_text(self, id: int) -> bool:
        model = self._model
        return not (model.is_control(id) or model.is_unknown(id) or model.is_unused(id) or model.is_byte(id))

    @cached_property
    def _piece_bytes(self) -> list[bytes]:
        spelled = [b""] * self.vocab_size
        for id, piece in enumerate(self.pieces):
            if self._is_text(id):
                spelled[id] = piece.replace(SPACE, " ").encode("utf-8")
        for byte, id in self._byte_ids.items():
            spelled[id] = bytes([byte])
        return spelled

    def piece_bytes(self, id: int) -> bytes:
        """UTF-8 bytes of one id in running text, blank included; none for control, unknown, unused ids."""
        return self._piece_bytes[id]

    @cached_property
    def _tables(self) -> ByteTables:
        has_space = np.array([self._is_text(id) and piece.startswith(SPACE) for id, piece in enumerate(self.pieces)])
        lengths = np.array([len(spelled) for spelled in self._piece_bytes], np.int64)
        is_edge = np.array([not self._is_text(id) and not self._model.is_byte(id) for id in range(self.vocab_size)])
        return ByteTables(token_bytes=lengths - has_space, has_space=has_space, is_edge=is_edge)

    def byte_tables(self) -> ByteTables:
        """Bytes that each id stands for, by the rule of the published scores (`epigram.byte_tables`)."""
        return self._tables

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.integer]) -> bytes:
        """Bytes that `ids` stand for, exactly as many as `ByteTables.count` says.

        The blank of a piece behind a control or unknown id is left out. In front of the first id lies running
        text, unless the model puts a blank before every text.
        """
        ids = np.asarray(ids)
        blocks, after_edge = [], self._settings.dummy_prefix
        for start in range(0, len(ids), _BLOCK_IDS):
            block = ids[start : start + _BLOCK_IDS].astype(np.int64)
            blocks.append(self._spell(block, after_edge))
            after_edge = bool(self._tables.is_edge[block[-1]])
        return b"".join(blocks)

    def _spell(self, ids: NDArray[np.int64], after_edge: bool) -> bytes:
        spelled = list(map(self._piece_bytes.__getitem__, ids.tolist()))
        unowed = self._tables.has_space[ids]
        unowed[0] &= after_edge
        unowed[1:] &= self._tables.is_edge[ids[:-1]]
        for place in np.flatnonzero(unowed).tolist():
            spelled[place] = spelled[place][1:]
        return b"".join(spelled)

    def count_bytes(self, ids: NDArray[np.integer]) -> int:
        """Bytes of all ids but the first, by the byte tables."""
        starts = range(1, len(ids), _BLOCK_IDS)
        blocks = ((ids[start - 1 : start + _BLOCK_IDS - 1], ids[start : start + _BLOCK_IDS]) for start in starts)
        tables = self.byte_tables()
        return sum(int(tables.count(previous[: len(targets)], targets).sum()) for previous, targets in blocks)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream_decoder(self, previous: int | None = None) -> "StreamDecoder":
        """Decoder for ids that come one by one after the id `previous` (the BOS unless given)."""
        return StreamDecoder(self, self.bos_id if previous is None else previous)

    def can_encode(self, text: str) -> bool:
        """Whether the normalised text survives the way to ids and back."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair
            return False
        ids, normalized = self.encode_document(text)
        return self.decode_bytes(ids) == normalized


class StreamDecoder:
    """Turns ids into text as they come, holding back the bytes of a character until it is complete."""

    def __init__(self, tokenizer: Tokenizer, previous: int) -> None:
        self._tokenizer, self._previous = tokenizer, previous
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """Text that `id` completes, possibly none."""
        tables = self._tokenizer.byte_tables()
        spelled = self._tokenizer.piece_bytes(id)
        if tables.has_space[id] and tables.is_edge[self._previous]:
            spelled = spelled[1:]
        self._previous = id
        return self._decoder.decode(spelled)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never became complete."""
        return self._decoder.decode(b"", final=True)


class _WordCache(dict[str, bytes]):
    """Stored ids of words, encoded on first use; words not met for long are forgotten."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        super().__init__()
        self._encode = encode
        self._older: dict[str, bytes] = {}

    def __missing__(self, word: str) -> bytes:
        encoded = self._older.get(word) or self._encode(word)
        if len(word) <= _CACHED_CHARS:
            if len(self) >= _CACHED_WORDS:
                self._older = dict(self)
                self.clear()
            self[word] = encoded
        return encoded
