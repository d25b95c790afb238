"""What the sources of text share: which source reads a file, and the sentences for text that cannot be read.

A source is one file of this folder with two functions:

    claims(path: Path) -> bool     whether the source reads this path, from its name alone
    documents(path: Path, field: str) -> Iterator[str]
                                   the documents, in a fixed order; `field` holds the text of a record, where the
                                   format has records

and, where they apply, two more:

    content_hash(path: Path) -> str
                                   where the hash of the file's bytes will not do: it must change with the text
    parts(path: Path, field: str) -> Iterator[Part]
                                   where a file can be cut without decoding it, so that documents are decoded where
                                   they are encoded

One whose `field` means something says HAS_FIELDS = True. They are importable without the source's own library, which is
imported when text is read. Documents may be empty; whoever reads them drops those. Whatever the file, a source holds a
bounded part of it in memory (`MAX_DOCUMENT_BYTES`).
"""

import codecs
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from epigram import plugin
from epigram.errors import DataError

Labelled = tuple[str, str]  # where a document comes from, for messages, and its text
PACKAGE = "epigram.data.sources"
FALLBACK = "text"  # reads whatever no other source claims
MAX_DOCUMENT_BYTES = 16 << 20  # of one record, so that memory stays bounded whatever the input
READ_BYTES = 1 << 20
READING = 2  # raised when the same files give other documents than before: what was built of them is then built anew
BOM = "\ufeff"  # in front of a file it marks the encoding, and is no text
_BOM_BYTES = codecs.BOM_UTF8
_MARKS = {  # first bytes of what is often taken for text
    b"\xff\xfe": "like UTF-16",
    b"\xfe\xff": "like UTF-16",
    b"\x1f\x8b": "compressed with gzip, which is read for .jsonl.gz only",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard, which is read for .jsonl.zst only",
    b"\xfd7zXZ": "compressed with xz, which is not read",
    b"PK\x03\x04": "like a zip archive or an office document",
    b"%PDF-": "like a PDF, whose text has to be extracted first",
    b"\x89PNG": "like a picture",
    b"\xff\xd8\xff": "like a picture",
}


class Part(Protocol):
    """A stretch of a file that any process can turn into documents, without what comes before it.

    input_bytes: how much of the file it is, for progress. held_bytes: of text that the part itself carries.
    """

    @property
    def input_bytes(self) -> int: ...

    @property
    def held_bytes(self) -> int: ...

    def documents(self, field: str) -> Iterator[Labelled]:
        """The documents of the part; DataError when they cannot be read."""
        ...


@dataclass(frozen=True)
class TextPart:
    """Documents that are decoded already."""

    texts: tuple[Labelled, ...]
    input_bytes: int

    @property
    def held_bytes(self) -> int:
        """All of the text."""
        return self.input_bytes

    def documents(self, field: str) -> Iterator[Labelled]:
        """The documents as they are."""
        return iter(self.texts)


class Counted:
    """Passes chunks on and counts their bytes."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._bytes = chunks, 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._bytes += len(chunk)
            yield chunk

    def take(self) -> int:
        """Bytes since the last call."""
        taken, self._bytes = self._bytes, 0
        return taken


def source_for(path: Path) -> str:
    """Name of the source that reads `path`: the one that claims it, else plain text."""
    special = [name for name in plugin.names(PACKAGE) if name != FALLBACK]
    claiming = [name for name in special if load(name).claims(path)]
    assert len(claiming) <= 1, f"{path} is claimed by {claiming}"
    return claiming[0] if claiming else FALLBACK


def load(name: str) -> ModuleType:
    """The source called `name`; UserError with the choices when there is none."""
    return plugin.load(PACKAGE, name)


def read_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in pieces of at most `READ_BYTES`; DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                yield chunk
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def decode(raw: bytes, path: Path, where: str, offset: int = 0) -> str:
    """`raw` as UTF-8; DataError that names the file, `where` in words and the byte, counted from `offset`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        looks = [what for mark, what in _MARKS.items() if not offset and raw.startswith(mark)]
        hint = f"it looks {looks[0]}: " if looks else ""
        remedy = "unpack it" if "compressed" in hint else "convert it to UTF-8 (for example with iconv)"
        position = f"byte {offset + error.start:,}"
        raise DataError(
            f"{path} is not UTF-8 at {f'{where}, {position}' if where else position} "
            f"(0x{raw[error.start]:02x}): {hint}{remedy}, or leave it out"
        ) from error


def lines(raw: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    """The lines of `raw` without their line ends, numbered from `first`."""
    rows = raw.split(b"\n")
    if not rows[-1]:
        rows.pop()
    for number, row in enumerate(rows, first):
        yield number, row.rstrip(b"\r")


def whole_lines(chunks: Iterable[bytes], path: Path, part_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Stretches of whole lines, each as short as it can be from `part_bytes` on, with the numbers of their first lines,
    from 1. They do not depend on how the file is cut into chunks. A byte order mark in front of the first is left out.

    DataError for a line above `MAX_DOCUMENT_BYTES`.
    """
    pending, first = bytearray(), 1
    for chunk in chunks:
        searched = max(len(pending), part_bytes - 1)
        pending += chunk
        while (end := pending.find(b"\n", searched) + 1) > 0:
            raw = bytes(pending[:end])
            del pending[:end]
            yield first, raw.removeprefix(_BOM_BYTES) if first == 1 else raw
            first += raw.count(b"\n")
            searched = part_bytes - 1
        if len(pending) > MAX_DOCUMENT_BYTES + part_bytes:
            raise DataError(
                f"{path}, line {first + pending.count(10)} is longer than {MAX_DOCUMENT_BYTES >> 20} MiB: split this "
                "document into shorter ones, one a line"
            )
    if pending:
        yield first, bytes(pending).removeprefix(_BOM_BYTES) if first == 1 else bytes(pending)


def unix_lines(text: str) -> str:
    """Text whose lines end in CR LF, as those of Windows do, with lines that end in LF."""
    return text.replace("\r\n", "\n")


def name_field(names: Iterable[str]) -> str:
    """What to do about records that have these fields, and not the one that was asked for."""
    shown = ", ".join(map(repr, itertools.islice(names, 8))) or "none"
    return (
        "name the one that holds the text, `epigram data build ... --field NAME`, and give other commands the folder "
        f"that it builds (it has {shown})"
    )


def check_surrogates(text: str, path: Path, where: str) -> str:
    """`text`, unless it holds half a surrogate pair (a broken escape in JSON), which UTF-8 cannot express."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}, {where}: the text holds half a surrogate pair (character {error.start:,}), which is no "
            "valid Unicode: mend or remove this document"
        ) from error
    return text


def split_paragraphs(chunks: Iterable[bytes], target_bytes: int) -> Iterator[bytes]:
    """Pieces of about `target_bytes` whose concatenation is the input, cut where the text allows it best.

    The cut is the last paragraph end (a blank line) between the target and twice the target, else the last
    line end, else the last blank, else between two characters. An input up to twice the target is one piece.
    """
    pending = b""
    for chunk in chunks:
        pending += chunk
        start = 0
        while len(pending) - start > 2 * target_bytes:
            end = _cut(pending, start + target_bytes, start + 2 * target_bytes)
            yield pending[start:end]
            start = end
        pending = pending[start:]
    if pending:
        yield pending


def _cut(text: bytes, first: int, last: int) -> int:
    """Best place in (first, last] to end a piece of UTF-8 `text`, which is longer than `last`."""
    for mark in (b"\n\n", b"\r\n\r\n", b"\n", b" "):
        found = text.rfind(mark, first, last)
        if found >= 0:
            return found + len(mark)
    while text[last] & 0xC0 == 0x80 and last > first:  # inside a character
        last -= 1
    return last - (text[last - 1 : last + 1] == b"\r\n")  # inside a line end
