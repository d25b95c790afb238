"""Which validation text a folder of published shards holds, and the record of what was fetched.

A score on a truncated or different validation split looks like any other (parameter-golf #1923, #2109), so a folder
whose tokenizer is a published one is held against the published counts when it is opened. Another split is an error,
unless someone chose it; then every score made with it says so.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cattrs

from epigram.data.files import remove_stale, sha256_of, written_beside
from epigram.data.published import PUBLISHED, Published, made_with
from epigram.data.shards import Shard
from epigram.errors import DataError

FETCHED = "fetched.json"
FORMAT, VERSION = "epigram fetched", 1


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation split of a published variant.

    tokens: of all its shards. sha256: of each shard, in order. problem: why it is not the published one, in words;
    None where nothing speaks against it.
    """

    name: str
    tokens: int
    sha256: tuple[str, ...]
    problem: str | None = None

    @property
    def text(self) -> str:
        """What scores say of it."""
        facts = f"{self.tokens:,} tokens, sha256 {' '.join(one[:16] for one in self.sha256)}"
        if self.problem is None:
            return f"published {self.name} ({facts})"
        return f"NOT the published one, allowed by choice: {self.problem} ({facts})"

    def differs(self, sha256: tuple[str, ...]) -> str | None:
        """Why a split of shards with these hashes is not this one; None when it is, or this one was a choice."""
        if self.problem is not None or sha256 == self.sha256:
            return None
        return f"the validation split of {self.name} had other contents when it was fetched"


@dataclass(frozen=True, kw_only=True)
class FetchedFile:
    """One verified file. tokens: of a shard, 0 for others. mtime_ns: its time of change when it was verified."""

    bytes: int
    tokens: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """The whole of `fetched.json`. name: of the variant. commit: of the repository, None for files brought by hand."""

    format: str = FORMAT
    version: int = VERSION
    name: str
    repo: str
    commit: str | None
    files: dict[str, FetchedFile]
    validation: Validation


def read_fetched(folder: Path) -> Fetched | None:
    """The record of a folder, None where it has none; DataError for a damaged one."""
    path = folder / FETCHED
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        record = cattrs.Converter(forbid_extra_keys=True).structure(values, Fetched)
        if (record.format, record.version) != (FORMAT, VERSION):
            raise ValueError(f"format {record.format!r}, version {record.version}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # cattrs groups whatever the conversion of each value raised
        raise DataError(
            f"{path} is damaged ({error}): remove it and fetch again, nothing whole is downloaded twice"
        ) from error
    return record


def write_fetched(folder: Path, record: Fetched) -> None:
    """Write `fetched.json`, complete or not at all; what killed processes left of theirs is removed."""
    remove_stale(folder / FETCHED)
    with written_beside(folder / FETCHED) as file:
        file.write((json.dumps(asdict(record), indent=2) + "\n").encode())


def look_at(variant: Published, shards: Sequence[Shard], pinned: Validation | None = None) -> Validation:
    """The validation split in `shards`, hashed, with what speaks against it.

    pinned: what was fetched before, whose hashes the shards must have.
    """
    tokens = sum(shard.num_tokens for shard in shards)
    sha256 = tuple(sha256_of(shard.path) for shard in shards)
    problem = variant.problem(tokens) or variant.other_contents([shard.path for shard in shards])
    if problem is None and pinned is not None:
        problem = pinned.differs(sha256)
    return Validation(name=variant.name, tokens=tokens, sha256=sha256, problem=problem)


def of_folder(folder: Path, shards: Sequence[Shard], tokenizer_path: Path) -> Validation | None:
    """The validation split of a folder in the published layout; None where it is of no published variant, or absent.

    DataError when it is not the published one and nobody chose that.
    """
    record = read_fetched(folder)
    if record is not None:
        variant = PUBLISHED.get(record.name)
    else:
        variant = made_with(sha256_of(tokenizer_path))
    if variant is None or not shards:
        return record.validation if record else None
    found = look_at(variant, shards, record.validation if record else None)
    if found.problem is None or (record is not None and record.validation == found):
        return found
    raise DataError(
        f"{folder}: {found.problem}. Scores on it could not be compared with any other: get the right one with "
        f"`epigram data fetch {variant.name} --out {folder}`, or choose this one with "
        f"`epigram data check {folder} --allow-other-validation`"
    )


def allow(folder: Path, shards: Sequence[Shard], tokenizer_path: Path) -> Validation | None:
    """Write down that the validation split of `folder` is meant, whatever it is; None where none is expected."""
    record = read_fetched(folder)
    variant = PUBLISHED.get(record.name) if record else made_with(sha256_of(tokenizer_path))
    if variant is None or not shards:
        return None
    found = look_at(variant, shards, record.validation if record else None)
    if record is None:
        record = Fetched(name=variant.name, repo=variant.repo, commit=None, files={}, validation=found)
    write_fetched(
        folder,
        Fetched(name=record.name, repo=record.repo, commit=record.commit, files=record.files, validation=found),
    )
    return found
