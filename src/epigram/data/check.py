"""Verify a data folder against itself: hashes, headers, tokens, documents, overlap, bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epigram.data.dataset import DataFolder, allow_validation, open_data
from epigram.data.files import sha256_of
from epigram.data.manifest import MANIFEST, Manifest, altered, document_hashes, hash64, read_hashes, read_manifest
from epigram.data.shards import Shard
from epigram.data.split_writer import count_shared
from epigram.data.transforms.base import count_original
from epigram.data.transforms.base import load as load_transform
from epigram.data.validation import Fetched, read_fetched
from epigram.errors import DataError, UserError
from epigram.progress import Progress

_PIECE_TOKENS = 1 << 20  # looked at at once
# Documents of val that may be in the train shards of others. A web crawl repeats itself, and its publishers leave that;
# splits that overlap by mistake share much more (parameter-golf #2127: 40,000 of 50,000 documents).
_REPEATED_FRACTION = 0.01


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about a data folder. An error makes it unusable, a warning should be known."""

    is_error: bool
    text: str


def check(
    path: str | Path, tokenizer_file: str | Path | None = None, *, allow_other_validation: bool = False
) -> list[Finding]:
    """Everything that is wrong with a data folder; an empty list when all is well. Reads every byte of it.

    allow_other_validation: write into a folder of published shards that its validation split is meant, though it is
    not the published one. Raises UserError when `path` is no data folder at all.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"there is no data folder {folder}: check the path")
    if not (folder / MANIFEST).exists():
        if allow_other_validation:
            allow_validation(folder, tokenizer_file)
        try:
            data = open_data(folder, tokenizer_file)
        except DataError as error:
            return _errors([str(error)])
        record = read_fetched(folder)
        unknown = f"there is no {MANIFEST}: the hashes of the shards cannot be checked"
        warnings = [] if record and record.files else [unknown]
        if data.validation is not None and data.validation.problem is not None:
            warnings.append(f"scores will say: {data.validation.text}")
        found = [Finding(is_error=False, text=text) for text in warnings]
        return [*found, *_errors(_check_fetched(folder, record)), *_errors(_check_bare(data))]
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return _errors([str(error)])
    if problems := list(_check_hashes(folder, manifest)):
        return _errors(problems)  # nothing read from altered files would mean anything
    return _errors(_check_contents(folder, manifest, tokenizer_file))


def _errors(texts: Iterator[str | Finding] | Iterator[str] | list[str]) -> list[Finding]:
    """The sentences as errors; one that is raised on the way is the last of them."""
    findings = []
    try:
        for text in texts:
            findings.append(text if isinstance(text, Finding) else Finding(is_error=True, text=text))
    except DataError as error:
        findings.append(Finding(is_error=True, text=str(error)))
    return findings


def _check_hashes(folder: Path, manifest: Manifest) -> Iterator[str]:
    expected = {manifest.tokenizer.file: manifest.tokenizer.sha256}
    for split in manifest.splits.values():
        expected |= {shard.file: shard.sha256 for shard in (*split.shards, *split.byte_counts)}
        expected[split.hashes.file] = split.hashes.sha256
    with Progress("hashing", total=len(expected), unit="files") as progress:
        for file, sha256 in expected.items():
            if problem := altered(folder, file, sha256):
                yield problem
            progress.advance()
    if extra := {path.name for path in folder.glob("*.bin")} - set(expected):
        yield f"the manifest knows nothing of {', '.join(sorted(extra))}: remove what does not belong here"


def _check_fetched(folder: Path, record: Fetched | None) -> Iterator[str]:
    """Files that are not what was fetched."""
    files = record.files if record else {}
    with Progress("hashing", total=len(files), unit="files") as progress:
        for name, known in files.items():
            if not (folder / name).is_file():
                yield f"{name} is missing: fetch again"
            elif sha256_of(folder / name) != known.sha256:
                yield f"{name} is not the file that was fetched (its hash differs): remove it and fetch again"
            progress.advance()


def _check_contents(folder: Path, manifest: Manifest, tokenizer_file: str | Path | None) -> Iterator[str]:
    data = open_data(folder, tokenizer_file)
    for split, entry in manifest.splits.items():
        totals = _Totals()
        yield from _read_documents(data, split, totals, read_hashes(folder, entry))
        facts = {
            "tokens": (data.num_tokens(split), entry.tokens),
            "documents": (totals.documents, entry.documents),
            "unknown tokens": (totals.unknown_tokens, entry.unknown_tokens),
            "bytes of text": (totals.spelled_bytes, entry.normalized_bytes - entry.unknown_bytes),
        }
        for what, (found, promised) in facts.items():
            if found != promised:
                yield f"{split} holds {found:,} {what}, and the manifest says {promised:,}: build the data again"
    if both := count_shared(folder, manifest.splits, 1):
        yield f"{both:,} documents of train are in val too, so scores would mean nothing: build the data again"


def _check_bare(data: DataFolder) -> Iterator[str | Finding]:
    """What can be said of a folder without a manifest. Documents are compared by their tokens."""
    in_val: dict[int, bool] = {}
    for split in ("val", "train"):
        shards = data.shards[split]
        if not shards:
            yield f"there are no {split} shards"
            continue
        totals = _Totals(in_val=in_val, collects=split == "val")
        yield from _read_documents(data, split, totals, None)
        if not totals.documents:
            yield f"{split} holds no BOS, so no document begins in it: is {data.tokenizer_path.name} its tokenizer?"
    if shared := sum(in_val.values()):
        share = shared / len(in_val)
        text = f"{shared:,} of {len(in_val):,} different documents of val are in train too"
        leaks = share > _REPEATED_FRACTION
        yield Finding(is_error=leaks, text=f"{text}, so scores would mean nothing: use other shards" if leaks else text)
    data.byte_counts("val", 1)  # raises when text was transformed and nothing says how many bytes it had


@dataclass
class _Totals:
    """Sums over the documents of a split; the text in front of the first BOS is in none of them.

    in_val: hashes of the tokens of validation documents, and whether each was met in train; the reading either
    `collects` them or looks for them. None for neither.
    """

    in_val: dict[int, bool] | None = None
    collects: bool = False
    documents: int = 0
    unknown_tokens: int = 0
    spelled_bytes: int = 0


def _read_documents(data: DataFolder, split: str, totals: _Totals, hashes: NDArray[np.uint64] | None) -> Iterator[str]:
    """Add up the documents of a split and compare each with its hashes; a sentence for each kind of error."""
    tokenizer, byte_counts = data.tokenizer, data.sidecar(split)
    transform = load_transform(data.transform) if data.transform else None
    wrong_bytes = wrong_hashes = wrong_counts = place = 0
    for tokens in _documents(data.split(split), tokenizer.bos_id, tokenizer.vocab_size):
        spelled = tokenizer.decode_bytes(tokens)
        unknown = int(np.count_nonzero(tokens == tokenizer.unk_id))
        wrong_bytes += tokenizer.count_bytes(tokens) != len(spelled)
        if transform is not None:
            if byte_counts is not None:
                right = count_original(transform, tokenizer.byte_tables(), tokens, spelled)
                wrong_counts += not np.array_equal(right, byte_counts[place : place + len(tokens)])
            spelled = transform.decode(spelled.decode("utf-8")).encode("utf-8")
        place += len(tokens)
        if hashes is not None and not unknown and totals.documents < len(hashes):
            wrong_hashes += document_hashes(spelled) != tuple(hashes[totals.documents].tolist())
        if totals.in_val is not None and len(tokens) > 1:
            own = hash64(tokens.tobytes())
            if totals.collects or own in totals.in_val:
                totals.in_val[own] = not totals.collects
        totals.documents += 1
        totals.unknown_tokens += unknown
        totals.spelled_bytes += len(spelled)
    if wrong_bytes:
        yield f"{wrong_bytes:,} documents spell other byte counts than the byte tables: is it the right tokenizer?"
    if wrong_counts:
        yield f"{wrong_counts:,} documents have byte counts that are not those of their text: build the data again"
    if wrong_hashes:
        yield f"{wrong_hashes:,} documents are not the texts that their hashes were taken of: build the data again"


def _documents(shards: Sequence[Shard], bos_id: int, vocab_size: int) -> Iterator[NDArray[np.uint16]]:
    """Documents of a split with their BOS, over shard borders; DataError for an id beyond the vocabulary."""
    parts: list[NDArray[np.uint16]] = []  # of the document that has begun
    with Progress("reading", total=sum(shard.num_tokens for shard in shards), unit="tokens") as progress:
        for shard in shards:
            tokens = shard.tokens
            for start in range(0, len(tokens), _PIECE_TOKENS):
                piece = np.array(tokens[start : start + _PIECE_TOKENS])
                if (largest := int(piece.max())) >= vocab_size:
                    raise DataError(
                        f"shard {shard.path} holds the id {largest}, beyond the vocabulary of "
                        f"{vocab_size:,}: its tokenizer is another one"
                    )
                before, *begun = np.split(piece, np.flatnonzero(piece == bos_id))
                if parts:
                    parts.append(before)
                for document in begun:
                    if parts:
                        yield np.concatenate(parts)
                    parts = [document]
                progress.advance(len(piece))
    if parts:
        yield np.concatenate(parts)
