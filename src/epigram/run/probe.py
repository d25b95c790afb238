"""Puts the probes of `epigram.evaluation.probes` to a model and the beginning of a split, method by method."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epigram.byte_tables import ByteTables
from epigram.data.dataset import DataFolder
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.evaluation import probes
from epigram.evaluation.bpb import Score
from epigram.evaluation.passes import parts
from epigram.evaluation.probes import Finding
from epigram.evaluation.scorer import MiscountError, score, token_nlls
from epigram.evaluation.windows import Method
from epigram.run.setup import Losses

_CONTEXTS = (1, 5, 33)  # tokens before the predictions whose probabilities are added up
_CHANGED = 5  # tokens, and documents, that are changed, one at a time
_ROWS = 64  # of the alternatives that are asked for at once
# Sums of a thousand rounded logits; and bits per byte, where a batch of another shape rounds otherwise.
_NORMAL = {torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3, torch.float64: 1e-6}
_SAME = {torch.float32: 1e-5, torch.bfloat16: 5e-4, torch.float16: 1e-4, torch.float64: 1e-7}


class ProbeError(UserError):
    """A score that must not be believed."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What experiments are made with: a model's losses, and how they are scored, in forwards of at most `batch_tokens`.

    tables: of the model's tokenizer, with V ids.
    """

    losses: Losses
    tables: ByteTables
    method: Method
    device: torch.device
    batch_tokens: int

    def nats(self, tokens: NDArray[np.uint16]) -> NDArray[np.float32]:
        """What each of (n + 1,) tokens but the first costs, (n,)."""
        return token_nlls(
            self.losses.of(self.method), tokens, self.method, device=self.device, batch_tokens=self.batch_tokens
        )

    def misread(self, tokens: NDArray[np.uint16], absent: int, true: int) -> NDArray[np.float32]:
        """The same where `true` is scored where `absent` is read."""
        told = partial(told_apart, absent=absent, true=true)
        losses = Losses(windows=told(self.losses.windows), stream=lambda method: told(self.losses.stream(method)))
        return replace(self, losses=losses).nats(tokens)

    def alternatives(self, context: NDArray[np.uint16]) -> NDArray[np.float64]:
        """What each token costs after `context`, (V,): as many rows, each with another last target."""
        vocab_size = len(self.tables.token_bytes)
        ids = torch.from_numpy(context.astype(np.int64)).to(self.device)
        found = []
        with torch.no_grad():
            for first in range(0, vocab_size, _ROWS):
                last = torch.arange(first, first + _ROWS, device=self.device).clamp(max=vocab_size - 1)
                inputs = ids.expand(_ROWS, -1).contiguous()
                targets = torch.cat([inputs[:, 1:], last[:, None]], dim=1)
                if self.method.is_streaming:
                    nats = self.losses.stream(self.method)(inputs, targets)
                else:
                    nats = self.losses.windows(inputs, targets, rope_len=self.method.seq_len, last=None)
                found.append(nats[:, -1].cpu().double().numpy())
        return np.concatenate(found)[:vocab_size]

    def score(self, tokens: NDArray[np.uint16], rank: int = 0, world_size: int = 1) -> Score:
        """The score, or the part of it that one of several processes makes."""
        return score(
            self.losses.of(self.method), tokens, self.tables, self.method, device=self.device,
            batch_tokens=self.batch_tokens, expected_bytes=None, rank=rank, world_size=world_size, progress=False,
        )  # fmt: skip

    def times(self, tokens: NDArray[np.uint16]) -> NDArray[np.int64]:
        """How often each of (n + 1,) tokens but the first is scored, (n,)."""
        times = np.zeros(len(tokens) - 1, np.int64)
        with torch.no_grad():
            for part in parts(
                self.losses.of(self.method), tokens, self.method.plan(len(times)), self.method,
                batch_tokens=self.batch_tokens, world_size=1, device=self.device,
            ):  # fmt: skip
                np.add.at(times, part.counted()[0], 1)
        return times


def told_apart(loss: Callable[..., Tensor], absent: int, true: int) -> Callable[..., Tensor]:
    """`loss` of inputs and targets, where `absent` as a target stands for `true`, and as an input for itself."""

    def call(inputs: Tensor, targets: Tensor, **settings: Any) -> Tensor:
        return loss(inputs, torch.where(targets == absent, true, targets), **settings)

    return call


def probe(
    losses: Losses,
    data: DataFolder,
    method: Method,
    context: Context,
    *,
    dtype: torch.dtype,
    batch_tokens: int,
    split: str = "val",
    isolated: bool = False,
) -> list[Finding]:
    """What each probe finds for one method. dtype: the precision that the model computes in. isolated: the model
    promises to keep documents apart, see `ModelConfig.documents`.

    Where tokens are scored twice or not at all, no score of a token can be asked for, and only this is found.
    """
    tokenizer, method = data.tokenizer, _small(method)
    subject = Subject(
        losses=losses,
        tables=tokenizer.byte_tables(),
        method=method,
        device=context.device,
        batch_tokens=batch_tokens,
    )
    length = method.span
    tokens = data.stream(split, 3 * length + length // 3 + 2)
    places = _places(method, len(tokens))
    some = [tokens[: min(count, len(tokens) - 1)] for count in _CONTEXTS]
    counted = [
        _once(subject, tokens),
        probes.text_bytes(data.stream(split), subject.tables, tokenizer.decode_bytes, tokenizer.bos_id)
        if data.byte_counts(split, 1) is None
        else Finding("bytes of the text", True, "counted before its transform, which `data check` verifies"),
    ]
    if not counted[0].passed:
        return counted
    found = [
        probes.causality(subject.nats, tokens, places, tokenizer.vocab_size),
        probes.own_token(subject.nats, subject.misread, tokens, places, tokenizer.vocab_size),
        probes.normalisation(subject.alternatives, some, _NORMAL.get(dtype, 1e-3)),
        *counted,
        probes.sameness(_ways(subject, tokens), _SAME.get(dtype, 5e-4)),
    ]
    if isolated:
        documents = _documents(tokens, method.seq_len, tokenizer.bos_id)
        found.append(probes.isolation(subject.nats, documents, tokenizer.bos_id, tokenizer.vocab_size, _CHANGED))
    return found


def _once(subject: Subject, tokens: NDArray[np.uint16]) -> Finding:
    try:
        return probes.once(subject.score, subject.times, tokens)
    except MiscountError as error:  # the scorer's own count found it first
        return Finding("each token once", False, str(error))


def _documents(tokens: NDArray[np.uint16], seq_len: int, bos_id: int) -> NDArray[np.uint16]:
    """The same with a document at each window's start and another from a third of it on, whatever its text's are.

    So a window holds several, one begins with a chunk of a stream, and one lies in two chunks.
    """
    cut = tokens.copy()
    for first in (0, max(seq_len // 3, 1)):
        cut[first::seq_len] = bos_id
    return cut


def check(findings: dict[str, list[Finding]]) -> None:
    """Raises ProbeError that names what failed."""
    failed = [f"{method}: {f.name}: {f.detail}" for method, found in findings.items() for f in found if not f.passed]
    if failed:
        raise ProbeError("do not believe this score: " + "; ".join(failed))


def _places(method: Method, num_tokens: int) -> list[int]:
    """Tokens to change: near both ends, in the midst, and on both sides of a seam between windows, or between chunks
    and between segments."""
    seams = [method.span] if not method.is_streaming else [method.streaming.chunk_tokens, method.span]
    near = {seam + side for seam in seams for side in (-1, 0, 1)}
    spread = np.linspace(2, num_tokens - 1, _CHANGED).astype(int).tolist()
    return sorted(place for place in near.union(spread) if 1 <= place < num_tokens)


def _small(method: Method) -> Method:
    """The same with short segments and chunks, so that a few thousand tokens have seams of every kind."""
    if not method.is_streaming:
        return method
    overlap = max(method.streaming.overlap, 1)
    segment, chunk = (overlap + 1) * method.seq_len, max(method.seq_len // 2, 1)
    short = replace(method.streaming, segment_tokens=segment, overlap=overlap, chunk_tokens=chunk)
    return replace(method, streaming=short)


def _ways(subject: Subject, tokens: NDArray[np.uint16]) -> dict[str, float]:
    """Bits per byte with several sizes of batches, and as the sum of what several processes find."""
    found, seq_len = {}, subject.method.seq_len
    for size in (subject.batch_tokens, seq_len, 2 * seq_len + 1):
        found[f"batches of {size}"] = replace(subject, batch_tokens=size).score(tokens).val_bpb
    for processes in (2, 3):
        shares = [subject.score(tokens, rank, processes) for rank in range(processes)]
        found[f"{processes} processes"] = sum(shares[1:], shares[0]).val_bpb
    return found
