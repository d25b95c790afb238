"""From the paths that a user names to the list of files to read, each with the source that reads it."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from epigram.data.files import sha256_of
from epigram.data.manifest import FORMAT, MANIFEST
from epigram.data.sources import base
from epigram.errors import DataError, UserError
from epigram.progress import Progress

_WORDS = re.compile(r"[^a-z]+")
_NAMES = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}, "test": {"test"}}
BY_HASH = "by hash"


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file to read documents from.

    kind: name of the source. split: "train", "val", or "by hash" where each document's hash decides. whole: a
    text file that is one document (`sources.text`). name: what it is called in the manifest.
    """

    path: Path
    kind: str
    split: str
    whole: bool
    name: str

    def documents(self, field: str) -> Iterator[str]:
        """The documents of the file in order; DataError when it cannot be read."""
        source = base.load(self.kind)
        yield from (
            source.documents(self.path, field, whole=True) if self.whole else source.documents(self.path, field)
        )

    def content_hash(self) -> str:
        """Hash, in hex, that changes whenever the text does."""
        own = getattr(base.load(self.kind), "content_hash", None)
        return own(self.path) if own else sha256_of(self.path)


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Files in reading order, those of val first, and sentences about what names decided."""

    files: tuple[SourceFile, ...]
    notes: tuple[str, ...]

    def content_hash(self) -> str:
        """Hash, in hex, of all files, their order and their splits; reads them all."""
        digest = hashlib.sha256()
        with Progress("looking for changes in the text", total=len(self.files), unit="files") as progress:
            for file in self.files:
                digest.update(f"{file.kind} {file.split} {file.whole} {file.content_hash()}\n".encode())
                progress.advance()
        return digest.hexdigest()


def gather(
    sources: Sequence[str | Path], val_sources: Sequence[str | Path] = (), *, exclude: Path | None = None
) -> Gathered:
    """All files of `sources` (files, folders, "stdlib"), split as `val_sources` or their names say.

    A folder is walked in the order of names, hidden files and `exclude` left aside. Where it holds records
    (.jsonl, .parquet), other files are not text to train on and are left out. A folder that has files named
    train and val is split by these names, and a file named test is then left out; otherwise the hash of each
    document decides. Raises UserError for a path that does not exist, or is named twice.
    """
    if not sources:
        raise UserError("there is nothing to read: name a file, a folder, or stdlib")
    notes: list[str] = []
    val = [file for source in val_sources for file in _expand(Path(source), exclude, notes)]
    val = [replace(file, split="val") for file in val]
    taken = {_identity(file) for file in val}
    train: list[SourceFile] = []
    for source in sources:
        found = [file for file in _expand(Path(source), exclude, notes) if _identity(file) not in taken]
        if Path(source).is_dir() and not val_sources:
            found = _split_by_name(found, notes)
        elif val_sources:
            found = [replace(file, split="train") for file in found]
        train += found
    if not train:
        raise DataError(f"no files to train on in {', '.join(map(str, sources))}: name others")
    files = sorted([*val, *train], key=lambda file: file.split != "val")
    _refuse_twice(files)
    if len({file.split == BY_HASH for file in files}) > 1:
        raise UserError(
            "some of the sources have their own validation files and some have not: name the validation "
            "files with --val"
        )
    return Gathered(files=tuple(files), notes=tuple(notes))


def _expand(source: Path, exclude: Path | None, notes: list[str]) -> list[SourceFile]:
    kind = base.source_for(source)
    if kind == base.FALLBACK and source.is_dir():
        return _walk(source, exclude, notes)
    if kind != "stdlib" and not source.is_file():
        raise UserError(f"there is no file or folder {source}: check the path")
    return [SourceFile(path=source, kind=kind, split=BY_HASH, whole=False, name=source.name)]


def _walk(folder: Path, exclude: Path | None, notes: list[str]) -> list[SourceFile]:
    if is_data_folder(folder):
        raise UserError(f"{folder} is a built data folder already: use it as it is, with --data")
    excluded = exclude.resolve() if exclude else None
    found = []
    for here, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = [
            name for name in folders if not name.startswith(".") and (Path(here) / name).resolve() != excluded
        ]
        found += [Path(here) / name for name in names if not name.startswith(".")]
    found = sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())
    if not found:
        raise DataError(f"folder {folder} holds no files: name another")
    kinds = {path: base.source_for(path) for path in found}
    records = [path for path in found if kinds[path] != base.FALLBACK]
    if records and len(records) < len(found):
        notes.append(
            _note("left out, as the folder holds records", folder, [p for p in found if p not in set(records)])
        )
    return [
        SourceFile(
            path=path,
            kind=kinds[path],
            split=BY_HASH,
            whole=kinds[path] == base.FALLBACK,
            name=path.relative_to(folder).as_posix(),
        )
        for path in records or found
    ]


def _refuse_unreadable(error: OSError) -> None:
    raise DataError(f"folder {error.filename} cannot be read: {error.strerror or error}") from error


def _split_by_name(files: list[SourceFile], notes: list[str]) -> list[SourceFile]:
    """The files with the splits that their names say, if the folder names both train and val."""
    named = {file.path: _named_split(file.name) for file in files}
    if not {"train", "val"} <= set(named.values()):
        return files
    val = [file.path for file in files if named[file.path] == "val"]
    test = [file.path for file in files if named[file.path] == "test"]
    notes.append(_note("validation, by name", None, val))
    if test:
        notes.append(_note("left out, as test files by name", None, test))
    return [
        replace(file, split="val" if named[file.path] == "val" else "train")
        for file in files
        if named[file.path] != "test"
    ]


def _named_split(name: str) -> str | None:
    words = set(_WORDS.split(name.lower()))
    return next((split for split, names in _NAMES.items() if words & names), None)


def _note(what: str, folder: Path | None, paths: list[Path]) -> str:
    names = [str(path.relative_to(folder)) if folder else path.name for path in paths]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}"


def _identity(file: SourceFile) -> tuple[str, Path]:
    return file.kind, file.path.resolve()


def _refuse_twice(files: list[SourceFile]) -> None:
    seen: set[tuple[str, Path]] = set()
    for file in files:
        if _identity(file) in seen:
            raise UserError(f"{file.path} is named twice: name each file once")
        seen.add(_identity(file))


def is_data_folder(path: Path) -> bool:
    """Whether `path` holds a manifest of ours, readable or not in its details."""
    try:
        values = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT
