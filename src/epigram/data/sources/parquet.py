"""Apache Parquet with a column of strings, read in small batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epigram.data.sources.base import MAX_DOCUMENT_BYTES
from epigram.errors import DataError, UserError

_BATCH_ROWS = 16
_BUFFER_BYTES = 1 << 20  # without a buffer a whole column chunk is read at once


def claims(path: Path) -> bool:
    """*.parquet."""
    return path.name.lower().endswith(".parquet")


def documents(path: Path, field: str = "text") -> Iterator[str]:
    """Values of the column `field`, in row order.

    Raises DataError for a damaged file, a missing column or one that is no string, and a row without a value.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(
            "reading .parquet needs the library pyarrow: pip install 'epigram[parquet]', or convert the file to .jsonl"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            _check_column(path, file.schema_arrow, field, pyarrow.types)
            row = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=[field], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    yield _text(value, path, row, field)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({_first_line(error)}): download or write it again"
        ) from error


def _check_column(path: Path, schema: Any, field: str, types: Any) -> None:
    if field not in schema.names:
        columns = ", ".join(map(repr, schema.names[:8])) or "none"
        raise DataError(f"{path} has no column {field!r}: name the one that holds the text (it has {columns})")
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
