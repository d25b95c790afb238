"""From the paths that a user names to the list of files to read, each with the source that reads it."""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from epigram.data.files import sha256_of
from epigram.data.hub import Hub, HubFile
from epigram.data.manifest import FORMAT, MANIFEST
from epigram.data.sources import base
from epigram.errors import DataError, UserError
from epigram.progress import Progress

_WORDS = re.compile(r"[^a-z]+")
_NAMES = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}, "test": {"test"}}
_REMOTE = re.compile(r"hf://(?:datasets/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.*))?")
_SPOOL_CHARS = 40  # of a name on the hub, at most 4 bytes each, that its name on this disk ends with
BY_HASH = "by hash"
_BEGINNING_BYTES = 4096  # of a file, which tell text from pictures and from other encodings
_NAMED = 20  # files that a message names
_RUN = ("config.toml", "environment.json", "result.json")  # by which a run's folder is known


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file to read documents from.

    kind: name of the source. split: "train", "val", or "by hash" where each document's hash decides. whole: a
    text file that is one document (`sources.text`). name: what it is called in the manifest. remote: the file on the
    hub that will be put at `path` when its turn comes.
    """

    path: Path
    kind: str
    split: str
    whole: bool
    name: str
    remote: HubFile | None = None

    @property
    def input_bytes(self) -> int:
        """Size, for progress: of the file, or of the text where there is none."""
        if self.remote is not None:
            return self.remote.num_bytes
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(len(text) for text in self.documents("text"))

    @property
    def has_fields(self) -> bool:
        """Whether its documents are a field of records."""
        return bool(getattr(base.load(self.kind), "HAS_FIELDS", False))

    def stamp(self) -> list[str | int]:
        """What changes when the file does, without reading it."""
        if self.remote is not None:
            return [self.name, self.remote.repo, self.remote.commit, self.remote.path]
        if not self.path.is_file():
            return [self.name, self.content_hash()]
        stat = self.path.stat()
        return [self.name, self.kind, self.split, self.whole, stat.st_size, stat.st_mtime_ns]

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
    sources: Sequence[str | Path],
    val_sources: Sequence[str | Path] = (),
    *,
    exclude: Path | None = None,
    hub: Callable[[], Hub] = Hub,
    for_score: bool = False,
) -> Gathered:
    """All files of `sources` (files, folders, "stdlib"), split as `val_sources` or their names say.

    A folder is walked in the order of names, hidden files, `exclude` and what epigram has written left aside, and what
    lies behind links in it is read too, each folder once. Where it holds records (.jsonl, .csv, .parquet), other files
    are not text to train on and are left out. A folder that has files named train and val is split by these names, and
    a file named test is then left out; otherwise the hash of each document decides. hf://OWNER/NAME[@REVISION][/FOLDER]
    are the files of records of a dataset on the hub, treated like a folder; `hub` is asked for them. for_score: all is
    text of val, but for what a folder's names say is to train on, and a text file is one document as far as
    `sources.text` allows. Raises UserError for a path that does not exist, or is named twice.
    """
    if not sources:
        raise UserError("there is nothing to read: name a file, a folder, or stdlib")
    notes: list[str] = []
    val = [file for source in val_sources for file in _expand(source, exclude, notes, hub)]
    val = [replace(file, split="val") for file in val]
    taken = {_identity(file) for file in val}
    train: list[SourceFile] = []
    for source in sources:
        found = [file for file in _expand(source, exclude, notes, hub) if _identity(file) not in taken]
        if (Path(source).is_dir() or is_remote(source)) and not val_sources:
            found = _split_by_name(found, notes)
        elif val_sources:
            found = [replace(file, split="train") for file in found]
        train += found
    if for_score:
        train = [_to_score(file) for file in train if file.split != "train"]
    if not train:
        if taken and not for_score:
            names = ", ".join(map(str, sources))
            raise UserError(f"{names} is named both to train on and with --val: name other text for one of them")
        raise DataError(f"no files to train on in {', '.join(map(str, sources))}: name others")
    files = sorted([*val, *train], key=lambda file: file.split != "val")
    _refuse_twice(files)
    if len({file.split == BY_HASH for file in files}) > 1:
        raise UserError(
            "some of the sources have their own validation files and some have not: name the validation "
            "files with --val"
        )
    return Gathered(files=tuple(files), notes=tuple(notes))


def _to_score(file: SourceFile) -> SourceFile:
    return replace(file, split="val", whole=file.kind == base.FALLBACK)


def _expand(source: str | Path, exclude: Path | None, notes: list[str], hub: Callable[[], Hub]) -> list[SourceFile]:
    if is_remote(source):
        return _remote(str(source), hub())
    source = Path(source)
    kind = base.source_for(source)
    if kind == base.FALLBACK and source.is_dir():
        return _walk(source, exclude, notes)
    if kind != "stdlib" and not source.is_file():
        raise UserError(f"there is no file or folder {source}: check the path")
    return [SourceFile(path=source, kind=kind, split=BY_HASH, whole=False, name=_readable(source.name))]


def is_remote(source: str | Path) -> bool:
    """Whether a source is on the hub."""
    return str(source).startswith("hf://")


def _remote(source: str, hub: Hub) -> list[SourceFile]:
    """The files of records of a dataset on the hub, in the order of their names; nothing is downloaded yet."""
    match = _REMOTE.fullmatch(source)
    if match is None:
        raise UserError(f"{source} names no dataset: write hf://OWNER/NAME, hf://OWNER/NAME@REVISION or .../FOLDER")
    repo, revision, folder = match["repo"], match["revision"], (match["folder"] or "").strip("/")
    listed = hub.list_files(repo, revision)
    inside = [file for file in listed if not folder or file.path == folder or file.path.startswith(folder + "/")]
    kinds = {file.path: base.source_for(Path(file.path)) for file in inside}
    records = [file for file in inside if kinds[file.path] != base.FALLBACK]
    if not records:
        raise DataError(f"{source} holds no .parquet, .jsonl or .csv files: name another folder of the dataset")
    return [
        SourceFile(
            path=_spool_name(file),
            kind=kinds[file.path],
            split=BY_HASH,
            whole=False,
            name=f"{repo}/{file.path}",
            remote=file,
        )
        for file in sorted(records, key=lambda file: file.path)
    ]


def _spool_name(file: HubFile) -> Path:
    """A name on this disk: another one for each file and each of its versions, ending like the file's own."""
    facts = f"{file.repo} {file.path} {file.stated_hash}"
    return Path(f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}-{file.name[-_SPOOL_CHARS:]}")


def _walk(folder: Path, exclude: Path | None, notes: list[str]) -> list[SourceFile]:
    if is_data_folder(folder):
        raise UserError(f"{folder} is a built data folder already: use it as it is, with --data")
    inside, own = _inside(folder, exclude)
    there = sorted(inside, key=lambda path: path.relative_to(folder).as_posix())
    if own:
        notes.append(_note("left out, as data and runs of epigram", folder, own))
    if gone := [path for path in there if not path.exists()]:
        notes.append(_note("left out, as links that lead nowhere", folder, gone))
    found = [path for path in there if path.is_file()]
    if not found:
        but = " but data and runs of epigram" if own else ""
        raise DataError(f"folder {folder} holds no files{but}: name another")
    kinds = {path: base.source_for(path) for path in found}
    records = [path for path in found if kinds[path] != base.FALLBACK]
    if not records:
        _refuse_unlike_text(found, folder)
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
            name=_readable(path.relative_to(folder).as_posix()),
        )
        for path in records or found
    ]


def _inside(folder: Path, exclude: Path | None) -> tuple[list[Path], list[Path]]:
    """Everything in a folder but folders, hidden names and what `exclude` and folders of our own hold; and those.

    Links to folders are followed after the folders that really lie there, in a fixed order, and no folder is read
    twice: neither one that several names lead to nor, in a circle, one that holds the link.
    """
    found: list[Path] = []
    own: list[Path] = []
    known = {exclude.resolve()} if exclude else set()
    waiting = [folder]
    for start in waiting:  # grows on the way
        for here, folders, names in os.walk(start, onerror=_refuse_unreadable):
            place = Path(here)
            if (real := place.resolve()) in known:
                folders.clear()
                continue
            known.add(real)
            if place != folder and (is_data_folder(place) or all((place / name).is_file() for name in _RUN)):
                folders.clear()
                own.append(place)
                continue
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [place / name for name in folders if (place / name).is_symlink()]
            found += [place / name for name in names if not name.startswith(".")]
    return found, own


def _refuse_unlike_text(paths: list[Path], folder: Path) -> None:
    """Raise DataError with all files of a folder that begin with what is no UTF-8, where there are several: told one by
    one, each would take a run of its own. A single one is told, with its byte, when it is read."""
    unlike = [_readable(path.relative_to(folder).as_posix()) for path in paths if not _begins_as_text(path)]
    if len(unlike) > 1:
        names = ", ".join(unlike[:_NAMED]) + (f" and {len(unlike) - _NAMED} more" if len(unlike) > _NAMED else "")
        raise DataError(
            f"{len(unlike)} files of {folder} are not UTF-8 ({names}): convert text to UTF-8 (for example with iconv), "
            "and move what is no text, such as pictures, out of the folder"
        )


def _begins_as_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            codecs.getincrementaldecoder("utf-8")().decode(file.read(_BEGINNING_BYTES))  # may end within a character
    except UnicodeDecodeError:
        return False
    except OSError:  # told when it is read
        return True
    return True


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
    names = [_readable(str(path.relative_to(folder)) if folder else path.name) for path in paths]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}"


def _readable(name: str) -> str:
    """The name of a file for people and manifests: bytes that are no UTF-8, which a disk allows, as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _identity(file: SourceFile) -> tuple[str, Path]:
    return file.kind, file.path if file.remote else file.path.resolve()


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
