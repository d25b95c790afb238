"""Text to a data folder: tokenizer, shards, document hashes, manifest; complete or absent.

The sources are read twice. The first reading (`survey`) finds what is wrong with the text and draws the
sample that a tokenizer is trained on; the second encodes. The folder is built beside its place under a hidden
name and renamed at the end, so an error, a full disk or Ctrl-C leaves nothing behind. Same text and settings:
same bytes, whatever the number of processes.
"""

import contextlib
import os
import shutil
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epigram.data.encode import EncodedBatch, encode_all
from epigram.data.files import written_beside
from epigram.data.gather import BY_HASH, Gathered, SourceFile, gather
from epigram.data.manifest import (
    SPLITS,
    TOKENIZER,
    Manifest,
    Settings,
    SourceEntry,
    TokenizerEntry,
    write_manifest,
)
from epigram.data.place import built_beside, check_place
from epigram.data.shards import MAX_SHARD_TOKENS, SHARD_TOKENS, TOKEN_BYTES
from epigram.data.split_writer import SplitWriter, count_shared, is_member
from epigram.data.survey import (
    Survey,
    Trial,
    check_unknown,
    labelled,
    split_hash,
    survey,
    try_tokenizer,
    val_limit,
)
from epigram.data.tokenizer import Tokenizer
from epigram.data.tokenizer_training import check_normalization, check_vocab_size, train_tokenizer
from epigram.errors import DataError, UserError
from epigram.progress import Progress

VOCAB_SIZE = 1024
VAL_FRACTION = 0.05  # of the documents
_MOST_WORKERS = 4  # by default: each takes about 100 MB
_SMALL_BYTES = 8 << 20  # of text, that is encoded before worker processes would have started


@dataclass(frozen=True, kw_only=True)
class Built:
    """A finished data folder, its manifest, and sentences that the user should read."""

    path: Path
    manifest: Manifest
    notes: tuple[str, ...]


def build(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    val_sources: Sequence[str | Path] = (),
    tokenizer_file: str | Path | None = None,
    vocab_size: int = VOCAB_SIZE,
    normalization: str = "identity",
    val_fraction: float = VAL_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    field: str = "text",
    seed: int = 0,
) -> Built:
    """Build the data folder `out` from files, folders or "stdlib"; replaces a data folder that is there.

    tokenizer_file: used instead of training one with `vocab_size` pieces and `normalization`. val_sources:
    validation text; without it, `val_fraction` of the documents is held out, chosen by hash (see `gather` for
    folders that name their splits). field: holds the text of a record. workers: processes, by default one for
    each core up to four.

    Raises UserError for settings that cannot be (all of them in one message), DataError for text, a tokenizer
    or a disk that cannot be used; nothing half-written is left behind.
    """
    out = Path(out)
    _check_settings(tokenizer_file, vocab_size, normalization, val_fraction, shard_tokens, workers)
    check_place(out)
    gathered = gather(sources, val_sources, exclude=out)
    tokenizer = Tokenizer.from_file(tokenizer_file) if tokenizer_file is not None else None
    found = survey(gathered.files, field, seed)
    if tokenizer is None:
        tokenizer = train_tokenizer(found.sample.texts(), vocab_size, normalization, seed=seed)
    trial = try_tokenizer(tokenizer, found.sample)
    by_hash = gathered.files[0].split == BY_HASH
    limit = val_limit(found, gathered.files, tokenizer, field, val_fraction, seed) if by_hash else 0
    settings = Settings(
        field=field, seed=seed, val_fraction=val_fraction if by_hash else 0.0, shard_tokens=shard_tokens
    )
    job = _Job(gathered=gathered, found=found, tokenizer=tokenizer, settings=settings, limit=limit)
    with built_beside(out) as folder:
        _check_disk(folder, found, trial)
        manifest = _write(folder, job, _workers(workers, found))
        check_unknown(max(split.unknown_bytes / split.normalized_bytes for split in manifest.splits.values()))
    notes = (*gathered.notes, *_notes(manifest, None if tokenizer_file is not None else vocab_size))
    return Built(path=out, manifest=manifest, notes=notes)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the second reading needs."""

    gathered: Gathered
    found: Survey
    tokenizer: Tokenizer
    settings: Settings
    limit: int


def _check_settings(
    tokenizer_file: str | Path | None,
    vocab_size: int,
    normalization: str,
    val_fraction: float,
    shard_tokens: int,
    workers: int | None,
) -> None:
    problems = [] if tokenizer_file is not None else check_vocab_size(vocab_size) + check_normalization(normalization)
    if not 0 < val_fraction < 1:
        problems.append(f"val_fraction = {val_fraction} must lie between 0 and 1")
    if not 0 < shard_tokens <= MAX_SHARD_TOKENS:
        problems.append(f"shard_tokens = {shard_tokens} must lie between 1 and {MAX_SHARD_TOKENS:,}")
    if workers is not None and workers < 1:
        problems.append(f"workers = {workers} must be at least 1")
    if problems:
        raise UserError("; ".join(problems))


def _check_disk(folder: Path, found: Survey, trial: Trial) -> None:
    needed = int(1.1 * TOKEN_BYTES * trial.tokens_per_byte * found.num_bytes) + 16 * sum(found.documents) + (1 << 20)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the data folder would take about {needed / 1e6:,.0f} MB, but its disk has {free / 1e6:,.0f} MB "
            "free: free some space, or write to another disk"
        )


def _workers(workers: int | None, found: Survey) -> int:
    if found.num_bytes < _SMALL_BYTES:
        return 1  # the same bytes, sooner
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers or min(cores, _MOST_WORKERS)


def _write(folder: Path, job: _Job, workers: int) -> Manifest:
    """Fill `folder`; returns the manifest, which is written last."""
    with written_beside(folder / TOKENIZER) as file:
        file.write(job.tokenizer.proto)
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                SplitWriter(folder, split, job.settings.shard_tokens, keep_hashes=split == "val")
            )
            for split in SPLITS
        }
        duplicates = _encode(writers, job, workers)
    for split, writer in writers.items():
        if not writer.documents:
            reason = "val has the same ones" if duplicates and split == "train" else "they are empty, or too much alike"
            raise DataError(f"no documents are left for {split}, {reason}: give more text, or other text for val")
    splits = {split: writer.entry() for split, writer in writers.items()}
    shared = count_shared(folder, splits, 0)
    splits["train"] = replace(splits["train"], duplicates=duplicates, shared_starts=shared)
    manifest = Manifest(
        tokenizer=TokenizerEntry(
            file=TOKENIZER,
            sha256=job.tokenizer.sha256,
            vocab_size=job.tokenizer.vocab_size,
            normalization=job.tokenizer.normalization,
        ),
        settings=job.settings,
        sources=tuple(
            SourceEntry(file=file.name, kind=file.kind, split=file.split, documents=count)
            for file, count in zip(job.gathered.files, job.found.documents, strict=True)
        ),
        splits=splits,
    )
    write_manifest(folder, manifest)
    return manifest


def _encode(writers: dict[str, SplitWriter], job: _Job, workers: int) -> int:
    """Encode all documents, those of val first; returns how many of train were in val already."""
    duplicates = 0
    with Progress("encoding", total=job.found.num_bytes / 1e6, unit="MB") as progress:
        with contextlib.closing(_batches(job, workers, "val")) as batches:
            for batch in batches:
                writers["val"].add(batch, np.ones(len(batch.num_tokens), np.bool_))
                progress.advance(int(batch.original_bytes.sum()) / 1e6)
        in_val = writers["val"].whole_hashes()
        with contextlib.closing(_batches(job, workers, "train", BY_HASH)) as batches:
            for batch in batches:
                held_out = _held_out(batch, job)
                known = is_member(batch.hashes[:, 1], in_val) & (batch.num_tokens > 0)
                duplicates += int(np.count_nonzero(known))
                writers["val"].add(batch, held_out)
                writers["train"].add(batch, ~held_out & ~known)
                progress.advance(int(batch.original_bytes.sum()) / 1e6)
    return duplicates


def _batches(job: _Job, workers: int, *splits: str) -> Generator[EncodedBatch]:
    """The encoded documents of the files of some splits; DataError when they are not as many as before."""
    chosen = [
        (file, count)
        for file, count in zip(job.gathered.files, job.found.documents, strict=True)
        if file.split in splits
    ]
    expected = sum(count for _, count in chosen)
    files: list[SourceFile] = [file for file, _ in chosen]
    if not files:
        return
    seen = 0
    with contextlib.closing(encode_all(job.tokenizer, labelled(files, job.settings.field), workers)) as batches:
        for batch in batches:
            seen += len(batch.num_tokens)
            yield batch
    if seen != expected:
        raise DataError(
            f"the sources changed while they were read ({expected:,} documents, then {seen:,}): build again"
        )


def _held_out(batch: EncodedBatch, job: _Job) -> NDArray[np.bool_]:
    """Documents whose hash puts them in val, (N,)."""
    if not job.limit:
        return np.zeros(len(batch.num_tokens), np.bool_)
    return np.array(
        [split_hash(whole, job.settings.seed) < job.limit for whole in batch.hashes[:, 1].tolist()], np.bool_
    )


def _notes(manifest: Manifest, asked_vocab_size: int | None) -> Iterator[str]:
    got = manifest.tokenizer.vocab_size
    if asked_vocab_size is not None and got < asked_vocab_size:
        yield f"the text gave {got:,} pieces, fewer than the {asked_vocab_size:,} asked for"
    for name, split in manifest.splits.items():
        if split.empty_documents:
            yield f"{name}: {split.empty_documents:,} empty documents were left out"
        if split.duplicates:
            yield f"{name}: {split.duplicates:,} documents were left out, as val has the same text"
        if split.shared_starts:
            yield (
                f"{name}: {split.shared_starts:,} documents begin with the same {split.hashes.start_bytes} "
                "bytes as one of val"
            )
        if split.unknown_tokens:
            yield (
                f"{name}: {split.unknown_tokens:,} unknown tokens stand for {split.unknown_bytes:,} bytes "
                f"({split.unknown_bytes / split.normalized_bytes:.2%}) that this tokenizer cannot express; "
                "scores count their loss but not their bytes"
            )
