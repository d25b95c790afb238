"""metrics.jsonl in the run folder: one JSON object a line, on disk as soon as it is written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epigram.run.writers.base import Row

FILE = "metrics.jsonl"


class Writer:
    """Appends to `FILE`, after cutting off a line that a crash left half-written."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        path = folder / FILE
        cut_unfinished_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """One line."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self, result: Mapping[str, Any]) -> None:
        """The lines are on disk already."""
        self._file.close()


def cut_unfinished_line(path: Path) -> None:
    """Shorten the file to its last complete line; nothing to do where there is no file."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
