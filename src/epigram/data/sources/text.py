"""Plain text in UTF-8: a small file is one document, a large one is cut at paragraph ends.

A file is cut so that a part of it can be held out for validation: into pieces of about 32 kB, or a fortieth
of the file where that is less (never under 2 kB). The pieces put together are the text of the file, byte for byte. In a
folder, where each file is a document of its own, only files above 1 MiB are cut.

The text is without a byte order mark in front, and its lines end in LF where they ended in CR LF: nobody wrote either,
and a model would have to learn both of some files and neither of others. A CR alone is kept.
"""

from collections.abc import Iterator
from pathlib import Path

from epigram.data.sources.base import BOM, READ_BYTES, decode, read_chunks, split_paragraphs, unix_lines
from epigram.errors import DataError

PIECE_BYTES = 32_768
SMALLEST_PIECE_BYTES = 2_048
PIECES = 40  # that a small file is cut into, when each is at least SMALLEST_PIECE_BYTES
WHOLE_BYTES = READ_BYTES  # a file of a folder up to this size stays one document


def claims(path: Path) -> bool:
    """Any file: this source reads what the others leave."""
    return path.is_file()


def documents(path: Path, field: str = "text", *, whole: bool = False) -> Iterator[str]:
    """Documents of a text file; with `whole` a file up to `WHOLE_BYTES` is one. `field` has no meaning here.

    Raises DataError for text that is not UTF-8, with the byte's offset in the file.
    """
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    piece_bytes = min(PIECE_BYTES, max(SMALLEST_PIECE_BYTES, num_bytes // PIECES))
    if whole and num_bytes <= WHOLE_BYTES:
        piece_bytes = WHOLE_BYTES
    offset = 0
    for piece in split_paragraphs(read_chunks(path), piece_bytes):
        text = decode(piece, path, "", offset)
        yield unix_lines(text if offset else text.removeprefix(BOM))
        offset += len(piece)
