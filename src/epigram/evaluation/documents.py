"""Scores documents by themselves, each from its start, with adapters that learn what of it is scored already.

A document is read chunk by chunk. Of each, a window of up to seq_len tokens that ends with the chunk gives the losses
of the chunk's targets; then the adapters learn these, but for the document's last. Several documents are read side by
side, and processes share them; their order, by length, is that of the work and not of what is known.
Source: parameter-golf #1530.

Legend: B documents side by side, T tokens of each that a forward reads.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from epigram.evaluation.adapt_config import LoraConfig
from epigram.evaluation.lora import LoraLoss
from epigram.evaluation.passes import Part
from epigram.evaluation.scorer import Pace
from epigram.kernels.lora import Lora


class DocumentAdapter(Protocol):
    """Learns documents from what the scorer releases."""

    def begin(self, num_documents: int) -> None:
        """So many new documents: everything is forgotten."""

    def factors(self, num_rows: int) -> Lora:
        """What the first so many documents add to the model now."""

    def learn(self, tokens: NDArray[np.uint16], num_new: int) -> None:
        """`tokens` (rows, T + 1) of the first so many documents are scored, the last `num_new` of each just now."""


def find_documents(tokens: NDArray[np.integer], bos_id: int) -> NDArray[np.int64]:
    """(documents, 2): the targets first..end-1 of each, as in a stream of (n + 1,) tokens that has n targets.

    A document begins with its BOS token, which the one before predicts; what precedes the first one is a document.
    """
    starts = np.flatnonzero(tokens[:-1] == bos_id)
    starts = np.concatenate([np.zeros(1, np.int64), starts[starts > 0]])
    return np.stack([starts, np.append(starts[1:], len(tokens) - 1)], axis=1)


def document_batches(
    documents: NDArray[np.int64], config: LoraConfig, seq_len: int, batch_tokens: int
) -> list[NDArray[np.int64]]:
    """`documents` in batches, the longest first: as many as a forward of `batch_tokens` holds, and at least one.

    Fillers do not count: a forward reads whole chunks, of each document up to chunk_tokens - 1 tokens more.
    """
    lengths = documents[:, 1] - documents[:, 0]
    ordered = documents[np.argsort(-lengths, kind="stable")]
    found, first = [], 0
    while first < len(ordered):
        longest = int(ordered[first, 1] - ordered[first, 0])
        size = max(min(config.num_documents, batch_tokens // min(seq_len, longest)), 1)
        found.append(ordered[first : first + size])
        first += size
    return found


def document_parts(
    nll: LoraLoss,
    tokens: NDArray[np.uint16],
    batches: list[NDArray[np.int64]],
    adapter: DocumentAdapter,
    config: LoraConfig,
    seq_len: int,
    device: torch.device,
    pace: Pace | None = None,
    *,
    filler: int,
) -> Iterator[Part]:
    """The losses of `batches`, a rank's share, chunk after chunk; what goes on is learned when its losses are out.

    pace: is told after each chunk, when it is learned, what share of the `work` is done. filler: what rows read behind
    the end of their documents, a token that begins none: attention keeps so many apart.
    """
    total, done = sum(work(batch, config, seq_len) for batch in batches), 0

    def advance(num_read: int) -> None:
        nonlocal done
        done += num_read
        if pace is not None:
            pace(done / total)

    for batch in batches:
        yield from _read(nll, tokens, batch, adapter, config.chunk_tokens, seq_len, device, filler, advance)


def work(batch: NDArray[np.int64], config: LoraConfig, seq_len: int) -> int:
    """Tokens that the scoring forwards of a batch read; learning reads as many again, forward and backward."""
    chunks = -(-(batch[:, 1] - batch[:, 0]) // config.chunk_tokens)
    ends = config.chunk_tokens * np.arange(1, int(chunks.max()) + 1)
    read = np.cumsum(np.minimum(ends, seq_len))
    return int(read[chunks - 1].sum())


def _read(
    nll: LoraLoss,
    tokens: NDArray[np.uint16],
    batch: NDArray[np.int64],
    adapter: DocumentAdapter,
    chunk: int,
    seq_len: int,
    device: torch.device,
    filler: int,
    advance: Callable[[int], None],
) -> Iterator[Part]:
    start, lengths = batch[:, 0], batch[:, 1] - batch[:, 0]
    adapter.begin(len(batch))
    for begin in range(0, int(lengths[0]), chunk):
        rows, end = int((lengths > begin).sum()), begin + chunk  # the longest come first
        # Windows depend on the chunk alone: how long a document will be must not show. Fillers complete the last
        # chunk: no earlier position sees them.
        first = max(end - seq_len, 0)
        places, last = np.arange(first, end + 1), lengths[:rows, None]
        window = tokens[start[:rows, None] + np.minimum(places, last)]
        inputs = np.where(places[:-1] < last, window[:, :-1], filler)
        ids, targets = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (inputs, window[:, 1:]))
        with torch.no_grad():
            losses = nll(ids, targets, rope_len=seq_len, last=chunk, lora=adapter.factors(rows))
        count = np.minimum(lengths[:rows] - begin, chunk)
        scored = torch.arange(chunk, device=device) < torch.from_numpy(count).to(device)[:, None]
        yield Part(losses, scored, start[:rows] + begin, int(count.sum()))
        if going := int((lengths > end).sum()):
            adapter.learn(window[:going].copy(), chunk)
        advance(inputs.size)
