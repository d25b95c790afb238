"""A record folder as it lies on disk, ours or anybody's. Nothing in it is run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epigram.errors import UserError
from epigram.run.submission.bundle import MARK, read_script
from epigram.run.submission.logs import LogFacts, is_count, read_log

CODE = frozenset({".py", ".pyx", ".cu", ".cuh", ".c", ".cpp", ".h", ".so", ".sh", ".lzma", ".zip"})
_LOGS = "train*.log"
_ABOUT = frozenset({"README.md", "submission.json", "requirements.txt"})


@dataclass(frozen=True, kw_only=True)
class Record:
    """json: None where submission.json is missing or no table; then `json_problem` says so if it is there. readme,
    script, requirements: None where missing. artifacts: our packed models by seed."""

    folder: Path
    json: dict[str, Any] | None
    json_problem: str | None
    readme: str | None
    script: str | None
    requirements: str | None
    logs: tuple[LogFacts, ...]
    artifacts: dict[int, Path]

    @property
    def is_ours(self) -> bool:
        """Whether its runs were made by epigram."""
        return bool(self.logs) and all(log.is_ours for log in self.logs)

    @property
    def has_our_script(self) -> bool:
        """Whether train_gpt.py says that it is one of ours."""
        return self.script is not None and f"\n{MARK} = " in self.script

    @property
    def code(self) -> list[Path]:
        return [path for path in self._files() if path.suffix in CODE and path.is_file()]

    @property
    def extras(self) -> list[Path]:
        """What is neither code, log, artifact of a logged seed, nor one of the files that speak of the record.

        Of another script's artifacts nothing but the size is known: one file as large as a log says is taken for it.
        """
        seeds = {log.seed for log in self.logs}
        known = {path for seed, path in self.artifacts.items() if seed in seeds} | set(self.folder.glob(_LOGS))
        sizes = [log.artifact_bytes for log in self.logs if log.seed not in self.artifacts]
        extras = []
        for path in self._files():
            if path in known or path.suffix in CODE or (path.parent == self.folder and path.name in _ABOUT):
                continue
            if (size := size_of(path)) in sizes:
                sizes.remove(size)
                continue
            extras.append(path)
        return extras

    @property
    def code_bytes(self) -> int:
        """Of everything in the folder that is code, and of what a script could read beside it: all of it counts."""
        return sum(map(size_of, [*self.code, *self.extras]))

    def _files(self) -> list[Path]:
        """Files of the folder and its folders, and links, also those to folders."""
        return [path for path in sorted(self.folder.rglob("*")) if path.is_symlink() or path.is_file()]

    @property
    def seeds(self) -> list[int]:
        """Seeds that submission.json claims: those of `seeds`, else the keys of `seed_results` that are numbers."""
        named = (self.json or {}).get("seeds")
        if isinstance(named, list) and all(type(seed) is int for seed in named):
            return named
        rows = (self.json or {}).get("seed_results")
        return [int(key) for key in rows if is_count(key)] if isinstance(rows, dict) else []

    def artifact_bytes(self, log: LogFacts) -> int | None:
        """Of the seed of this log: as its file lies there, else as the log says."""
        if log.seed in self.artifacts:
            return self.artifacts[log.seed].stat().st_size
        if log.artifact_bytes is None and log.total_bytes is not None and log.code_bytes is not None:
            return log.total_bytes - log.code_bytes
        return log.artifact_bytes


def read_record(folder: Path) -> Record:
    """The folder's contents; a link that leads nowhere is no file. Raises UserError when there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"there is no record folder {folder}")
    if not any(any(folder.glob(name)) for name in ("train_gpt.py", "submission.json", "*.log")):
        raise UserError(f"{folder} is no record folder: it has no train_gpt.py, no submission.json and no log")
    found, problem = None, None
    if (text := _text(folder / "submission.json")) is not None:
        try:
            found = json.loads(text, parse_constant=_refuse)
            if not isinstance(found, dict):
                found, problem = None, "it holds no table"
        except (ValueError, RecursionError) as error:
            problem = str(error)
    artifacts = {}
    for path in sorted(folder.glob("model_seed*.epigram")):
        if (seed := path.stem.removeprefix("model_seed")) and is_count(seed) and path.is_file():
            artifacts[int(seed)] = path
    return Record(
        folder=folder,
        json=found,
        json_problem=problem,
        readme=_text(folder / "README.md"),
        script=read_script(path) if (path := folder / "train_gpt.py").is_file() else None,
        requirements=_text(folder / "requirements.txt"),
        logs=tuple(read_log(path) for path in sorted(folder.glob(_LOGS)) if path.is_file()),
        artifacts=artifacts,
    )


def size_of(path: Path) -> int:
    """Bytes of a file, or of the file that a link leads to."""
    return path.stat().st_size if path.is_file() else 0


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _text(path: Path) -> str | None:
    return path.read_text("utf-8", errors="replace") if path.is_file() else None
