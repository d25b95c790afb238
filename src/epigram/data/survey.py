"""The first reading of the sources: whatever is wrong with the text shows before anything is written.

Of a small input all is read. Of a large one as much as the question needs: a sample to learn a tokenizer from, or to
try the given one on. The rest is read once, when it is encoded.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from epigram.data.gather import BY_HASH, SourceFile
from epigram.data.manifest import hash64
from epigram.data.tokenizer import Tokenizer
from epigram.data.tokenizer_training import TextSample
from epigram.data.works import works
from epigram.errors import DataError
from epigram.progress import Progress

EVERY_HASH = 1 << 64
_FEW_VAL_DOCUMENTS = 50  # expected; below this, chance could leave val empty, so documents are counted off instead
_TRIAL_BYTES = 1 << 20
_SMALL_INPUT_BYTES = 16 << 20  # of files, that are read whole
_SAMPLED_BYTES = 1 << 30  # of text, that a tokenizer's sample is drawn from at most
MAX_UNKNOWN_FRACTION = 0.05


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the first reading found.

    documents: of each file where all was read, else None. num_documents, num_bytes: of the text that was read, from
    input_bytes of files. total_input_bytes: of all files. sample: some of the text to train on.
    """

    documents: tuple[int, ...] | None
    num_documents: int
    num_bytes: int
    input_bytes: int
    total_input_bytes: int
    sample: TextSample

    @property
    def expected_bytes(self) -> int:
        """Of all text, at the rate of what was read."""
        return int(self.num_bytes * max(self.total_input_bytes / max(self.input_bytes, 1), 1.0))


def survey(
    files: Sequence[SourceFile],
    field: str,
    seed: int,
    *,
    val_fraction: float = 0.0,
    for_training: bool = True,
    local: Callable[[SourceFile], Path] = lambda file: file.path,
) -> Survey:
    """Read everything, or enough of a large input; DataError for whatever is wrong with what is read.

    val_fraction: of documents that may have to be counted off one by one. for_training: a tokenizer is to be learned.
    local: where a file can be read.
    """
    total = sum(file.input_bytes for file in files)
    sampled, is_whole = _sampled(files), is_read_whole(files)
    reading = _Reading(files, sampled, TextSample(seed=seed))
    wanted_documents = _FEW_VAL_DOCUMENTS / val_fraction if val_fraction else 0

    def is_enough() -> bool:
        if is_whole or reading.num_documents < wanted_documents:
            return False
        return reading.sample.seen_bytes >= (_SAMPLED_BYTES if for_training else _TRIAL_BYTES)

    with Progress("reading the text", unit="MB") as progress:
        for index in _order(files, sampled, seed, is_whole):
            reading.read(index, field, local, is_enough, progress)
            if is_enough():
                break
    if not reading.sample.num_bytes:
        names = ", ".join(file.name for file in files)
        purpose = "score" if all(file.split == "val" for file in files) else "train on"
        raise DataError(f"there is no text to {purpose} in {names}: name other sources")
    return Survey(
        documents=tuple(reading.documents) if is_whole else None,
        num_documents=reading.num_documents,
        num_bytes=reading.num_bytes,
        input_bytes=reading.input_bytes,
        total_input_bytes=total,
        sample=reading.sample,
    )


def is_read_whole(files: Sequence[SourceFile]) -> bool:
    """Whether the files are so small that all of them is read before anything is written."""
    return sum(file.input_bytes for file in files) <= _SMALL_INPUT_BYTES


def _sampled(files: Sequence[SourceFile]) -> frozenset[int]:
    """The files that a sample is drawn from: those to train on, or all where everything is to be scored."""
    return frozenset(index for index, file in enumerate(files) if file.split != "val") or frozenset(range(len(files)))


def _order(files: Sequence[SourceFile], sampled: frozenset[int], seed: int, is_whole: bool) -> list[int]:
    """All files as they come; of a large input those to sample, remote ones as they come (they are fetched in this
    order too), others shuffled."""
    if is_whole:
        return list(range(len(files)))
    order = sorted(sampled)
    if not any(file.remote for file in files):
        random.Random(seed).shuffle(order)
    return order


class _Reading:
    """Sums over what was read so far."""

    def __init__(self, files: Sequence[SourceFile], sampled: frozenset[int], sample: TextSample) -> None:
        self.documents = [0] * len(files)
        self.num_documents = self.num_bytes = self.input_bytes = 0
        self.sample = sample
        self._files, self._sampled = files, sampled

    def read(
        self,
        index: int,
        field: str,
        local: Callable[[SourceFile], Path],
        is_enough: Callable[[], bool],
        progress: Progress,
    ) -> None:
        """Read one file, or as much of it as is enough."""
        file = self._files[index]
        for work in works([file], [file.split], field, local=local):
            for _, text in work.part.documents(field):
                self.documents[index] += 1
                self.num_documents += 1
                self.num_bytes += len(text.encode("utf-8"))
                if index in self._sampled:
                    self.sample.add(text)
                progress.update(self.num_bytes / 1e6)
            self.input_bytes += work.part.input_bytes
            if is_enough():
                return


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
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    field: str,
    val_fraction: float,
    seed: int,
    local: Callable[[SourceFile], Path] = lambda file: file.path,
) -> int:
    """The split hash below which a document goes to val: `val_fraction` of all hashes.

    With few documents, where chance might leave val empty, the smallest hashes are counted off exactly, at
    least one. The hash is that of the normalised text, so equal documents stay together. Raises DataError
    when there are not two different documents.
    """
    if val_fraction * found.num_documents >= _FEW_VAL_DOCUMENTS:
        return round(val_fraction * EVERY_HASH)
    every = (text for work in works(files, [BY_HASH], field, local=local) for _, text in work.part.documents(field))
    normalized = (tokenizer.normalize(text).encode("utf-8") for text in every)
    hashes = sorted({split_hash(hash64(text), seed) for text in normalized if text})
    if len(hashes) < 2:
        raise DataError(
            "there is only one document, so none can be held out for validation: give more text, or "
            "validation text by epigram data build --val"
        )
    num_val = min(max(round(val_fraction * len(hashes)), 1), len(hashes) - 1)
    return hashes[num_val - 1] + 1
