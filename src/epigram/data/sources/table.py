"""Tables in text, .csv (commas) and .tsv (tabs), with the names of the columns in the first row: one document a row.

Fields are read as Python's csv module reads what Excel writes: one that holds separators, quotes or line ends is in
double quotes, and a quote within it is written twice. What does not keep to that is an error, not a guess.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from epigram.data.sources import base
from epigram.data.sources.base import Labelled, TextPart, decode, name_field, read_chunks, unix_lines, whole_lines
from epigram.errors import DataError

HAS_FIELDS = True
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_PART_BYTES = 1 << 20  # of rows


def claims(path: Path) -> bool:
    """*.csv and *.tsv."""
    return path.suffix.lower() in _SEPARATORS


def parts(path: Path, field: str = "text") -> Iterator[TextPart]:
    """The rows in stretches of about a MiB, read already: a line end within quotes ends no row, so that a file cannot
    be cut without reading it."""
    texts: list[Labelled] = []
    read = _Lines(path)
    for document in _rows(read, path, field):
        texts.append(document)
        if read.num_bytes >= _PART_BYTES:
            yield TextPart(tuple(texts), read.take())
            texts = []
    if texts:
        yield TextPart(tuple(texts), read.take())


def documents(path: Path, field: str = "text") -> Iterator[str]:
    """Values of the column `field`, in row order; empty rows are passed over.

    Raises DataError, with the number of the line that the row ends in, for a missing column, a row with more or fewer
    fields than the first, quotes that do not close, and text that is not UTF-8.
    """
    for part in parts(path, field):
        for _, text in part.documents(field):
            yield text


class _Lines:
    """The lines of a file with their ends. num_bytes: since the last `take`."""

    def __init__(self, path: Path) -> None:
        self._path, self.num_bytes = path, 0

    def __iter__(self) -> Iterator[str]:
        for first, raw in whole_lines(read_chunks(self._path), self._path, _PART_BYTES):
            for number, line in enumerate(raw.splitlines(keepends=True), first):
                self.num_bytes += len(line)
                yield decode(line, self._path, f"line {number:,}")

    def take(self) -> int:
        taken, self.num_bytes = self.num_bytes, 0
        return taken


def _rows(lines: _Lines, path: Path, field: str) -> Iterator[Labelled]:
    # A document may be longer than csv's 128 KiB. The limit is the process's; nobody needs the lower one back.
    csv.field_size_limit(max(csv.field_size_limit(), base.MAX_DOCUMENT_BYTES))
    rows = csv.reader(iter(lines), delimiter=_SEPARATORS[path.suffix.lower()], strict=True)
    try:
        names = next(filter(None, rows), [])
        column = _column(names, path, field)
        for row in rows:
            if not row:
                continue
            where = f"{path}, line {rows.line_num:,}"
            if len(row) != len(names):
                raise DataError(
                    f"{where}: a row of {len(row)} fields ends here, and the first row names {len(names)}: put fields "
                    "that hold separators or quotes in double quotes, or mend the row"
                )
            yield where, unix_lines(row[column])
    except csv.Error as error:
        raise DataError(
            f"{path}, line {rows.line_num:,} cannot be read as {path.suffix[1:].upper()} ({error}): put fields "
            "that hold separators, quotes or line ends in double quotes, with quotes in them written twice, and keep "
            f"documents under {base.MAX_DOCUMENT_BYTES >> 20} MiB"
        ) from error


def _column(names: list[str], path: Path, field: str) -> int:
    if names.count(field) != 1:
        fault = "several columns" if field in names else "no column"
        raise DataError(f"{path} has {fault} {field!r}: {name_field(names)}")
    return names.index(field)
