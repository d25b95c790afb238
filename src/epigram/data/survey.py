"""The first reading of the sources: whatever is wrong with the text shows before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass

from epigram.data.encode import Labelled
from epigram.data.gather import SourceFile
from epigram.data.manifest import hash64
from epigram.data.tokenizer import Tokenizer
from epigram.data.tokenizer_training import TextSample
from epigram.errors import DataError
from epigram.progress import Progress

EVERY_HASH = 1 << 64
_FEW_VAL_DOCUMENTS = 50  # expected; below this, chance could leave val empty, so documents are counted off instead
_TRIAL_BYTES = 1 << 20
MAX_UNKNOWN_FRACTION = 0.05


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a reading of all sources found: documents of each file, bytes of all text, some of the text."""

    documents: tuple[int, ...]
    num_bytes: int
    sample: TextSample


def labelled(files: tuple[SourceFile, ...] | list[SourceFile], field: str) -> Iterator[Labelled]:
    """All documents of the files with where they come from."""
    for file in files:
        for index, text in enumerate(file.documents(field)):
            yield f"{file.path}, document {index + 1:,}", text


def survey(files: tuple[SourceFile, ...], field: str, seed: int) -> Survey:
    """Read everything once; DataError for whatever is wrong with the text, also when there is none."""
    sample = TextSample(seed=seed)
    documents = []
    with Progress("reading the text", unit="MB") as progress:
        for file in files:
            count = 0
            for text in file.documents(field):
                count += 1
                if file.split != "val":
                    sample.add(text)
                else:
                    sample.seen_bytes += len(text.encode("utf-8"))
                progress.update(sample.seen_bytes / 1e6)
            documents.append(count)
    if not sample.num_bytes:
        raise DataError(f"there is no text to train on in {', '.join(file.name for file in files)}: name other sources")
    return Survey(documents=tuple(documents), num_bytes=sample.seen_bytes, sample=sample)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a tokenizer does on some of the text."""

    tokens_per_byte: float
    unknown_fraction: float


def try_tokenizer(tokenizer: Tokenizer, sample: TextSample) -> Trial:
    """Encode up to a MB of the sample; DataError when the tokenizer cannot express a good part of it."""
    tokens = text_bytes = normalized_bytes = spelled_bytes = 0
    for text in sample.texts():
        ids, normalized = tokenizer.encode_document(text)
        tokens += len(ids)
        text_bytes += len(text.encode("utf-8"))
        normalized_bytes += len(normalized)
        spelled_bytes += len(tokenizer.decode_bytes(ids))
        if text_bytes >= _TRIAL_BYTES:
            break
    unknown_fraction = 1 - spelled_bytes / max(normalized_bytes, 1)
    check_unknown(unknown_fraction)
    return Trial(tokens_per_byte=tokens / text_bytes, unknown_fraction=unknown_fraction)


def check_unknown(fraction: float) -> None:
    """DataError when more of the text than `MAX_UNKNOWN_FRACTION` is unknown to the tokenizer."""
    if fraction > MAX_UNKNOWN_FRACTION:
        raise DataError(
            f"the tokenizer has no pieces for {fraction:.0%} of this text and no byte pieces to spell it "
            "with: use one with byte fallback, or let one be trained on the text"
        )


def split_hash(whole_hash: int, seed: int) -> int:
    """The 64-bit number that decides a document's split."""
    return hash64(f"{seed} {whole_hash}".encode())


def val_limit(
    found: Survey,
    files: tuple[SourceFile, ...],
    tokenizer: Tokenizer,
    field: str,
    val_fraction: float,
    seed: int,
) -> int:
    """The split hash below which a document goes to val: `val_fraction` of all hashes.

    With few documents, where chance might leave val empty, the smallest hashes are counted off exactly, at
    least one. The hash is that of the normalised text, so equal documents stay together. Raises DataError
    when there are not two different documents.
    """
    if val_fraction * sum(found.documents) >= _FEW_VAL_DOCUMENTS:
        return round(val_fraction * EVERY_HASH)
    normalized = (tokenizer.normalize(text).encode("utf-8") for _, text in labelled(files, field))
    hashes = sorted({split_hash(hash64(text), seed) for text in normalized if text})
    if len(hashes) < 2:
        raise DataError(
            "there is only one document, so none can be held out for validation: give more text, or "
            "validation text with --val"
        )
    num_val = min(max(round(val_fraction * len(hashes)), 1), len(hashes) - 1)
    return hashes[num_val - 1] + 1
