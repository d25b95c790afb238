"""A SentencePiece model in a few kilobytes, such that it encodes and decodes as before.

A published model file of 1,024 pieces has 254 kB: 240 kB of it is the normaliser's character map (see
`charsmap`), the rest pieces, scores and notes of the training run. Carried: pieces, types, scores, every
setting that encoding or decoding reads, the map in its compact form. Dropped: what only the trainer reads,
and its self-test samples.

The message's fields, of sentencepiece_model.proto: ModelProto 1 pieces, 2 trainer_spec, 3 normalizer_spec, 4
self-test data, 5 denormalizer_spec; SentencePiece 1 text, 2 score (float), 3 type (1, normal, when absent);
NormalizerSpec 2 precompiled_charsmap. Fields that are not named here are carried as they are.
"""

import numpy as np
from numpy.typing import NDArray

from epigram.artifact import charsmap
from epigram.errors import ArtifactError, DataError
from epigram.wire_format import (
    BYTES,
    FIXED32,
    VARINT,
    WireError,
    bytes_field,
    join_streams,
    read_fields,
    split_streams,
    varint,
)

MAX_PIECES = 1 << 17
MAX_SETTINGS_BYTES = 1 << 20  # all but pieces and character map: some hundred bytes, or 240 kB with a map to decode by
_NORMAL = 1
_SCORE_PLANES = 4
_TRAINER_ONLY = frozenset(
    # inputs and limits; splitting; symbols (the types of the pieces say it) and vocabulary; memory, privacy,
    # seeds
    (1, 2, *range(5, 8), *range(10, 24), 25, *range(30, 35), 36, *range(49, 55))
)


def compact(proto: bytes) -> bytes:
    """The section's bytes for a SentencePiece model file; the codec that stores the section compresses them.

    Raises DataError when `proto` is no such file, or has more than the format allows.
    """
    try:
        return _compact(proto)
    except WireError as error:
        raise DataError(f"no artifact can carry the tokenizer (artifact.tokenizer=false: none is): {error}") from error


def expand(packed: bytes) -> bytes:
    """A SentencePiece model file that encodes and decodes like the one that was compacted.

    Its bytes differ from the original's, but compacting it gives `packed` again. Raises ArtifactError for
    bytes that `compact` did not write.
    """
    try:
        proto = _expand(packed)
        if _compact(proto) != packed:
            raise WireError("it is not in its shortest form")
    except WireError as error:
        raise ArtifactError(f"the tokenizer section is malformed: {error}") from error
    _try_out(proto)
    return proto


def _compact(proto: bytes) -> bytes:
    pieces, rest = [], []
    normaliser_map = b""
    for field in read_fields(proto):
        if field.number == 1 and isinstance(field.value, bytes):
            pieces.append(_read_piece(field.value))
        elif field.number == 2 and isinstance(field.value, bytes):
            rest.append(bytes_field(2, _without(field.value, _TRAINER_ONLY)))
        elif field.number == 3 and isinstance(field.value, bytes):
            normaliser_map += _payloads(field.value, 2)
            rest.append(bytes_field(3, _without(field.value, {2})))
        elif field.number != 4:
            rest.append(field.raw)
    settings = b"".join(rest)
    _check_settings(settings)
    return join_streams([*_piece_streams(pieces), charsmap.pack(normaliser_map), settings])


def _check_settings(settings: bytes) -> None:
    """Two bytes can be a field, which takes a hundred in memory."""
    if len(settings) > MAX_SETTINGS_BYTES:
        raise WireError(f"its settings take {len(settings):,} bytes, the format allows {MAX_SETTINGS_BYTES:,}")


def _read_piece(message: bytes) -> tuple[bytes, int, int]:
    """Text, the 32 bits of the score, type."""
    text, score, kind = b"", 0, _NORMAL
    for field in read_fields(message):
        if field.number == 1 and isinstance(field.value, bytes):
            text = field.value
        elif field.number == 2 and field.kind == FIXED32 and isinstance(field.value, bytes):
            score = int.from_bytes(field.value, "little")
        elif field.number == 3 and field.kind == VARINT and isinstance(field.value, int):
            kind = field.value
        else:
            raise WireError(f"a piece has the unknown field {field.number}")
    if not 0 < len(text) <= 255 or not 0 < kind <= 255:
        raise WireError(f"a piece of {len(text)} bytes and type {kind}, both are 1 to 255")
    return text, score, kind


def _without(message: bytes, numbers: frozenset[int] | set[int]) -> bytes:
    return b"".join(field.raw for field in read_fields(message) if field.number not in numbers)


def _payloads(message: bytes, number: int) -> bytes:
    values = [field.value for field in read_fields(message) if field.number == number and field.kind == BYTES]
    if len(values) > 1:
        raise WireError("the normaliser has two character maps")
    return values[0] if values and isinstance(values[0], bytes) else b""


def _piece_streams(pieces: list[tuple[bytes, int, int]]) -> list[bytes]:
    """Lengths, types, texts, and the scores' four byte planes, xored with what a BPE trainer writes."""
    if not 0 < len(pieces) <= MAX_PIECES:
        raise WireError(f"the vocabulary has {len(pieces)} pieces, not 1 to {MAX_PIECES}")
    kinds = bytes(kind for _, _, kind in pieces)
    scores = np.array([score for _, score, _ in pieces], np.uint32) ^ _usual_scores(kinds)
    planes = [(scores >> np.uint32(8 * i)).astype(np.uint8).tobytes() for i in range(_SCORE_PLANES)]
    lengths = bytes(len(text) for text, _, _ in pieces)
    return [lengths, kinds, b"".join(text for text, _, _ in pieces), *planes]


def _usual_scores(kinds: bytes) -> NDArray[np.uint32]:
    """Bits of the scores 0 for special pieces and -0, -1, -2, ... for normal ones, in order of merging."""
    normal = np.frombuffer(kinds, np.uint8) == _NORMAL
    rank = (np.cumsum(normal) - 1).astype(np.float32)
    return np.where(normal, -rank, np.float32(0)).astype(np.float32).view(np.uint32)


def _expand(packed: bytes) -> bytes:
    lengths, kinds, texts, *planes, packed_map, rest = split_streams(packed, 5 + _SCORE_PLANES)
    _check_settings(rest)
    if len(lengths) > MAX_PIECES or any(len(part) != len(lengths) for part in (kinds, *planes)):
        raise WireError("its parts have lengths that do not fit together")
    if sum(lengths) != len(texts):
        raise WireError("its pieces have another length than they declare")
    bits = sum(np.frombuffer(p, np.uint8).astype(np.uint32) << np.uint32(8 * i) for i, p in enumerate(planes))
    scores = (bits ^ _usual_scores(kinds)).astype("<u4").tobytes()
    proto, place = bytearray(), 0
    for i, length in enumerate(lengths):
        piece = bytes_field(1, texts[place : place + length])
        piece += bytes([2 << 3 | FIXED32]) + scores[4 * i : 4 * i + 4]
        if kinds[i] != _NORMAL:
            piece += bytes([3 << 3 | VARINT]) + varint(kinds[i])
        proto += bytes_field(1, piece)
        place += length
    return bytes(proto + _with_map(rest, charsmap.unpack(packed_map)))


def _with_map(rest: bytes, normaliser_map: bytes) -> bytes:
    """Put the character map back into the (last) normaliser's settings."""
    fields = list(read_fields(rest))
    parts = [field.raw for field in fields]
    if normaliser_map:
        places = [i for i, field in enumerate(fields) if field.number == 3 and field.kind == BYTES]
        if not places:
            raise WireError("it has a character map and no normaliser")
        settings = fields[places[-1]].value
        assert isinstance(settings, bytes)
        parts[places[-1]] = bytes_field(3, settings + bytes_field(2, normaliser_map))
    return b"".join(parts)


def _try_out(proto: bytes) -> None:
    """Raise ArtifactError if SentencePiece itself does not accept the model."""
    import sentencepiece

    try:
        sentencepiece.SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, ValueError) as error:
        raise ArtifactError("the tokenizer section holds a model that SentencePiece refuses") from error
