"""What every metrics writer offers.

A writer is one file in this folder with a class `Writer`:

    Writer(folder, name, config)   folder: of the run; name: of the run; config: resolved, as nested tables
    write(row)                     one line of metrics: flat, plain values, non-finite numbers already None
    close(result)                  the run is over, with its result (as in result.json), however it ended

`jsonl` is always on; the others are chosen by name, and their libraries are imported only then.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

PACKAGE = "epigram.run.writers"

Row = Mapping[str, Any]


class MetricsWriter(Protocol):
    """See the module's text."""

    def write(self, row: Row) -> None: ...

    def close(self, result: Mapping[str, Any]) -> None: ...


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tables under dotted names; lists become text."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, bool | int | float | str) else str(value)


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numeric values of a row or result, under dotted names; truth values are no numbers."""
    return {k: v for k, v in flat(row) if isinstance(v, int | float) and not isinstance(v, bool)}
