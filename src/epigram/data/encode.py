"""Documents to tokens in several processes, in order, with a proof of the byte count for each document."""

import collections
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import signal
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epigram.data.clean import NEAR, Cleaner, Cleaning
from epigram.data.gather import BY_HASH
from epigram.data.manifest import document_hashes
from epigram.data.sources.base import Part
from epigram.data.survey import split_hash
from epigram.data.tokenizer import Tokenizer
from epigram.data.transforms.base import count_original
from epigram.data.transforms.base import load as load_transform
from epigram.data.works import Work
from epigram.errors import DataError

_IN_FLIGHT_BYTES = 16 << 20  # at most this, or one part
_RESULT_BYTES = 32 << 20  # of text, after which a worker hands over what it has of a long part


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Tokens of some documents, one after another; the other arrays have an entry for each document.

    tokens: (T,) uint16. byte_counts: (T,) uint16, bytes of text that each token stands for, where a transform makes
    them differ from the tables; else (0,). num_tokens: (N,) int64, 0 for a document that is left out, which has no BOS
    either. reasons: (N,) uint8, why it is (`clean.DROPPED`, from 1), 0 where it is not. is_val: (N,) bool.
    original_bytes, normalized_bytes, unknown_tokens, unknown_bytes: (N,) int64. hashes: (N, 2) uint64, start and
    whole. num_read: documents that were read, those of the other split included. rest: what is left of the part.
    """

    tokens: NDArray[np.uint16]
    byte_counts: NDArray[np.uint16]
    num_tokens: NDArray[np.int64]
    reasons: NDArray[np.uint8]
    is_val: NDArray[np.bool_]
    original_bytes: NDArray[np.int64]
    normalized_bytes: NDArray[np.int64]
    unknown_tokens: NDArray[np.int64]
    unknown_bytes: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    num_read: int
    rest: Part | None = None


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """What a process must know to encode. Everything in it can be sent to one.

    field: of records. transform: name of a text transform, or "". limit, seed: which documents of files without a
    split go to val (`survey.val_limit`). keep: "val" or "train" to pass over the documents of the other, or "both".
    near: signatures of validation documents for cleaning, (N, PERMUTATIONS) uint32, or None.
    """

    tokenizer: Tokenizer
    field: str
    cleaning: Cleaning
    transform: str
    limit: int
    seed: int
    keep: str = "both"
    near: NDArray[np.uint32] | None = None


class Encoder:
    """Encodes parts of files by a job."""

    def __init__(self, job: EncodeJob) -> None:
        self._job, self._tokenizer = job, job.tokenizer
        self._cleaner = Cleaner(job.cleaning, job.near)
        self._transform = load_transform(job.transform) if job.transform else None

    def encode(self, part: Part, split: str) -> EncodedBatch:
        """Encode documents; DataError, naming the document, when its tokens do not stand for its very bytes."""
        rows, read, text_bytes = _Rows(), 0, 0
        for label, text in part.documents(self._job.field):
            read += 1
            text_bytes += self._add(rows, label, text, split)
            if text_bytes >= _RESULT_BYTES and hasattr(part, "after"):
                return rows.batch(read, part.after(read))
        return rows.batch(read, None)

    def _add(self, rows: "_Rows", label: str, text: str, split: str) -> int:
        """Encode one document into `rows`, unless it is of the other split; returns its bytes."""
        normalized = self._tokenizer.normalize(text)
        raw = normalized.encode("utf-8")
        hashes = document_hashes(raw)
        is_val = split == "val" or (split == BY_HASH and split_hash(hashes[1], self._job.seed) < self._job.limit)
        if self._job.keep not in ("both", "val" if is_val else "train"):
            return len(raw)
        reason = self._cleaner.reason(normalized)
        if not reason and not is_val and self._cleaner.is_near(normalized):
            reason = NEAR
        tokens, counts = np.empty(0, np.uint16), np.empty(0, np.uint16)
        unknown = unknown_bytes = 0
        if not reason:
            tokens, counts, unknown_bytes = self._tokens(normalized, raw, label, is_val)
            unknown = int(np.count_nonzero(tokens == self._tokenizer.unk_id))
        original_bytes = len(raw) if normalized is text else len(text.encode("utf-8"))
        rows.tokens.append(tokens)
        rows.byte_counts.append(counts)
        rows.columns.append((len(tokens), reason, is_val, original_bytes, len(raw), unknown, unknown_bytes))
        rows.hashes.append(hashes)
        return len(raw)

    def _tokens(
        self, normalized: str, raw: bytes, label: str, is_val: bool
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint16], int]:
        """Tokens of a document, the bytes of text of each (where asked for), and the bytes not expressed."""
        if self._transform is None:
            tokens = self._tokenizer.encode_normalized(normalized)
            return tokens, tokens[:0], prove_bytes(self._tokenizer, tokens, raw, label)
        transformed = self._transform.encode(normalized)
        tokens = self._tokenizer.encode_normalized(transformed)
        missing = prove_bytes(self._tokenizer, tokens, transformed.encode("utf-8"), label)
        if self._transform.decode(transformed) != normalized:
            raise DataError(f"{label}: the transform {self._job.transform} does not give its text back: leave it away")
        if not is_val:
            return tokens, np.zeros(len(tokens), np.uint16), missing
        spelled = self._tokenizer.decode_bytes(tokens)
        counts = count_original(self._transform, self._tokenizer.byte_tables(), tokens, spelled)
        if int(counts.sum()) + missing != len(raw):
            raise DataError(f"{label}: its tokens stand for {int(counts.sum()):,} of {len(raw):,} bytes: report this")
        return tokens, counts, missing


class _Rows:
    """Encoded documents on their way into a batch."""

    def __init__(self) -> None:
        self.tokens: list[NDArray[np.uint16]] = [np.empty(0, np.uint16)]
        self.byte_counts: list[NDArray[np.uint16]] = [np.empty(0, np.uint16)]
        self.columns: list[tuple[int, ...]] = []
        self.hashes: list[tuple[int, int]] = []

    def batch(self, num_read: int, rest: Part | None) -> EncodedBatch:
        columns = np.array(self.columns, np.int64).reshape(-1, 7).T
        return EncodedBatch(
            tokens=np.concatenate(self.tokens),
            byte_counts=np.concatenate(self.byte_counts),
            num_tokens=columns[0],
            reasons=columns[1].astype(np.uint8),
            is_val=columns[2].astype(np.bool_),
            original_bytes=columns[3],
            normalized_bytes=columns[4],
            unknown_tokens=columns[5],
            unknown_bytes=columns[6],
            hashes=np.array(self.hashes, np.uint64).reshape(-1, 2),
            num_read=num_read,
            rest=rest,
        )


def prove_bytes(tokenizer: Tokenizer, tokens: NDArray[np.uint16], normalized: bytes, label: str) -> int:
    """Show that a document's tokens, BOS in front, stand for its normalised text; returns the bytes they do
    not express.

    Two independent accounts must agree with the text itself: the bytes that the tokens spell, and the sum of
    the byte tables, which is what scores divide by. Bytes are missing only where a tokenizer without byte
    pieces put its unknown id; everything between those places must be spelled in order. DataError otherwise.
    """
    spelled = tokenizer.decode_bytes(tokens)
    counted = tokenizer.count_bytes(tokens)
    missing = len(normalized) - len(spelled)
    right = spelled == normalized if not missing else _spelled_with_gaps(tokenizer, tokens, normalized)
    if right and counted == len(spelled):
        return missing
    raise DataError(
        f"{label}: the tokenizer does not account for its text ({len(normalized):,} bytes, of which the "
        f"tokens spell {len(spelled):,} and the byte tables count {counted:,}): use another tokenizer, or "
        "let one be trained"
    )


def _spelled_with_gaps(tokenizer: Tokenizer, tokens: NDArray[np.uint16], text: bytes) -> bool:
    """Whether the known tokens spell the text, in order, with something in place of each unknown one."""
    # Each run but the first begins with an unknown token, behind which no blank is counted: it belongs to the
    # gap.
    runs = [tokenizer.decode_bytes(run) for run in np.split(tokens, np.flatnonzero(tokens == tokenizer.unk_id))]
    if not text.startswith(runs[0]) or not text.endswith(runs[-1]):
        return False
    place, end = len(runs[0]), len(text) - len(runs[-1])
    for run in runs[1:-1]:
        found = text.find(run, place + 1, end)
        if found < 0:
            return False
        place = found + len(run)
    return len(runs) > 1 and place < end


def encode_all(job: EncodeJob, todo: Iterable[Work], workers: int) -> Generator[tuple[Work, EncodedBatch]]:
    """Encode works with `workers` processes (in this one when it is 1), in their order.

    A few works a worker are in flight, no more. A long work can give several batches; all but the last have a `rest`.
    The first error of a document stops everything and is raised here.
    """
    if workers == 1:
        encoder = Encoder(job)
        for work in todo:
            yield from _whole(work, encoder.encode(work.part, work.split), encoder.encode)
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (job,))
    try:
        yield from _in_order(pool, iter(todo), 2 * workers)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            "a worker process died, perhaps for lack of memory: try again with one worker (from a script, "
            "call the build under `if __name__ == '__main__'`)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _whole(work: Work, batch: EncodedBatch, encode: Any) -> Iterator[tuple[Work, EncodedBatch]]:
    """The batch and those of what is left of its part."""
    yield work, batch
    while batch.rest is not None:
        batch = encode(batch.rest, work.split)
        yield work, batch


def _in_order(
    pool: concurrent.futures.ProcessPoolExecutor, todo: Iterator[Work], in_flight: int
) -> Iterator[tuple[Work, EncodedBatch]]:
    pending: collections.deque[tuple[concurrent.futures.Future[EncodedBatch], Work, int]] = collections.deque()

    def encode(part: Part, split: str) -> EncodedBatch:
        return pool.submit(_encode, part, split).result()

    for work in todo:
        size = work.part.held_bytes
        while pending and (len(pending) == in_flight or sum(held for *_, held in pending) + size > _IN_FLIGHT_BYTES):
            done, first, _ = pending.popleft()
            yield from _whole(first, done.result(), encode)
        pending.append((pool.submit(_encode, work.part, work.split), work, size))
    while pending:
        done, first, _ = pending.popleft()
        yield from _whole(first, done.result(), encode)


_worker_encoder: Encoder | None = None  # of a worker process, set when it starts


def _start_worker(job: EncodeJob) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers
    _worker_encoder = Encoder(job)


def _encode(part: Part, split: str) -> EncodedBatch:
    assert _worker_encoder is not None
    return _worker_encoder.encode(part, split)
