"""JSON Lines, one document a line, plain or compressed with gzip or Zstandard (any window length)."""

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from epigram.data.sources.base import (
    Counted,
    Labelled,
    check_surrogates,
    decode,
    lines,
    name_field,
    read_chunks,
    whole_lines,
)
from epigram.errors import DataError

HAS_FIELDS = True
_SUFFIXES = (".jsonl", ".ndjson")
_PART_BYTES = 1 << 20  # of lines
# Of input at a time: four bytes can stand for a block of 128 KiB, so these give about 4 MiB at most.
_ZSTD_INPUT_BYTES = 128
_ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes; memory is taken only as a file asks for it
# Of a number nothing is used but its type, and Python refuses to convert one of more than 4,300 digits.
_DECODER = json.JSONDecoder(parse_int=len)


def claims(path: Path) -> bool:
    """*.jsonl and *.ndjson, also with .gz or .zst behind."""
    name = path.name.lower()
    return name.removesuffix(".gz").removesuffix(".zst").endswith(_SUFFIXES)


@dataclass(frozen=True)
class Lines:
    """Some whole lines of a file, the first of which is line `first`."""

    path: Path
    first: int
    raw: bytes
    input_bytes: int

    @property
    def held_bytes(self) -> int:
        """All of the lines."""
        return len(self.raw)

    def documents(self, field: str) -> Iterator[Labelled]:
        """The string under `field` of each line's object; blank lines are passed over."""
        for number, line in lines(self.raw, self.first):
            if line and not line.isspace():
                yield f"{self.path}, line {number:,}", _text(line, self.path, number, field)


def parts(path: Path, field: str = "text") -> Iterator[Lines]:
    """The file in stretches of about a MiB, not decoded yet: that is most of the work of reading."""
    chunks = Counted(read_chunks(path))
    for first, raw in whole_lines(_chunks(chunks, path), path, _PART_BYTES):
        yield Lines(path, first, raw, chunks.take())


def documents(path: Path, field: str = "text") -> Iterator[str]:
    """The string under `field` of each line's object; blank lines are passed over.

    Raises DataError, with the line number, for a line that is no JSON object, lacks the field, or is not
    UTF-8.
    """
    for part in parts(path):
        for _, text in part.documents(field):
            yield text


def _text(line: bytes, path: Path, number: int, field: str) -> str:
    where = f"line {number:,}"
    try:
        record = _DECODER.decode(decode(line, path, where))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, {where} is not JSON ({error.msg} at column {error.colno}): each line must be one JSON object"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}, {where} is nested too deeply: each line must be one flat JSON object") from error
    if not isinstance(record, dict):
        raise DataError(f'{path}, {where} is no JSON object: each line must look like {{"{field}": "..."}}')
    if field not in record:
        raise DataError(f"{path}, {where} has no field {field!r}: {name_field(record)}")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{path}, {where}: field {field!r} holds a {type(text).__name__}, not a string of text")
    return check_surrogates(text, path, where)


def _chunks(raw: Iterable[bytes], path: Path) -> Iterable[bytes]:
    if path.name.lower().endswith(".gz"):
        return _gunzip(raw, path)
    if path.name.lower().endswith(".zst"):
        return _unzstd(raw, path)
    return raw


def _gunzip(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Decompressed gzip members, which any number of zeros may follow; output comes in bounded pieces."""
    member = zlib.decompressobj(wbits=31)
    started = False
    try:
        for chunk in chunks:
            while chunk := chunk.lstrip(b"\0") if member.eof else chunk:
                if member.eof:
                    member = zlib.decompressobj(wbits=31)
                started = True
                yield member.decompress(chunk, 1 << 20)
                chunk = member.unused_data if member.eof else member.unconsumed_tail
    except zlib.error as error:
        raise DataError(f"{path} is damaged ({error}): download or compress it again") from error
    if started and not member.eof:
        yield member.flush()
        if not member.eof:
            raise DataError(f"{path} is cut short: download or compress it again")


def _unzstd(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Decompressed Zstandard frames; output comes in bounded pieces. Unlike the library's stream reader, it notices a
    truncated file."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    frame, complete = decompressor.decompressobj(), True
    try:
        for chunk in chunks:
            for start in range(0, len(chunk), _ZSTD_INPUT_BYTES):
                piece = chunk[start : start + _ZSTD_INPUT_BYTES]
                while piece:
                    if text := frame.decompress(piece):
                        yield text
                    complete, piece = frame.eof, frame.unused_data if frame.eof else b""
                    if frame.eof:
                        frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise DataError(f"{path} is damaged ({error}): download or compress it again") from error
    if not complete:
        raise DataError(f"{path} is cut short: download or compress it again")
