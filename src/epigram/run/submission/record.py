"""A record folder as it lies on disk, ours or anybody's. Nothing in it is run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epigram.errors import UserError
from epigram.run.submission.bundle import read_script
from epigram.run.submission.logs import LogFacts, read_log

_CODE = frozenset({".py", ".pyx", ".cu", ".cuh", ".c", ".cpp", ".h", ".so", ".sh", ".lzma", ".zip"})


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
    def code_bytes(self) -> int:
        """Of everything in the folder that is code: all of it counts."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.suffix in _CODE and path.is_file())

    @property
    def seeds(self) -> list[int]:
        """Seeds that submission.json claims: those of `seeds`, else the keys of `seed_results` that are numbers."""
        named = (self.json or {}).get("seeds")
        if isinstance(named, list) and all(type(seed) is int for seed in named):
            return named
        rows = (self.json or {}).get("seed_results")
        return [int(key) for key in rows if str(key).isdigit()] if isinstance(rows, dict) else []

    def artifact_bytes(self, log: LogFacts) -> int | None:
        """Of the seed of this log: as its file lies there, else as the log says."""
        if log.seed in self.artifacts:
            return self.artifacts[log.seed].stat().st_size
        if log.artifact_bytes is None and log.total_bytes is not None and log.code_bytes is not None:
            return log.total_bytes - log.code_bytes
        return log.artifact_bytes


def read_record(folder: Path) -> Record:
    """The folder's contents. Raises UserError when it is none."""
    if not folder.is_dir():
        raise UserError(f"there is no record folder {folder}")
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
        if (seed := path.stem.removeprefix("model_seed")).isdigit():
            artifacts[int(seed)] = path
    return Record(
        folder=folder,
        json=found,
        json_problem=problem,
        readme=_text(folder / "README.md"),
        script=read_script(path) if (path := folder / "train_gpt.py").is_file() else None,
        requirements=_text(folder / "requirements.txt"),
        logs=tuple(read_log(path) for path in sorted(folder.glob("train*.log"))),
        artifacts=artifacts,
    )


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _text(path: Path) -> str | None:
    return path.read_text("utf-8", errors="replace") if path.is_file() else None
