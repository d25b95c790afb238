"""The few settings of a SentencePiece model file that its library does not tell, read from the file's bytes.

A model file is a protocol buffer: a sequence of numbered fields. Field 2 holds how it was trained, field 3
how it normalises text. Only these are looked at; the pieces come from the library, which has checked the
whole file before.
"""

from dataclasses import dataclass

from epigram.wire_format import VARINT, bytes_field, read_fields

_TRAINER, _NORMALIZER = 2, 3  # fields of the model
_NAME, _CHARS_MAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE = 1, 2, 3, 4, 5  # fields of the normaliser
_SUFFIX = 24  # field of the trainer: blanks belong to the end of a piece


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
    for field, _, value, _ in read_fields(proto):
        if field == _NORMALIZER and isinstance(value, bytes):
            for inner, _, setting, _ in read_fields(value):
                if inner == _NAME and isinstance(setting, bytes):
                    name = setting.decode("utf-8", "replace")
                elif inner == _CHARS_MAP:
                    has_map = bool(setting)
                elif inner in flags:
                    flags[inner] = bool(setting)
        elif field == _TRAINER and isinstance(value, bytes):
            suffix = any(inner == _SUFFIX and bool(setting) for inner, _, setting, _ in read_fields(value))
    identity = flags[_ESCAPE] and not (has_map or flags[_DUMMY_PREFIX] or flags[_REMOVE_EXTRA])
    return Normalization(name=name or "unnamed", dummy_prefix=flags[_DUMMY_PREFIX], suffix=suffix, identity=identity)


def without_normalization(proto: bytes) -> bytes:
    """The same model with a normaliser that changes nothing, for text that is normalised already.

    A repeated field is merged into the first one, later values winning, so it is enough to append the
    changes.
    """
    changes = bytes_field(_CHARS_MAP, b"")
    for flag, value in ((_DUMMY_PREFIX, 0), (_REMOVE_EXTRA, 0), (_ESCAPE, 1)):
        changes += bytes([flag << 3 | VARINT, value])
    return proto + bytes_field(_NORMALIZER, changes)
