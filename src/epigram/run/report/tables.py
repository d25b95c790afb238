"""Tables of the report: rows of plain values in, columns and cells of text out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from epigram.run.report.reader import is_number
from epigram.typed import leaves

# Headings of keys that need more than their underscores replaced. A unit goes into the heading, not into the
# cells.
_HEADINGS = {
    "val_bpb": "bits per byte",
    "val_nats": "nats per token",
    "bpb": "bits per byte",
    "seq_len": "window",
    "score_s": "time (s)",
    "name": "",
    "peak_memory_bytes": "peak memory",
    "lost_bpb": "difference",
    "tensor_class": "class",
    "stored_bytes": "bytes",
}
_NOTHING = "\u2013"  # in a cell without a value
_UNITS = {"_s": " (s)", "_ms": " (ms)"}


@dataclass(frozen=True)
class Cell:
    """text; bar: share 0..1 of the column's largest value to draw behind it, None for none."""

    text: str
    is_number: bool = False
    bar: float | None = None


@dataclass(frozen=True)
class Grid:
    """A table to be drawn. strong: the rows that stand out."""

    headings: list[Cell]
    rows: list[list[Cell]]
    strong: frozenset[int] = field(default_factory=frozenset)


def grid(rows: Sequence[Mapping[str, Any]], bar: str = "", strong: Sequence[int] = ()) -> Grid:
    """Columns are the keys in order of appearance, without those that no row fills.

    bar: the key of the column drawn as bars. strong: indices of rows that stand out.
    """
    every = dict.fromkeys(key for row in rows for key in row)
    keys = [key for key in every if any(row.get(key) is not None for row in rows)]
    numeric = {key for key in keys if all(is_number(row[key]) for row in rows if row.get(key) is not None)}
    largest = max((row[bar] for row in rows if is_number(row.get(bar))), default=0)
    return Grid(
        [Cell(heading(key), key in numeric) for key in keys],
        [
            [
                Cell(
                    text(key, row.get(key)),
                    key in numeric,
                    _share(row.get(key), largest) if key == bar else None,
                )
                for key in keys
            ]
            for row in rows
        ],
        frozenset(strong),
    )


def _share(value: Any, largest: float) -> float | None:
    return max(0.0, value / largest) if largest > 0 and is_number(value) else None


def heading(key: str) -> str:
    """What stands over the column of a key: "score_s" becomes "time (s)"."""
    if key in _HEADINGS:
        return _HEADINGS[key]
    for suffix, unit in _UNITS.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix).replace("_", " ") + unit
    return key.replace("_", " ").replace("bpb", "bits per byte")


def text(key: str, value: Any) -> str:
    """A value as a person reads it: thousands apart, scores with four decimals, times with one."""
    if value is None:
        return _NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _words(value)
    if not math.isfinite(value):
        return str(value)
    if key == "seed":
        return str(value)  # a name rather than an amount
    if key.endswith("memory_bytes"):
        return f"{value / 1e9:.2f} GB"
    if key.endswith(("bpb", "nats")):
        return f"{value:.4f}"
    if "bits" in key.split("_"):
        return f"{value:.2f}"
    if key.endswith("_s") and key != "tokens_per_s":
        return f"{value:,.1f}"
    if isinstance(value, int) or (abs(value) >= 1000 and key != "step"):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        apart = "; " if any(isinstance(item, Mapping) for item in value) else ", "
        return apart.join(_words(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    return str(value)


def pairs(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the leaves of nested tables, names dotted."""
    return [(name, _words(value)) for name, value in leaves(table)]


def duration(seconds: float) -> str:
    """Seconds in words: 41.2 s, 9 min 46 s, 1 h 3 min."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
