"""What the sources of text share: which source reads a file, and the sentences for text that cannot be read.

A source is one file of this folder with two functions:

    claims(path: Path) -> bool                               whether the source reads this path, from its name
    alone documents(path: Path, field: str) -> Iterator[str]       the documents, in a fixed order; `field`
    holds the text of
                                                             a record, where the format has records

and, where the hash of the file's bytes will not do, `content_hash(path: Path) -> str`, which must change with
the text. They are importable without the source's own library, which `documents` imports. Documents may be
empty; whoever reads them drops those. Whatever the file, a source holds a bounded part of it in memory
(`MAX_DOCUMENT_BYTES`).
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from epigram import plugin
from epigram.errors import DataError

PACKAGE = "epigram.data.sources"
FALLBACK = "text"  # reads whatever no other source claims
MAX_DOCUMENT_BYTES = 16 << 20  # of one record, so that memory stays bounded whatever the input
READ_BYTES = 1 << 20
_MARKS = {  # first bytes of what is often taken for text
    b"\xff\xfe": "like UTF-16",
    b"\xfe\xff": "like UTF-16",
    b"\x1f\x8b": "compressed with gzip, which is read for .jsonl.gz only",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard, which is read for .jsonl.zst only",
    b"\xfd7zXZ": "compressed with xz, which is not read",
    b"PK\x03\x04": "like a zip archive or an office document",
}


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
        position = f"byte {offset + error.start:,}"
        raise DataError(
            f"{path} is not UTF-8 at {f'{where}, {position}' if where else position} "
            f"(0x{raw[error.start]:02x}): {hint}convert it to UTF-8 (for example with iconv), or leave it out"
        ) from error


def lines(chunks: Iterable[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines without their line end, numbered from 1; DataError for a line above `MAX_DOCUMENT_BYTES`."""
    parts: list[bytes] = []
    number, pending_bytes = 1, 0
    for chunk in itertools.chain(chunks, [b""]):
        *complete, rest = chunk.split(b"\n")
        for end in complete:
            yield number, b"".join([*parts, end]).rstrip(b"\r")
            number, parts, pending_bytes = number + 1, [], 0
        parts.append(rest)
        pending_bytes += len(rest)
        if pending_bytes > MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{path}, line {number} is longer than {MAX_DOCUMENT_BYTES >> 20} MiB: split this document "
                "into shorter ones, one a line"
            )
    if any(parts):
        yield number, b"".join(parts).rstrip(b"\r")


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
    return last
