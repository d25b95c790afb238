"""The conditions on a score that an artifact of ours can be probed for (the four of parameter-golf #1017).

Prefix and normalisation are tested on the loss that scoring uses, with the weights in the file; that every token is
scored once is tested on the whole scorer. That no update sees an unscored token holds where nothing is updated: the
released scorer has no optimizer.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.evaluation.passes import TokenLoss
from epigram.evaluation.scorer import score, token_nlls
from epigram.evaluation.windows import Method
from epigram.model.gpt import GPT
from epigram.run.api import Model
from epigram.run.setup import scoring_losses
from epigram.run.submission.findings import Finding
from epigram.run.weights import load_model

_LENGTH = 48  # tokens of a probe
_TOLERANCE = 1e-4  # nats: other shapes sum in another order
_SUM_TOLERANCE = 1e-3


def probe(path: Path) -> Iterator[Finding]:
    """Findings about the artifact at `path`; nothing in it is executed."""
    try:
        model = load_model(path, "cpu")
    except UserError as error:
        yield Finding(rule="size.artifact", message=f"{path.name} cannot be read: {error}")
        return
    vocab_size = model.gpt.config.vocab_size
    tokens = torch.from_numpy(np.random.default_rng(0).integers(vocab_size, size=_LENGTH + 1))
    with torch.no_grad():
        if (moved := _prefix_change(model, tokens)) > _TOLERANCE:
            message = f"{path.name}: a later token changes an earlier score by {moved:.2g} nats"
            yield Finding(rule="condition.prefix", message=message)
        if abs((total := _total_probability(model, tokens[:8])) - 1) > _SUM_TOLERANCE:
            yield Finding(rule="condition.normalised", message=f"{path.name}: probabilities sum to {total:.5f}")
        if wrong := _counted(model, tokens.numpy().astype(np.uint16)):
            yield Finding(rule="condition.once", message=f"{path.name}: {wrong}")


def windows_loss(model: GPT) -> TokenLoss:
    """The loss that windows are scored by."""
    return scoring_losses(model, False, "auto", Context()).windows


def _nll(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T + 1) int64 -> nats of its T targets, (B, T)."""
    return windows_loss(model.gpt)(tokens[:, :-1], tokens[:, 1:], rope_len=model.context_len, last=None)


def _prefix_change(model: Model, tokens: torch.Tensor) -> float:
    """The most that scores before a place change when the tokens from there on do."""
    base, worst = _nll(model, tokens[None])[0], 0.0
    for place in (1, _LENGTH // 2, _LENGTH):
        changed = tokens.clone()
        changed[place:] = (changed[place:] + 1) % model.gpt.config.vocab_size
        worst = max(worst, float((_nll(model, changed[None])[0] - base)[: place - 1].abs().max()) if place > 1 else 0.0)
    return worst


def _total_probability(model: Model, prefix: torch.Tensor) -> float:
    """Sum over every token of the vocabulary of its probability after `prefix`, each scored as the target."""
    ids = torch.arange(model.gpt.config.vocab_size)
    total = 0.0
    for chunk in ids.split(256):
        rows = torch.cat([prefix.expand(len(chunk), -1), chunk[:, None]], dim=1)
        total += float(_nll(model, rows)[:, -1].double().neg().exp().sum())
    return total


def _counted(model: Model, tokens: np.ndarray) -> str:
    """What is wrong with the number of scores, or their sum, of a text that fills no window; empty if nothing is."""
    method = Method(name="sliding", seq_len=min(16, model.context_len), stride=5)
    nll, device = windows_loss(model.gpt), torch.device("cpu")
    tables = model.tokenizer.byte_tables()
    found = score(nll, tokens, tables, method, device=device, batch_tokens=64, expected_bytes=None)
    each = token_nlls(nll, tokens, method, device=device, batch_tokens=64)
    if found.tokens != len(tokens) - 1 or len(each) != len(tokens) - 1:
        return f"{found.tokens} scores for {len(tokens) - 1} tokens"
    mean = float(each.astype(np.float64).mean())
    return "" if abs(mean - found.val_nats) < _TOLERANCE else f"the mean of all scores is {mean}, not {found.val_nats}"
