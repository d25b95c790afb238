"""The conditions on a score that an artifact of ours can be probed for (the four of parameter-golf #1017).

Prefix and normalisation are tested on the loss that scoring uses, with the weights in the file, and so is the isolation
of documents where the file promises it; that every token is scored once is tested on the whole scorer. That no update
sees an unscored token holds where nothing is updated; where the log's score is of a model that adapts, the experiments
of `epigram score --adapt KIND --probe` test it.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.evaluation.adapt_config import AdaptConfig, LoraConfig, SgdConfig
from epigram.evaluation.probes import isolation, own_token
from epigram.evaluation.scorer import MiscountError
from epigram.evaluation.windows import Method
from epigram.run.adapt import Adaptation
from epigram.run.adapt_probe import probe_tokens
from epigram.run.api import Model
from epigram.run.probe import Subject
from epigram.run.setup import scoring_losses
from epigram.run.submission.findings import Finding
from epigram.run.weights import load_model

_LENGTH = 48  # tokens of a probe
_ADAPT = AdaptConfig(
    sgd=SgdConfig(chunk_tokens=32, epochs=1, num_rows=2), lora=LoraConfig(rank=4, alpha=4.0, chunk_tokens=8)
)
_TOLERANCE = 1e-4  # nats: other shapes sum in another order
_SUM_TOLERANCE = 1e-3


def probe(path: Path, kind: str | None = None) -> Iterator[Finding]:
    """Findings about the artifact at `path`; nothing in it is executed. kind: of adaptation, if it was scored so."""
    try:
        model = load_model(path, "cpu")
    except UserError as error:
        yield Finding(rule="size.artifact", message=f"{path.name} cannot be read: {error}")
        return
    try:
        yield from _probe(path.name, model)
    except UserError as error:  # no number comes out
        yield Finding(rule="condition.normalised", message=f"{path.name}: {error}")
        return
    if kind is not None:
        yield from _probe_adapted(path.name, model, kind)


def _probe(name: str, model: Model) -> Iterator[Finding]:
    """What does not depend on how the model may learn."""
    length, context = model.context_len, Context()
    subject = Subject(
        losses=scoring_losses(model.gpt, False, "auto", context),
        tables=model.tokenizer.byte_tables(),
        method=Method(name="blocks", seq_len=length, stride=length),
        device=context.device,
        batch_tokens=length,
    )
    vocab_size = model.gpt.config.vocab_size
    tokens = np.random.default_rng(0).integers(vocab_size, size=_LENGTH + 1).astype(np.uint16)
    if (moved := _prefix_change(subject, tokens, vocab_size)) > _TOLERANCE:
        message = f"{name}: a later token changes an earlier score by {moved:.2g} nats"
        yield Finding(rule="condition.prefix", message=message)
    places = (1, _LENGTH // 2, _LENGTH - 1)
    if not (found := own_token(subject.nats, subject.misread, tokens, places, vocab_size, _TOLERANCE)).passed:
        yield Finding(rule="condition.prefix", message=f"{name}: {found.detail}")
    if abs((total := float(np.exp(-subject.alternatives(tokens[:8])).sum())) - 1) > _SUM_TOLERANCE:
        yield Finding(rule="condition.normalised", message=f"{name}: probabilities sum to {total:.5f}")
    if wrong := _counted(replace(subject, method=_sliding(model), batch_tokens=64), tokens):
        yield Finding(rule="condition.once", message=f"{name}: {wrong}")
    if model.gpt.config.isolated:
        bos = model.gpt.config.bos_id
        tokens[:: _LENGTH // 3] = bos
        if not (found := isolation(subject.nats, tokens, bos, vocab_size, _LENGTH)).passed:
            yield Finding(rule="condition.isolated", message=f"{name}: {found.detail}")


def _probe_adapted(name: str, model: Model, kind: str) -> Iterator[Finding]:
    vocab_size, context = model.gpt.config.vocab_size, Context()
    text = np.random.default_rng(0).integers(vocab_size, size=200).astype(np.uint16)
    try:
        adaptation = Adaptation(
            config=replace(_ADAPT, kind=kind), model=model.gpt, context=context, bos_id=model.tokenizer.bos_id,
            losses=scoring_losses(model.gpt, False, "auto", context),
        )  # fmt: skip
        results = probe_tokens(adaptation, text, _sliding(model), vocab_size, batch_tokens=64)
    except UserError as error:
        yield Finding(rule="condition.released", message=f"{name}, adapted by {kind}: {error}")
        return
    for found in results:
        if not found.passed:
            message = f"{name}, adapted by {kind}: {found.name}: {found.detail}"
            yield Finding(rule="condition.released", message=message)


def _sliding(model: Model) -> Method:
    return Method(name="sliding", seq_len=min(16, model.context_len), stride=5)


def _prefix_change(subject: Subject, tokens: NDArray[np.uint16], vocab_size: int) -> float:
    """The most that scores before a place change when the tokens from there on do."""
    base, worst = subject.nats(tokens), 0.0
    for place in (_LENGTH // 2, _LENGTH):
        changed = tokens.copy()
        changed[place:] = (changed[place:].astype(np.int64) + 1) % vocab_size
        worst = max(worst, float(np.abs(subject.nats(changed) - base)[: place - 1].max()))
    return worst


def _counted(subject: Subject, tokens: NDArray[np.uint16]) -> str:
    """What is wrong with the number of scores, or their sum, of a text that fills no window; empty if nothing is."""
    try:
        found, each = subject.score(tokens), subject.nats(tokens)
    except MiscountError as error:
        return str(error)
    if found.tokens != len(tokens) - 1 or len(each) != len(tokens) - 1:
        return f"{found.tokens} scores for {len(tokens) - 1} tokens"
    mean = float(each.astype(np.float64).mean())
    return "" if abs(mean - found.val_nats) < _TOLERANCE else f"the mean of all scores is {mean}, not {found.val_nats}"
