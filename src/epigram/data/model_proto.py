"""The few settings of a SentencePiece model file that its library does not tell, read from the file's bytes.

A model file is a protocol buffer: a sequence of numbered fields. Field 2 holds how it was trained, field 3
how it normalises text. Only these are looked at; the pieces come from the library, which has checked the
whole file before.
"""

from collections.abc import Iterator
from dataclasses import dataclass

_TRAINER, _NORMALIZER = 2, 3  # fields of the model
_NAME, _CHARS_MAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE = 1, 2, 3, 4, 5  # fields of the normaliser
_SUFFIX = 24  # field of the trainer: blanks belong to the end of a piece
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """How a model changes text before it looks for pieces.

    name: as stored, for example "identity" or "nmt_nfkc". dummy_prefix: a blank is put before the text.
    suffix: the space mark ends a piece instead of beginning it. identity: nothing is changed at all.
    """

    name: str
    dummy_prefix: bool
    suffix: bool
    identity: bool


def normalization(proto: bytes) -> Normalization:
    """Settings of the serialised model `proto`; absent fields have the format's defaults (flags on)."""
    name, has_map, suffix = "", False, False
    flags = {_DUMMY_PREFIX: True, _REMOVE_EXTRA: True, _ESCAPE: True}
    for field, value in _fields(proto):
        if field == _NORMALIZER and isinstance(value, bytes):
            for inner, setting in _fields(value):
                if inner == _NAME and isinstance(setting, bytes):
                    name = setting.decode("utf-8", "replace")
                elif inner == _CHARS_MAP:
                    has_map = bool(setting)
                elif inner in flags:
                    flags[inner] = bool(setting)
        elif field == _TRAINER and isinstance(value, bytes):
            suffix = any(inner == _SUFFIX and bool(setting) for inner, setting in _fields(value))
    identity = flags[_ESCAPE] and not (has_map or flags[_DUMMY_PREFIX] or flags[_REMOVE_EXTRA])
    return Normalization(name=name or "unnamed", dummy_prefix=flags[_DUMMY_PREFIX], suffix=suffix, identity=identity)


def without_normalization(proto: bytes) -> bytes:
    """The same model with a normaliser that changes nothing, for text that is normalised already.

    A repeated field is merged into the first one, later values winning, so it is enough to append the
    changes.
    """
    changes = bytes([_CHARS_MAP << 3 | _BYTES, 0])
    for flag, value in ((_DUMMY_PREFIX, 0), (_REMOVE_EXTRA, 0), (_ESCAPE, 1)):
        changes += bytes([flag << 3 | _VARINT, value])
    return proto + bytes([_NORMALIZER << 3 | _BYTES, len(changes)]) + changes


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one message; ValueError when it is no message."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == _VARINT:
            number, place = _varint(data, place)
            yield key >> 3, number
            continue
        if kind == _BYTES:
            size, place = _varint(data, place)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"unknown wire type {kind}")
        if place + size > len(data):
            raise ValueError("a field reaches beyond its message")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise ValueError("a number is cut short")
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
