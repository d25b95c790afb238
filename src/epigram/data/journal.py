"""The journal of a build: from time to time everything that a later process needs to go on is on the disk."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epigram.data.files import written_beside

_NAME = "build.json"
EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a build stands. fingerprint: of all that it depends on. phase: number of the pass over the files. place:
    in the files, behind what is done (`data.works`). documents: read so far, of each file. duplicates, repeated: left
    out of train, left out of each split. writers: state of each split.
    """

    fingerprint: str
    phase: int
    place: tuple[int, int]
    documents: list[int]
    duplicates: int
    repeated: dict[str, int]
    writers: dict[str, Any]


class Journal:
    """Writes entries into a folder, not oftener than every `EVERY_S` seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._last_s = folder, time.monotonic()
        self.has_written = has_journal(folder)

    def is_due(self) -> bool:
        """Whether the last entry is old enough."""
        return time.monotonic() - self._last_s >= EVERY_S

    def write(self, entry: Entry) -> None:
        """Replace the entry; what it speaks of is on the disk already."""
        with written_beside(self._folder / _NAME) as file:
            file.write(json.dumps(asdict(entry)).encode())
        self._last_s, self.has_written = time.monotonic(), True


def read_entry(folder: Path) -> Entry | None:
    """The entry in a folder; None where there is none that can be read."""
    try:
        values = json.loads((folder / _NAME).read_bytes())
        return Entry(**{**values, "place": tuple(values["place"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def has_journal(folder: Path) -> bool:
    """Whether a build could go on in a folder."""
    return (folder / _NAME).exists()


def journal_fingerprint(folder: Path) -> str | None:
    """What the build in a folder depends on, None where nothing is known."""
    entry = read_entry(folder)
    return entry.fingerprint if entry else None


def journal_age_s(folder: Path) -> float | None:
    """Seconds since the last entry, or where there is none since the folder was changed."""
    try:
        path = folder / _NAME
        return time.time() - (path if path.exists() else folder).stat().st_mtime
    except OSError:
        return None


def remove_journal(folder: Path) -> None:
    """The build is complete."""
    (folder / _NAME).unlink(missing_ok=True)
