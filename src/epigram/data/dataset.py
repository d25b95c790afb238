"""Open a data folder: one that `epigram data build` wrote, or a bare one in the published layout."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epigram.data.files import sha256_of
from epigram.data.manifest import MANIFEST, SPLITS, Manifest, altered, read_hashes, read_manifest
from epigram.data.shards import Shard, open_shard
from epigram.data.tokenizer import Tokenizer
from epigram.data.transforms.base import count_original, marked_by
from epigram.data.transforms.base import load as load_transform
from epigram.data.validation import Validation, allow, of_folder
from epigram.errors import DataError, UserError


@dataclass(frozen=True, kw_only=True)
class DataFolder:
    """Shards by split and the tokenizer that they were made with.

    manifest: None for a folder in the published layout, which has none. byte_count_shards: by split, beside its shards,
    where tokens do not tell how many bytes of text they stand for. validation: which validation split a folder of
    published shards holds; None for any other.
    """

    path: Path
    manifest: Manifest | None
    tokenizer_path: Path
    shards: dict[str, tuple[Shard, ...]]
    byte_count_shards: dict[str, tuple[Shard, ...]] = field(default_factory=dict)
    validation: Validation | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read on first use; DataError when it is not the one of the manifest."""
        tokenizer = Tokenizer.from_file(self.tokenizer_path)
        if self.manifest is not None and tokenizer.sha256 != self.manifest.tokenizer.sha256:
            raise DataError(
                f"{self.tokenizer_path} is not the tokenizer that the data were built with: restore it, or build again"
            )
        return tokenizer

    def split(self, name: str) -> tuple[Shard, ...]:
        """Shards of "train" or "val" in order; DataError when the folder has none."""
        if not self.shards.get(name):
            raise _no_shards(self.path, name, filter(self.shards.get, SPLITS))
        return self.shards[name]

    def num_tokens(self, name: str) -> int:
        """Tokens of a split."""
        return sum(shard.num_tokens for shard in self.split(name))

    def stream(self, name: str, most: int | None = None) -> NDArray[np.uint16]:
        """The tokens of a split, all or the first `most`, one shard after another, (T,) uint16, read into memory."""
        return _first(self.split(name), most)

    def byte_counts(self, name: str, most: int | None = None) -> NDArray[np.uint16] | None:
        """Bytes of text that each token of `stream` stands for, (T,) uint16; None where the byte tables of the
        tokenizer say so.

        From the sidecar, which a build writes for val alone; else counted here, where the manifest names a transform.
        DataError where it takes a sidecar, and there is none, or one of other shards.
        """
        counts = self.sidecar(name, most)
        if counts is not None:
            return counts
        if self.transform:
            return self._count_again(name, most)
        if self.manifest is None and (transforms := marked_by(self.tokenizer.pieces)):
            raise DataError(
                f"the tokenizer of {self.path} has the marks of {' and '.join(transforms)}, which are no bytes of the "
                f"text, and no *_{name}_bytes_*.bin says how many bytes each token stands for: put those files beside "
                "the shards, or build the data from the text"
            )
        return None

    def sidecar(self, name: str, most: int | None = None) -> NDArray[np.uint16] | None:
        """The byte counts that lie beside the shards, as `byte_counts`; None without any. DataError when they do not
        belong to the shards."""
        files = self.byte_count_shards.get(name, ())
        if not files:
            return None
        found, wanted = [one.num_tokens for one in files], [shard.num_tokens for shard in self.split(name)]
        if found != wanted:
            raise DataError(
                f"the byte counts of {name} in {self.path} are for {sum(found):,} tokens in {len(found)} files, its "
                f"shards hold {sum(wanted):,} in {len(wanted)}: restore them, or build the data again"
            )
        return _first(files, most)

    def _count_again(self, name: str, most: int | None) -> NDArray[np.uint16]:
        """The byte counts from the tokens, one document at a time: a train split may be large."""
        transform, tokenizer, tokens = load_transform(self.transform), self.tokenizer, self.stream(name, most)
        if tokens.size and int(tokens.max()) >= tokenizer.vocab_size:
            raise DataError(f"{self.path} holds tokens that its tokenizer does not have: build the data again")
        documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id))[1:]
        tables, decode = tokenizer.byte_tables(), tokenizer.decode_bytes
        counts = [count_original(transform, tables, document, decode(document)) for document in documents]
        return np.concatenate([tokens[:0], *counts])

    def verify(self, name: str) -> None:
        """Raises DataError when a file of a split is not the one of the manifest; without one nothing is known."""
        entries = self.manifest.splits[name] if self.manifest else None
        for entry in (*entries.shards, *entries.byte_counts) if entries else ():
            if problem := altered(self.path, entry.file, entry.sha256):
                raise DataError(f"{self.path}: {problem}")

    @property
    def transform(self) -> str:
        """Name of the transform that the text went through before it was tokenized, "" for none or unknown."""
        return self.manifest.settings.transform if self.manifest else ""

    def split_bytes(self, name: str) -> int | None:
        """Bytes of text that the tokens of a split stand for, by the manifest; None without one."""
        if self.manifest is None:
            return None
        entry = self.manifest.splits[name]
        return entry.normalized_bytes - entry.unknown_bytes

    def text(self, name: str, max_tokens: int, *, from_end: bool = False) -> bytes:
        """The text of a split's first (or last) `max_tokens` tokens in UTF-8, document after document."""
        shards, parts, left = self.split(name), [], max_tokens
        for shard in reversed(shards) if from_end else shards:
            tokens = shard.tokens[-left:] if from_end else shard.tokens[:left]
            parts.append(np.array(tokens))
            left -= len(tokens)
            if left <= 0:
                break
        text = self.tokenizer.decode_bytes(np.concatenate(parts[::-1] if from_end else parts))
        if not self.transform:
            return text
        # A character that the limit cut in two goes, so that the rest can be read.
        return load_transform(self.transform).decode(text.decode("utf-8", "ignore")).encode("utf-8")

    def document_hashes(self, name: str) -> NDArray[np.uint64]:
        """Hashes of a split's documents, (N, 2) uint64: of their starts, and of their whole texts."""
        if self.manifest is None:
            raise DataError(f"{self.path} has no manifest, so nothing is known about its documents")
        return read_hashes(self.path, self.manifest.splits[name])


def open_data(path: str | Path, tokenizer_file: str | Path | None = None, splits: Sequence[str] = SPLITS) -> DataFolder:
    """Open a data folder; checks headers and sizes of all shards, not their contents (`data.check` does).

    splits: those whose shards need be there.

    Without a manifest, shards are the files *_train_*.bin and *_val_*.bin in the order of their names, and
    the tokenizer is `tokenizer_file` or the one file *.model in the folder. Raises UserError for a folder
    that is none of both, DataError for one that is damaged, or whose validation split is not the published one
    (`data.validation`).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"there is no data folder {folder}: build one with `epigram data build TEXT --out {folder}`")
    if (folder / MANIFEST).exists():
        return _open_built(folder, Path(tokenizer_file) if tokenizer_file else None, splits)
    return _open_bare(folder, Path(tokenizer_file) if tokenizer_file else None)


def is_published_layout(folder: Path) -> bool:
    """Whether a folder holds shards named like the published ones."""
    return any(published_shards(folder, split) for split in SPLITS)


def _no_shards(folder: Path, split: str, others: Iterable[str]) -> DataError:
    return DataError(f"{folder} has no {split} shards: it has {', '.join(others) or 'none'}")


def _open_built(folder: Path, tokenizer_file: Path | None, splits: Sequence[str]) -> DataFolder:
    manifest = read_manifest(folder)
    if tokenizer_file is not None and sha256_of(tokenizer_file) != manifest.tokenizer.sha256:
        raise DataError(
            f"{folder} was built with another tokenizer than {tokenizer_file}: leave the tokenizer out, or build again"
        )
    for split in splits:
        if split not in manifest.splits:
            raise _no_shards(folder, split, manifest.splits)
    shards: dict[str, tuple[Shard, ...]] = {}
    for split in splits:
        opened = []
        for entry in manifest.splits[split].shards:
            shard = open_shard(folder / entry.file, split)
            if shard.num_tokens != entry.tokens:
                raise DataError(
                    f"shard {shard.path} holds {shard.num_tokens:,} tokens, not the {entry.tokens:,} of the "
                    "manifest: restore it, or build the data again"
                )
            opened.append(shard)
        shards[split] = tuple(opened)
    counts = {
        split: tuple(open_shard(folder / entry.file, split) for entry in manifest.splits[split].byte_counts)
        for split in splits
    }
    return DataFolder(
        path=folder,
        manifest=manifest,
        tokenizer_path=folder / manifest.tokenizer.file,
        shards=shards,
        byte_count_shards=counts,
    )


def _open_bare(folder: Path, tokenizer_file: Path | None) -> DataFolder:
    if not is_published_layout(folder):
        raise UserError(
            f"{folder} is no data folder (no {MANIFEST}, no *_train_*.bin): build one with "
            f"`epigram data build {folder} --out DIR`"
        )
    tokenizer_path = tokenizer_file or _only_model(folder)
    shards = {split: tuple(open_shard(path, split) for path in published_shards(folder, split)) for split in SPLITS}
    counts = {
        split: tuple(open_shard(path, split) for path in published_shards(folder, f"{split}_bytes")) for split in SPLITS
    }
    validation = of_folder(folder, shards["val"], tokenizer_path)
    return DataFolder(
        byte_count_shards=counts,
        path=folder,
        manifest=None,
        tokenizer_path=tokenizer_path,
        shards=shards,
        validation=validation,
    )


def allow_validation(folder: Path, tokenizer_file: str | Path | None = None) -> None:
    """Write into a folder in the published layout that its validation split is meant, whichever it is."""
    tokenizer_path = Path(tokenizer_file) if tokenizer_file else _only_model(folder)
    allow(folder, [open_shard(path, "val") for path in published_shards(folder, "val")], tokenizer_path)


def published_shards(folder: Path, split: str) -> list[Path]:
    """Shards of a split by their names, in order; the byte counts that lie beside those of "val" are "val_bytes"."""
    return sorted({*folder.glob(f"*_{split}_*.bin")} - {*folder.glob(f"*_{split}_bytes_*.bin")})


def _first(shards: Sequence[Shard], most: int | None) -> NDArray[np.uint16]:
    """The first `most` values of shards in a row, all for None; shards after those are not opened."""
    parts: list[NDArray[np.uint16]] = []
    for shard in shards:
        left = None if most is None else most - sum(map(len, parts))
        if left == 0:
            break
        parts.append(np.array(shard.tokens[:left]))
    return np.concatenate(parts)


def _only_model(folder: Path) -> Path:
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        found = f"{len(models)} tokenizers" if models else "no tokenizer (*.model)"
        raise UserError(f"{folder} holds {found}: put the one that made the shards there, or name it")
    return models[0]
