"""Apache Parquet with a column of strings, read in small batches."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epigram.data.sources.base import MAX_DOCUMENT_BYTES, Labelled, name_field
from epigram.errors import DataError, UserError

HAS_FIELDS = True
_BATCH_ROWS = 16
_BUFFER_BYTES = 1 << 20  # without a buffer a whole column chunk is read at once


def claims(path: Path) -> bool:
    """*.parquet."""
    return path.name.lower().endswith(".parquet")


@dataclass(frozen=True)
class Rows:
    """One row group of a file, which begins with row `first`, without its first `skipped` rows."""

    path: Path
    group: int
    first: int
    input_bytes: int
    skipped: int = 0
    held_bytes: int = 0  # whoever decodes it reads it

    def documents(self, field: str) -> Iterator[Labelled]:
        """Values of the column `field`, in row order."""
        pyarrow = _library()
        with _readable(self.path, pyarrow) as file:
            batches = file.iter_batches(_BATCH_ROWS, row_groups=[self.group], columns=[field], use_threads=False)
            values = (value for batch in batches for value in batch.column(0))
            for row, value in enumerate(itertools.islice(values, self.skipped, None), self.first + self.skipped + 1):
                yield f"{self.path}, row {row:,}", _text(value, self.path, row, field)

    def after(self, num_documents: int) -> "Rows":
        """The part without so many more documents: a row group can hold more than is good for one process."""
        return replace(self, skipped=self.skipped + num_documents, input_bytes=0)


def parts(path: Path, field: str = "text") -> Iterator[Rows]:
    """The row groups of the file.

    Raises DataError for a damaged file, and a missing column or one that is no string.
    """
    pyarrow = _library()
    with _readable(path, pyarrow) as file:
        _check_column(path, file.schema_arrow, field, pyarrow.types)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    num_bytes, first, total = path.stat().st_size, 0, max(sum(sizes), 1)
    for group, size in enumerate(sizes):
        yield Rows(path, group, first, num_bytes * size // total)
        first += size


def documents(path: Path, field: str = "text") -> Iterator[str]:
    """Values of the column `field`, in row order.

    Raises DataError for a damaged file, a missing column or one that is no string, and a row without a value.
    """
    for part in parts(path, field):
        for _, text in part.documents(field):
            yield text


def _library() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(
            "reading .parquet needs the library pyarrow: pip install 'epigram[parquet]', or convert the file to .jsonl"
        ) from error
    return pyarrow


@contextlib.contextmanager
def _readable(path: Path, pyarrow: Any) -> Iterator[Any]:
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({_first_line(error)}): download or write it again"
        ) from error


def _check_column(path: Path, schema: Any, field: str, types: Any) -> None:
    if field not in schema.names:
        raise DataError(f"{path} has no column {field!r}: {name_field(schema.names)}")
    kind = schema.field(field).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise DataError(f"{path}: column {field!r} holds {kind}, not strings of text")


def _text(value: Any, path: Path, row: int, field: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, row {row:,}: {field!r} is not UTF-8 at byte {error.start:,}: write it again"
        ) from error
    if text is None:
        raise DataError(f"{path}, row {row:,} has no {field!r}: remove the rows without text")
    if len(text) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{path}, row {row:,} is longer than {MAX_DOCUMENT_BYTES >> 20} MiB: split this document into shorter ones"
        )
    return text


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
