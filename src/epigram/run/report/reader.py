"""Reads a run folder in whatever state its run left it: what is missing or damaged is named, never fatal."""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epigram.errors import UserError
from epigram.run.record import CONFIG, ENVIRONMENT, LOG, RESULT, SAMPLES
from epigram.run.writers.jsonl import FILE as METRICS

_LOG_LINES = 20
_LOG_BYTES = 16_384  # of the end of a log, which may be long

Table = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds. result, config, environment: empty where the file is missing or damaged.

    rows: the lines of metrics.jsonl, steps ascending. log_tail: the last lines of the log. problems: what
    could not be read, in sentences.
    """

    name: str
    folder: Path
    config: Table
    environment: Table
    result: Table
    rows: tuple[Table, ...]
    samples: tuple[Table, ...]
    log_tail: tuple[str, ...]
    problems: tuple[str, ...]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of every row that has a finite number under `key`."""
        points = [(row["step"], row[key]) for row in self.rows if is_number(row.get(key))]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    def part(self, key: str) -> Table:
        """A table of the result; empty where it is missing or no table."""
        return as_table(self.result.get(key))

    def list_of_rows(self, key: str) -> list[Table]:
        """A list of rows of the result, such as "sizes"; what is no row is left out."""
        found = self.result.get(key)
        return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def is_number(value: Any) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_table(value: Any) -> Table:
    """`value` if it is a table, else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises UserError when there is no such folder, or none of a run's files in it."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder of a run")
    if not any((folder / name).is_file() for name in (CONFIG, RESULT, METRICS, LOG)):
        raise UserError(f"{folder} is no run folder: it has none of {CONFIG}, {RESULT}, {METRICS}, {LOG}")
    problems: list[str] = []
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=_read_toml(folder / CONFIG, problems),
        environment=_read_json(folder / ENVIRONMENT, problems),
        result=_read_json(folder / RESULT, problems),
        rows=tuple(_latest(_read_lines(folder / METRICS, problems, needed=True))),
        samples=tuple(_read_lines(folder / SAMPLES, problems, needed=False)),
        log_tail=tuple(_tail(folder / LOG)),
        problems=tuple(problems),
    )


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
    return None


def _read_toml(path: Path, problems: list[str]) -> Table:
    if (text := _text(path, problems)) is None:
        return {}
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problems.append(f"{path.name} is damaged: {error}")
        return {}


def _read_json(path: Path, problems: list[str]) -> Table:
    if (text := _text(path, problems)) is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name} is damaged: {error}")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} is damaged: it holds no table")
        return {}
    return found


def _read_lines(path: Path, problems: list[str], *, needed: bool) -> list[Table]:
    """The lines that are whole tables; the others are counted in one sentence."""
    if not needed and not path.exists():
        return []
    found, damaged = [], 0
    for line in (_text(path, problems) or "").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            found.append(row)
        else:
            damaged += 1
    if damaged:
        problems.append(f"{path.name} has {damaged} damaged line(s), which are left out")
    return found


def _latest(rows: list[Table]) -> list[Table]:
    """Rows with a step, in order; what a resumed run did again replaces what was there."""
    kept: list[Table] = []
    for row in rows:
        if not is_number(step := row.get("step")):
            continue
        if kept and step < kept[-1]["step"]:
            kept = [old for old in kept if _order(old) < _order(row)]
        kept.append(row)
    return kept


def _order(row: Table) -> tuple[float, bool]:
    """A step's training comes before the validation of the weights that it led to."""
    return row["step"], "train_loss" not in row


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return []
