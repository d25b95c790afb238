"""`manifest.json`: what a data folder holds, so that anyone can check it.

It depends on the text and the settings alone: no time, no machine, no path beyond the names of the source
files.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cattrs
import numpy as np
from numpy.typing import NDArray

from epigram.data.files import sha256_of, written_beside
from epigram.errors import DataError

MANIFEST, TOKENIZER = "manifest.json", "tokenizer.model"
FORMAT, VERSION = "epigram data", 2
READABLE = (1, 2)  # 1: without cleaning and transforms, which then have their defaults
START_BYTES = 1024  # of a document's text, that its start hash is taken over
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer file of the folder."""

    file: str
    sha256: str
    vocab_size: int
    normalization: str


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard file."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class HashesEntry:
    """The file of document hashes of a split: two little-endian uint64 each (`document_hashes`)."""

    file: str
    sha256: str
    start_bytes: int


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """One split.

    documents: as many as there are BOS tokens. original_bytes: of the text as it was; normalized_bytes: of
    the text that the tokens stand for (the same with identity normalisation). unknown_tokens, unknown_bytes:
    how much of the normalised text the tokenizer could not express (nothing, where it has byte pieces); those
    bytes are in no score. empty_documents: left out, as nothing remained of them. duplicates: documents of
    train that were left out because val has the same text. shared_starts: documents of train that begin like
    one of val; they are kept. Left out on request (`data.clean`): short_documents, other_language, near_duplicates
    (of train, like one of val), repeated (equal to an earlier one of the split). byte_counts: files beside the shards
    that hold the bytes of text of each token, where a transform makes them necessary.
    """

    documents: int
    tokens: int
    original_bytes: int
    normalized_bytes: int
    unknown_tokens: int
    unknown_bytes: int
    empty_documents: int
    duplicates: int
    shared_starts: int
    shards: tuple[ShardEntry, ...]
    hashes: HashesEntry
    short_documents: int = 0
    other_language: int = 0
    near_duplicates: int = 0
    repeated: int = 0
    byte_counts: tuple[ShardEntry, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """One file that text came from. kind: what read it. split: "train", "val", or "by hash" for both."""

    file: str
    kind: str
    split: str
    documents: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the build was asked for; with the sources it determines every byte of the folder."""

    field: str
    seed: int
    val_fraction: float
    shard_tokens: int
    transform: str = ""
    min_chars: int = 0
    language: str = ""
    dedup: str = "none"
    near_threshold: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of `manifest.json`."""

    format: str = FORMAT
    version: int = VERSION
    tokenizer: TokenizerEntry
    settings: Settings
    sources: tuple[SourceEntry, ...]
    splits: dict[str, SplitEntry]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data folder; DataError when it is missing, damaged or of another version."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): build the data again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DataError(f"{path} is no manifest of a data folder: give a folder that `epigram data build` wrote")
    if values.get("version") not in READABLE:
        raise DataError(
            f"{path} has version {values.get('version')}, and this release reads versions up to {VERSION}: build "
            "the data again"
        )
    return _structure(values, path)


def _structure(values: dict[str, Any], path: Path) -> Manifest:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(int, _exactly(int))
    converter.register_structure_hook(str, _exactly(str))
    try:
        manifest = converter.structure(values, Manifest)
    except Exception as error:  # cattrs groups whatever the conversion of each value raised
        problems = "; ".join(cattrs.transform_error(error, path="manifest"))
        raise DataError(f"{path} is damaged: {problems}") from error
    names = [
        name
        for split in manifest.splits.values()
        for name in (*(shard.file for shard in (*split.shards, *split.byte_counts)), split.hashes.file)
    ]
    bad = [name for name in (*names, manifest.tokenizer.file) if Path(name).name != name or name in ("", ".", "..")]
    if bad or set(manifest.splits) != set(SPLITS):
        raise DataError(
            f"{path} is damaged: its files or splits have names that cannot be: {bad or list(manifest.splits)}"
        )
    return manifest


def _exactly(kind: type) -> Any:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"{value!r} is no {kind.__name__}")
        return value

    return structure


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, complete or not at all."""
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n"
    with written_beside(folder / MANIFEST) as file:
        file.write(text.encode("utf-8"))


def document_hashes(text: bytes) -> tuple[int, int]:
    """64-bit hashes of a document's normalised UTF-8 text: of its first `START_BYTES`, and of all of it."""
    start = hash64(text[:START_BYTES])
    return start, start if len(text) <= START_BYTES else hash64(text)


def hash64(data: bytes) -> int:
    """BLAKE2b in 8 bytes, read as a little-endian number."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hashes_name(split: str) -> str:
    """File name of the document hashes of a split."""
    return f"documents_{split}.bin"


def altered(folder: Path, file: str, sha256: str) -> str | None:
    """What is wrong with a file that should have this hash, in a sentence; None when nothing is."""
    if not (folder / file).is_file():
        return f"{file} is missing: restore it, or build the data again"
    if sha256_of(folder / file) != sha256:
        return f"{file} is not the file that the manifest describes (its hash differs): restore or build it again"
    return None


def read_hashes(folder: Path, split: SplitEntry) -> NDArray[np.uint64]:
    """The (documents, 2) hashes of a split, starts and whole texts; DataError for a file of another size."""
    path = folder / split.hashes.file
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) != 16 * split.documents:
        raise DataError(
            f"{path} is {len(raw):,} bytes, not 16 for each of {split.documents:,} documents: build the data again"
        )
    return np.frombuffer(raw, "<u8").reshape(-1, 2)
