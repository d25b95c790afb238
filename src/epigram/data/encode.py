"""Documents to tokens in several processes, in order, with a proof of the byte count for each document."""

import collections
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import signal
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epigram.data.manifest import document_hashes
from epigram.data.tokenizer import Tokenizer
from epigram.errors import DataError

BATCH_BYTES = 1 << 20  # of text that a worker is given at once
BATCH_DOCUMENTS = 4096
_IN_FLIGHT_BYTES = 16 << 20  # at most this, or one batch
Labelled = tuple[str, str]  # where a document comes from, for messages, and its text


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Tokens of some documents, one after another; the other arrays have an entry for each document.

    tokens: (T,) uint16. num_tokens: (N,) int64, 0 for a document that normalises to nothing, which has no BOS
    either. original_bytes, normalized_bytes, unknown_tokens, unknown_bytes: (N,) int64. hashes: (N, 2)
    uint64, start and whole.
    """

    tokens: NDArray[np.uint16]
    num_tokens: NDArray[np.int64]
    original_bytes: NDArray[np.int64]
    normalized_bytes: NDArray[np.int64]
    unknown_tokens: NDArray[np.int64]
    unknown_bytes: NDArray[np.int64]
    hashes: NDArray[np.uint64]


def encode_batch(tokenizer: Tokenizer, documents: list[Labelled]) -> EncodedBatch:
    """Encode documents; DataError, naming the document, when its tokens do not stand for its very bytes."""
    arrays, counts, hashes = [np.empty(0, np.uint16)], [], []
    for label, text in documents:
        tokens, normalized = tokenizer.encode_document(text)
        unknown_bytes = prove_bytes(tokenizer, tokens, normalized, label)
        if not normalized:
            tokens = tokens[:0]
        arrays.append(tokens)
        num_unknown = int(np.count_nonzero(tokens == tokenizer.unk_id))
        counts.append((len(tokens), len(text.encode("utf-8")), len(normalized), num_unknown, unknown_bytes))
        hashes.append(document_hashes(normalized))
    columns = np.array(counts, np.int64).reshape(-1, 5).T
    return EncodedBatch(
        tokens=np.concatenate(arrays),
        num_tokens=columns[0],
        original_bytes=columns[1],
        normalized_bytes=columns[2],
        unknown_tokens=columns[3],
        unknown_bytes=columns[4],
        hashes=np.array(hashes, np.uint64).reshape(-1, 2),
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


def batches(documents: Iterable[Labelled]) -> Iterator[list[Labelled]]:
    """Documents in lists of about `BATCH_BYTES` characters, the same ones however many workers there are."""
    batch: list[Labelled] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(tokenizer: Tokenizer, documents: Iterable[Labelled], workers: int) -> Generator[EncodedBatch]:
    """Encode a stream of documents with `workers` processes (in this one when it is 1), in the order of the
    stream.

    A few batches a worker are in flight, no more. The first error of a document stops everything and is
    raised here.
    """
    if workers == 1:
        yield from (encode_batch(tokenizer, batch) for batch in batches(documents))
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer.proto,)
    )
    try:
        yield from _in_order(pool, batches(documents), 2 * workers)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            "a worker process died, perhaps for lack of memory: try again with one worker (from a script, "
            "call the build under `if __name__ == '__main__'`)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: concurrent.futures.ProcessPoolExecutor, todo: Iterator[list[Labelled]], in_flight: int
) -> Iterator[EncodedBatch]:
    pending: collections.deque[tuple[concurrent.futures.Future[EncodedBatch], int]] = collections.deque()
    for batch in todo:
        size = sum(len(text) for _, text in batch)
        while pending and (len(pending) == in_flight or sum(sizes for _, sizes in pending) + size > _IN_FLIGHT_BYTES):
            yield pending.popleft()[0].result()
        pending.append((pool.submit(_encode, batch), size))
    while pending:
        yield pending.popleft()[0].result()


_worker_tokenizer: Tokenizer | None = None  # of a worker process, set when it starts


def _start_worker(proto: bytes) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers
    _worker_tokenizer = Tokenizer.from_bytes(proto)


def _encode(batch: list[Labelled]) -> EncodedBatch:
    assert _worker_tokenizer is not None
    return encode_batch(_worker_tokenizer, batch)
