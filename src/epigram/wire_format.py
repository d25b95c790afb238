"""Protocol-buffer wire format, as much as a SentencePiece model needs; no schema, no generated code.

A message is a row of fields: a key (number and wire type), then a value. Reading keeps the raw bytes of each
field, so that what is not understood can be passed on as it is. Every length is checked against what is left.
"""

from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}


class WireError(ValueError):
    """The bytes are no protocol-buffer message."""


class Field(NamedTuple):
    """value: an integer for VARINT, else the payload. raw: key and value as they were."""

    number: int
    kind: int
    value: int | bytes
    raw: bytes


def read_varint(data: bytes, start: int) -> tuple[int, int]:
    """The unsigned integer (below 2**64) that begins at `start`, and the place after it. Raises WireError."""
    value = 0
    for i in range(10):
        if start + i >= len(data):
            break
        byte = data[start + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80 and value < 1 << 64:
            return value, start + i + 1
    raise WireError("a number is cut off or has more than 64 bits")


def varint(value: int) -> bytes:
    """`value`, not negative, seven bits a byte, lowest first."""
    assert value >= 0
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def read_fields(data: bytes) -> Iterator[Field]:
    """The fields of a message, in order. Raises WireError where the bytes do not parse."""
    place = 0
    while place < len(data):
        start = place
        key, place = read_varint(data, place)
        kind = key & 7
        value: int | bytes
        if kind == VARINT:
            value, place = read_varint(data, place)
        else:
            length, place = _payload_length(data, place, kind)
            value = data[place : place + length]
            place += length
            if place > len(data):
                raise WireError("a field is longer than its message")
        yield Field(key >> 3, kind, value, data[start:place])


def _payload_length(data: bytes, place: int, kind: int) -> tuple[int, int]:
    if kind == BYTES:
        return read_varint(data, place)
    if kind in _FIXED_BYTES:
        return _FIXED_BYTES[kind], place
    raise WireError(f"wire type {kind} is not in use")


def bytes_field(number: int, payload: bytes) -> bytes:
    """Key, length and payload of a field that holds text, bytes or a message."""
    return varint(number << 3 | BYTES) + varint(len(payload)) + payload


def join_streams(streams: list[bytes]) -> bytes:
    """Several byte strings as one: how many, how long each, then all of them."""
    return b"".join([varint(len(streams)), *(varint(len(stream)) for stream in streams), *streams])


def split_streams(data: bytes, expected: int) -> list[bytes]:
    """The inverse of `join_streams`. Raises WireError unless `expected` streams fill `data` exactly."""
    count, place = read_varint(data, 0)
    if count != expected:
        raise WireError(f"there are {count} streams, not {expected}")
    lengths = []
    for _ in range(expected):
        length, place = read_varint(data, place)
        lengths.append(length)
    if place + sum(lengths) != len(data):
        raise WireError("the streams have another length than they declare")
    streams = []
    for length in lengths:
        streams.append(data[place : place + length])
        place += length
    return streams
