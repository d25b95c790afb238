"""Sampling: the next token from the logits, and sequences through a key-value cache.

Legend: B sequences, T positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epigram.errors import UserError
from epigram.model.cache import Cache
from epigram.model.gpt import GPT


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature: 0 takes the most likely token. top_k: only so many most likely tokens, 0 for all. top_p: the fewest
    tokens whose probabilities reach it. seed: of the random choices.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature = {self.temperature} must be 0 (most likely token) or a positive number")
        if self.top_k < 0:
            problems.append(f"top_k = {self.top_k} must be 0 (all tokens) or positive")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p = {self.top_p} must be above 0 and at most 1")
        if not abs(self.seed) < 2**63:
            problems.append(f"seed = {self.seed} must be below 2^63")
        if problems:
            raise ValueError("; ".join(problems))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is drawn from, float32: (B, V) -> (B, V). Raises UserError where logits are not finite."""
    logits = logits.double()  # in which no temperature and no top_p above 0 becomes 0
    top = logits.amax(-1, keepdim=True)
    if not top.isfinite().all():  # banned tokens are at -inf
        raise UserError("the model predicts no numbers: its weights are damaged, or its training diverged")
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    scaled = torch.softmax((logits - top) / sampling.temperature, dim=-1)
    if not sampling.top_k and sampling.top_p == 1:  # sorting takes longer than all else, and rounded sums reach 1 early
        return scaled.float()
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    keep = ordered.cumsum(-1) - ordered < sampling.top_p  # the first one always stays
    if sampling.top_k:
        keep[..., sampling.top_k :] = False
    kept = torch.zeros_like(scaled).scatter(-1, order, ordered * keep)
    return (kept / kept.sum(-1, keepdim=True)).float()


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token for each sequence: (B, V) -> (B, 1) int64. Drawn on the CPU, so a seed means the same everywhere."""
    choices = probabilities(logits.cpu(), sampling)
    return torch.multinomial(choices, 1, generator=generator).to(logits.device)


@torch.no_grad()
def stream(
    model: GPT,
    prompt: Sequence[int],
    num_tokens: int,
    sampling: Sampling,
    *,
    context_len: int,
    banned: Sequence[int] = (),
) -> Iterator[int]:
    """Up to `num_tokens` tokens that continue `prompt` (at least one token), one at a time.

    context_len: how far back full-attention layers look; see `Cache`. banned: tokens that are never chosen.
    """
    assert len(prompt) > 0
    cache = Cache(model.config, context_len)
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = torch.tensor([list(prompt)], device=model.embed.device)
    for _ in range(num_tokens):
        logits = model.logits(model(tokens, cache=cache)[:, -1])
        logits[:, list(banned)] = float("-inf")
        tokens = draw(logits, sampling, generator)
        yield int(tokens)


@torch.no_grad()
def sample_batch(
    model: GPT, num_seqs: int, length: int, sampling: Sampling, *, banned: Sequence[int] = ()
) -> Iterator[Tensor]:
    """`num_seqs` sequences of `length` tokens that the model invents, given out token by token as (B, 1) int64.

    The first token is drawn uniformly. Source: self-generated calibration text, parameter-golf #1019.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    allowed = [token for token in range(model.config.vocab_size) if token not in set(banned)]
    first = torch.randint(len(allowed), (num_seqs, 1), generator=generator)
    tokens = torch.tensor(allowed)[first].to(model.embed.device)
    cache = Cache(model.config, length)
    yield tokens
    for _ in range(length - 1):
        logits = model.logits(model(tokens, cache=cache)[:, -1])
        logits[:, list(banned)] = float("-inf")
        tokens = draw(logits, sampling, generator)
        yield tokens
