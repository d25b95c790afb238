"""Text to a data folder: tokenizer, shards, document hashes, manifest; complete or absent.

The sources are read twice, large ones in part: the first reading (`survey`) finds what is wrong with the text and draws
the sample that a tokenizer is trained on; the second encodes. The folder is built beside its place under a hidden name
and renamed at the end. An error leaves nothing behind; what an interruption leaves is gone on with by the next build of
the same text with the same settings. Same text and settings: same bytes, whatever the number of processes. A folder
of other text is replaced only when that is asked for: a run that learned from it could not be exported any more.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epigram.data.clean import Cleaning
from epigram.data.encoding import Encoding, Plan
from epigram.data.files import written_beside
from epigram.data.gather import BY_HASH, Gathered, gather, is_data_folder, is_remote
from epigram.data.hub import Hub
from epigram.data.manifest import (
    TOKENIZER,
    VERSION,
    Manifest,
    Settings,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
    read_manifest,
    write_manifest,
)
from epigram.data.place import built_beside, check_place, make_parent
from epigram.data.shards import MAX_SHARD_TOKENS, SHARD_TOKENS, TOKEN_BYTES
from epigram.data.sources.base import READING
from epigram.data.spool import FILES_AT_A_TIME, Spool
from epigram.data.survey import Survey, Trial, check_unknown, is_read_whole, survey, try_tokenizer, val_limit
from epigram.data.tokenizer import Tokenizer
from epigram.data.tokenizer_training import check_normalization, check_vocab_size, train_tokenizer
from epigram.data.transforms import base as transforms
from epigram.errors import DataError, UserError

VOCAB_SIZE = 1024
NORMALIZATION = "identity"
FIELD = "text"  # of records
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
    vocab_size: int | None = None,
    normalization: str | None = None,
    val_fraction: float | None = None,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    field: str | None = None,
    seed: int = 0,
    transform: str = "",
    cleaning: Cleaning | None = None,
    endpoint: str | None = None,
    for_score: bool = False,
    replace: bool = False,
) -> Built:
    """Build the data folder `out` from files, folders, "stdlib" or hf:// datasets.

    tokenizer_file: used instead of training one with `vocab_size` pieces (by default `VOCAB_SIZE`) and `normalization`
    ("identity"). val_sources: validation text; without it, `val_fraction` (by default `VAL_FRACTION`) of the documents
    is held out, chosen by hash (see `gather` for folders that name their splits). field: holds the text of a record, by
    default "text". workers: processes, by default one for each core up to four. transform: of the normalised text
    before it is tokenized (`data.transforms`). cleaning: what to leave out. endpoint: of the hub, by default what its
    library's settings say. for_score: the folder is to be scored by a model of `tokenizer_file`, not trained on: all
    text goes to val, and train is empty. replace: a data folder of other text or settings that `out` holds.

    Raises UserError for settings that cannot be (all of them in one message) or that nothing would read, DataError for
    text, a tokenizer or a disk that cannot be used; nothing half-written appears at `out`.
    """
    out, cleaning = Path(out), cleaning or Cleaning()
    if out.name in ("", ".."):  # what is built beside it needs the name of the folder itself
        out = out.resolve()
    _check_settings(tokenizer_file, vocab_size, normalization, val_fraction, shard_tokens, workers, cleaning)
    assert tokenizer_file is not None or not for_score
    marks = transforms.load(transform).MARKS if transform else ""
    check_place(out)
    hub = Hub(endpoint) if any(is_remote(source) for source in (*sources, *val_sources)) else None
    gathered = gather(sources, val_sources, exclude=out, hub=lambda: hub or Hub(endpoint), for_score=for_score)
    field, fraction = _field(field, gathered), _fraction(val_fraction, gathered)
    must_be_same = not replace and is_data_folder(out)
    if must_be_same and not is_read_whole(gathered.files):
        raise UserError(_keep(out, "it is not built again to see whether it is of this text"))
    tokenizer = Tokenizer.from_file(tokenizer_file) if tokenizer_file is not None else None
    make_parent(out)
    _check_spool(out, gathered)
    with Spool(hub, gathered.files, out.with_name(f".{out.name}.spool")) as spool:
        trains = tokenizer is None
        found = survey(gathered.files, field, seed, val_fraction=fraction, for_training=trains, local=spool.local)
        if tokenizer is None:
            encode = transforms.load(transform).encode if transform else None
            texts = found.sample.texts()
            vocab_size = VOCAB_SIZE if vocab_size is None else vocab_size
            tokenizer = train_tokenizer(
                map(encode, texts) if encode else texts,
                vocab_size,
                normalization or NORMALIZATION,
                seed=seed,
                marks=marks,
            )
        _check_marks(tokenizer, marks, transform)
        trial = try_tokenizer(tokenizer, found.sample)
        limit = val_limit(found, gathered.files, tokenizer, field, fraction, seed, spool.local) if fraction else 0
        settings = Settings(
            field=field,
            seed=seed,
            val_fraction=fraction,
            shard_tokens=shard_tokens,
            transform=transform,
            min_chars=cleaning.min_chars,
            language=cleaning.language,
            dedup=cleaning.dedup,
            near_threshold=cleaning.threshold if cleaning.dedup == "near" else 0.0,
        )
        plan = Plan(files=gathered.files, tokenizer=tokenizer, settings=settings, cleaning=cleaning, limit=limit)
        with built_beside(out, _fingerprint(plan)) as folder:
            _check_disk(folder, found, trial)
            manifest = _write(folder, plan, found, _workers(workers, found), spool)
            check_unknown(
                max(split.unknown_bytes / max(split.normalized_bytes, 1) for split in manifest.splits.values())
            )
            if must_be_same and not _holds(out, manifest):
                raise UserError(_keep(out, "it is of other text or settings"))
    notes = (*gathered.notes, *_notes(manifest, vocab_size))
    return Built(path=out, manifest=manifest, notes=notes)


def _keep(out: Path, why: str) -> str:
    return f"{out} is a data folder already, and {why}: name another place with --out, or replace it with --replace"


def _holds(out: Path, manifest: Manifest) -> bool:
    """Whether a data folder is what was built just now."""
    try:
        return read_manifest(out) == manifest
    except DataError:
        return False


def _field(given: str | None, gathered: Gathered) -> str:
    """The field of records; UserError for one that is given in vain."""
    if given is not None and not any(file.has_fields for file in gathered.files):
        kinds = ", ".join(sorted({file.kind for file in gathered.files}))
        raise UserError(
            f"--field {given} names a field or column of .jsonl, .csv, .tsv or .parquet, and there is only {kinds} to "
            "read: leave it out"
        )
    return FIELD if given is None else given


def _fraction(given: float | None, gathered: Gathered) -> float:
    """Share of the documents to hold out by hash, 0 where none is; UserError for one that is given in vain."""
    if any(file.split == BY_HASH for file in gathered.files):
        return VAL_FRACTION if given is None else given
    if given is not None:
        raise UserError(
            f"val_fraction = {given} is of documents that have no split, and here --val or the names of the files say "
            "what is held out: leave it out"
        )
    return 0.0


def _check_settings(
    tokenizer_file: str | Path | None,
    vocab_size: int | None,
    normalization: str | None,
    val_fraction: float | None,
    shard_tokens: int,
    workers: int | None,
    cleaning: Cleaning,
) -> None:
    problems = _tokenizer_problems(tokenizer_file, vocab_size, normalization)
    if val_fraction is not None and not 0 < val_fraction < 1:
        problems.append(f"val_fraction = {val_fraction} must be above 0 and below 1")
    if not 0 < shard_tokens <= MAX_SHARD_TOKENS:
        problems.append(f"shard_tokens = {shard_tokens} must lie between 1 and {MAX_SHARD_TOKENS:,}")
    if workers is not None and workers < 1:
        problems.append(f"workers = {workers} must be at least 1")
    problems += cleaning.problems()
    if problems:
        raise UserError("; ".join(problems))


def _tokenizer_problems(
    tokenizer_file: str | Path | None, vocab_size: int | None, normalization: str | None
) -> list[str]:
    """What is wrong with the settings of a tokenizer to train, or that there are some where none is trained."""
    given = {"vocab_size": vocab_size, "normalization": normalization}
    if tokenizer_file is not None:
        return [
            f"{name} = {value} is for a tokenizer that is trained, and {tokenizer_file} is used: leave one of them out"
            for name, value in given.items()
            if value is not None
        ]
    problems = [] if vocab_size is None else check_vocab_size(vocab_size)
    return problems + ([] if normalization is None else check_normalization(normalization))


def _check_marks(tokenizer: Tokenizer, marks: str, transform: str) -> None:
    """UserError when the marks of a transform are not pieces of their own: each would be three bytes, or unknown."""
    if missing := [f"U+{ord(mark):04X}" for mark in marks if mark not in set(tokenizer.pieces)]:
        raise UserError(
            f"the tokenizer has no pieces for {', '.join(missing)}, the marks of the transform {transform}: let one be "
            "trained, or give one that was made with it"
        )


def _fingerprint(plan: Plan) -> str:
    """Hash of all that the bytes of the folder depend on, and of the files as they lie there."""
    facts = [
        VERSION,
        READING,
        plan.tokenizer.sha256,
        asdict(plan.settings),
        plan.limit,
        [file.stamp() for file in plan.files],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _check_spool(out: Path, gathered: Gathered) -> None:
    """DataError when the files of a dataset on the hub, a few at a time, do not fit on the disk."""
    sizes = sorted((file.remote.num_bytes for file in gathered.files if file.remote), reverse=True)
    needed, free = sum(sizes[:FILES_AT_A_TIME]), shutil.disk_usage(out.parent).free
    if needed > free:
        raise DataError(
            f"{needed / 1e9:,.2f} GB of the dataset are on the disk at a time, and that of {out.parent} has "
            f"{free / 1e9:,.2f} GB free: free some space, or write to another disk"
        )


def _check_disk(folder: Path, found: Survey, trial: Trial) -> None:
    text_bytes = found.expected_bytes
    documents = found.num_documents * text_bytes // max(found.num_bytes, 1)
    needed = int(1.1 * TOKEN_BYTES * trial.tokens_per_byte * text_bytes) + 16 * documents + (1 << 20)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the data folder would take about {needed / 1e6:,.0f} MB, but its disk has {free / 1e6:,.0f} MB "
            "free: free some space, or write to another disk"
        )


def _workers(workers: int | None, found: Survey) -> int:
    if found.expected_bytes < _SMALL_BYTES:
        return 1  # the same bytes, sooner
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers or min(cores, _MOST_WORKERS)


def _write(folder: Path, plan: Plan, found: Survey, workers: int, spool: Spool) -> Manifest:
    """Fill `folder`; returns the manifest, which is written last."""
    with written_beside(folder / TOKENIZER) as file:
        file.write(plan.tokenizer.proto)
    stamps = [file.stamp() for file in plan.files]
    encoding = Encoding(plan, folder, _fingerprint(plan), workers, spool)
    splits = encoding.run(found.total_input_bytes)
    _check_unchanged(plan, found, encoding.documents, stamps)
    is_for_score = all(file.split == "val" for file in plan.files)
    for split, entry in splits.items():
        if not entry.documents and not (is_for_score and split == "train"):
            duplicates = split == "train" and entry.duplicates
            reason = "val has the same ones" if duplicates else "they are empty, too much alike, or cleaned away"
            raise DataError(f"no documents are left for {split}, {reason}: give more text, or other text for val")
    manifest = Manifest(
        tokenizer=TokenizerEntry(
            file=TOKENIZER,
            sha256=plan.tokenizer.sha256,
            vocab_size=plan.tokenizer.vocab_size,
            normalization=plan.tokenizer.normalization,
        ),
        settings=plan.settings,
        sources=tuple(
            SourceEntry(file=file.name, kind=file.kind, split=file.split, documents=count)
            for file, count in zip(plan.files, encoding.documents, strict=True)
        ),
        splits=splits,
    )
    write_manifest(folder, manifest)
    return manifest


def _check_unchanged(plan: Plan, found: Survey, documents: list[int], stamps: list[Any]) -> None:
    """DataError when the files are not what they were when they were surveyed."""
    if found.documents is not None and list(found.documents) != documents:
        raise DataError(
            f"the sources changed while they were read ({sum(found.documents):,} documents, then "
            f"{sum(documents):,}): build again"
        )
    if stamps != [file.stamp() for file in plan.files]:
        raise DataError("the sources changed while they were read: build again")


def _notes(manifest: Manifest, asked_vocab_size: int | None) -> Iterator[str]:
    got = manifest.tokenizer.vocab_size
    if asked_vocab_size is not None and got < asked_vocab_size:
        yield f"the text gave {got:,} pieces, fewer than the {asked_vocab_size:,} asked for"
    if manifest.settings.val_fraction and all(source.split == BY_HASH for source in manifest.sources):
        held_out, train = (manifest.splits[name].original_bytes for name in ("val", "train"))
        share = held_out / max(held_out + train, 1)
        if share > 2 * manifest.settings.val_fraction:
            yield (
                f"{share:.0%} of the text is held out instead of {manifest.settings.val_fraction:.0%}, since documents "
                "are held out whole, and these are few or long: more text, or `epigram data build --val`, changes that"
            )
    for name, split in manifest.splits.items():
        yield from _left_out(name, split, manifest.settings)
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


def _left_out(name: str, split: SplitEntry, settings: Settings) -> Iterator[str]:
    if split.empty_documents:
        yield f"{name}: {split.empty_documents:,} empty documents were left out"
    for count, why in (
        (split.duplicates, "as val has the same text"),
        (split.near_duplicates, "as val has nearly the same text"),
        (split.repeated, "as an earlier one has the same text"),
        (split.short_documents, f"as they are shorter than {settings.min_chars:,} characters"),
        (split.other_language, f"as their language is not {settings.language}"),
    ):
        if count:
            yield f"{name}: {count:,} documents were left out, {why}"
