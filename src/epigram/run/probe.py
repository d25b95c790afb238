"""Puts the probes of `epigram.evaluation.probes` to a model and the beginning of a split, method by method."""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from epigram.data.dataset import DataFolder
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.evaluation import probes
from epigram.evaluation.bpb import Score
from epigram.evaluation.passes import parts
from epigram.evaluation.probes import Finding
from epigram.evaluation.scorer import score, token_nlls
from epigram.evaluation.windows import Method, StreamingConfig
from epigram.run.setup import Losses

_CONTEXTS = (1, 5, 33)  # tokens before the predictions whose probabilities are added up
_CHANGED = 5  # tokens that are changed, one at a time
_ROWS = 64  # of the alternatives that are asked for at once
# Sums of a thousand rounded logits; and bits per byte, where a batch of another shape rounds otherwise.
_NORMAL = {torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3, torch.float64: 1e-6}
_SAME = {torch.float32: 1e-5, torch.bfloat16: 5e-4, torch.float16: 1e-4, torch.float64: 1e-7}


class ProbeError(UserError):
    """A score that must not be believed."""


def probe(
    losses: Losses,
    data: DataFolder,
    method: Method,
    context: Context,
    *,
    dtype: torch.dtype,
    batch_tokens: int,
    split: str = "val",
) -> list[Finding]:
    """What each probe finds for one method. dtype: the precision that the model computes in."""
    device, tokenizer = context.device, data.tokenizer
    tables, vocab_size = tokenizer.byte_tables(), tokenizer.vocab_size
    method = _small(method)
    length = method.plan(1 << 30).length  # of a window, or a segment
    tokens = data.stream(split)[: 3 * length + length // 3 + 2]
    nll = losses.of(method)
    nats = partial(token_nlls, nll, method=method, device=device, batch_tokens=batch_tokens)
    # A place in the first window, one in the last, and at the seams between.
    places = np.unique(np.linspace(2, len(tokens) - 1, _CHANGED).astype(int)).tolist()
    some = [tokens[: min(count, len(tokens) - 1)] for count in _CONTEXTS]
    return [
        probes.causality(nats, tokens, places, vocab_size),
        probes.normalisation(
            partial(_alternatives, losses, method, device, vocab_size), some, _NORMAL.get(dtype, 1e-3)
        ),
        probes.once(
            partial(_whole, losses, data, method, device, batch_tokens),
            partial(_times, losses, method, device, batch_tokens),
            tokens,
        ),
        probes.text_bytes(data.stream(split), tables, tokenizer.decode_bytes, tokenizer.bos_id)
        if data.byte_counts(split) is None
        else Finding("bytes of the text", True, "counted by the file beside the shards, which `data check` verifies"),
        probes.sameness(_ways(losses, data, method, device, batch_tokens, tokens), _SAME.get(dtype, 5e-4)),
    ]


def check(findings: dict[str, list[Finding]]) -> None:
    """Raises ProbeError that names what failed."""
    failed = [f"{method}: {f.name}: {f.detail}" for method, found in findings.items() for f in found if not f.passed]
    if failed:
        raise ProbeError("do not believe this score: " + "; ".join(failed))


def _small(method: Method) -> Method:
    """The same with short segments and chunks, so that a few thousand tokens have seams of every kind."""
    if not method.is_streaming:
        return method
    overlap = max(method.streaming.overlap, 1)
    segment, chunk = (overlap + 1) * method.seq_len, max(method.seq_len // 2, 1)
    streaming = StreamingConfig(
        segment_tokens=segment, overlap=overlap, chunk_tokens=chunk, limits=method.streaming.limits
    )
    return Method(name=method.name, seq_len=method.seq_len, stride=1, streaming=streaming)


def _alternatives(
    losses: Losses, method: Method, device: torch.device, vocab_size: int, context: NDArray[np.uint16]
) -> NDArray[np.float64]:
    """What each token costs after `context`: as many rows, each with another last target."""
    ids = torch.from_numpy(context.astype(np.int64)).to(device)
    found = []
    with torch.no_grad():
        for first in range(0, vocab_size, _ROWS):
            last = torch.arange(first, first + _ROWS, device=device).clamp(max=vocab_size - 1)
            inputs = ids.expand(_ROWS, -1).contiguous()
            targets = torch.cat([inputs[:, 1:], last[:, None]], dim=1)
            if method.is_streaming:
                nats = losses.stream(method)(inputs, targets)
            else:
                nats = losses.windows(inputs, targets, rope_len=method.seq_len, last=None)
            found.append(nats[:, -1].double().cpu().numpy())
    return np.concatenate(found)[:vocab_size]


def _whole(
    losses: Losses,
    data: DataFolder,
    method: Method,
    device: torch.device,
    batch_tokens: int,
    tokens: NDArray[np.uint16],
    rank: int = 0,
    world_size: int = 1,
) -> Score:
    """The score, or the part of it that one of several processes makes."""
    return score(
        losses.of(method), tokens, data.tokenizer.byte_tables(), method, device=device, batch_tokens=batch_tokens,
        expected_bytes=None, rank=rank, world_size=world_size, progress=False,
    )  # fmt: skip


def _times(
    losses: Losses, method: Method, device: torch.device, batch_tokens: int, tokens: NDArray[np.uint16]
) -> NDArray[np.int64]:
    """How often each target is scored."""
    times = np.zeros(len(tokens) - 1, np.int64)
    plan = method.plan(len(tokens) - 1)
    with torch.no_grad():
        for part in parts(
            losses.of(method), tokens, plan, method, batch_tokens=batch_tokens, world_size=1, device=device
        ):
            counts = part.scored.cpu().numpy()
            np.add.at(times, (part.first[:, None] + np.arange(counts.shape[1]))[counts], 1)
    return times


def _ways(
    losses: Losses,
    data: DataFolder,
    method: Method,
    device: torch.device,
    batch_tokens: int,
    tokens: NDArray[np.uint16],
) -> dict[str, float]:
    """Bits per byte with several sizes of batches, and as the sum of what several processes find."""
    found = {}
    for size in (batch_tokens, method.seq_len, 2 * method.seq_len + 1):
        found[f"batches of {size}"] = _whole(losses, data, method, device, size, tokens).val_bpb
    for processes in (2, 3):
        shares = [
            _whole(losses, data, method, device, batch_tokens, tokens, rank, processes) for rank in range(processes)
        ]
        found[f"{processes} processes"] = sum(shares[1:], shares[0]).val_bpb
    return found
