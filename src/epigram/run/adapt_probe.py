"""Puts the experiments of `epigram.evaluation.adapt_probes` to a model that learns from the beginning of a split."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from epigram.data.dataset import DataFolder
from epigram.errors import UserError
from epigram.evaluation.adapt_probes import change_each, documents_apart, learns, score_first
from epigram.evaluation.documents import find_documents
from epigram.evaluation.probes import Finding, own_token
from epigram.evaluation.scorer import token_nlls
from epigram.evaluation.windows import Method
from epigram.run.adapt import Adaptation
from epigram.run.probe import told_apart

_CHUNKS = 4  # that the text has
_LEAST = 64  # tokens: a document of a fifth of them still has several chunks
_SHARES = (0.0, 0.4, 0.6, 0.75, 0.9)  # of the text, where documents begin: in batches of two, three batches


def probe_adapted(
    adaptation: Adaptation, data: DataFolder, method: Method, *, batch_tokens: int, split: str = "val"
) -> list[Finding]:
    """What each experiment finds. method: gives seq_len, and the stride of sgd."""
    tokenizer = data.tokenizer
    return probe_tokens(adaptation, data.stream(split), method, tokenizer.vocab_size, batch_tokens=batch_tokens)


def probe_tokens(
    adaptation: Adaptation, text: NDArray[np.uint16], method: Method, vocab_size: int, *, batch_tokens: int
) -> list[Finding]:
    """The same on the beginning of `text`; every process for itself."""
    if len(text) < _LEAST:
        raise UserError(f"the text has {len(text)} tokens: to probe a score that learns it takes at least {_LEAST}")
    kind, bos = adaptation.config.kind, adaptation.bos_id
    small, chunk = _small(adaptation, method, len(text))
    tokens = text[: _CHUNKS * max(chunk, method.seq_len) + chunk // 3 + 1].copy()
    if kind == "lora":
        tokens[tokens == bos] = (bos + 1) % vocab_size
        tokens[[int(share * len(tokens)) for share in _SHARES]] = bos
    weights = [p.detach().clone() for p in adaptation.model.parameters()]

    def nats(some: NDArray[np.uint16]) -> NDArray[np.float32]:
        return small.nats(some, method, batch_tokens)

    def misread(some: NDArray[np.uint16], absent: int, true: int) -> NDArray[np.float32]:
        """What is read is also what is learned, so a token that is learned before its own score shows in it."""
        told = partial(told_apart, absent=absent, true=true)
        return replace(small, scoring=told).nats(some, method, batch_tokens)

    effects = change_each(nats, tokens, _places(tokens, kind, chunk, bos), vocab_size, bos)
    if kind == "sgd":
        plain = token_nlls(small.losses.windows, tokens, method, device=small.context.device, batch_tokens=batch_tokens)
    else:
        still = replace(small.config, lora=replace(small.config.lora, lr=0.0))
        plain = replace(small, config=still).nats(tokens, method, batch_tokens)
    places = [change.place for change in effects.changes]
    found = [
        score_first(effects),
        own_token(nats, misread, tokens, places, vocab_size, effects.allowed),
        learns(effects, plain),
    ]
    if kind == "lora":
        found.append(documents_apart(effects, find_documents(tokens, bos)))
    kept = all(torch.equal(p, old) for p, old in zip(adaptation.model.parameters(), weights, strict=True))
    words = "the weights are as they were" if kept else "the weights are others than before"
    return [*found, Finding("weights restored", kept, words)]


def _small(adaptation: Adaptation, method: Method, num_tokens: int) -> tuple[Adaptation, int]:
    """The same with short chunks and few documents side by side, and the tokens of a chunk: several for the second of
    the documents that the text is cut into, however short it is."""
    config = adaptation.config
    if config.kind == "sgd":
        chunk = min(config.sgd.chunk_tokens, 2 * method.seq_len)
        config = replace(config, sgd=replace(config.sgd, chunk_tokens=chunk))
    else:
        chunk = min(config.lora.chunk_tokens, num_tokens // 8)
        config = replace(config, lora=replace(config.lora, num_documents=2, chunk_tokens=chunk))
    return replace(adaptation, config=config), chunk


def _places(tokens: NDArray[np.uint16], kind: str, chunk: int, bos: int) -> list[int]:
    """Tokens to change: on both sides of the seams between chunks, in their midst, and the last one."""
    last = len(tokens) - 1
    if kind == "sgd":
        found = {2, chunk, chunk + 1, 2 * chunk + chunk // 2, 3 * chunk, 3 * chunk + 1, last}
    else:
        starts = find_documents(tokens, bos)[:, 0]
        found = {int(start) + 1 for start in starts[1:]} | {int(starts[0]) + place for place in (2, chunk, chunk + 1)}
        found |= {int(starts[1]) + chunk + chunk // 2, last}
    return sorted(place for place in found if 1 <= place <= last)
