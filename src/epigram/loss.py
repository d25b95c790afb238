"""Losses over the vocabulary: soft-capped logits, cross-entropy, and the entropy weighting of training.

Shapes: B sequences, T positions, V vocabulary, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), or the logits themselves when `cap` is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, float32: (B, T, V) and (B, T) -> (B, T)."""
    nll = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return nll.view(targets.shape)


def mile_weight(logits: Tensor, gamma: Tensor | float, floor: float) -> Tensor:
    """Weight of each position by the entropy H of the model's own prediction: max((1 - exp(-H)) ** gamma, floor).

    Confident positions count less. (B, T, V) float32 -> (B, T), without gradient. Source: MiLe, parameter-golf #1130.
    """
    with torch.no_grad():
        probabilities = torch.softmax(logits, dim=-1)
        entropy = -(probabilities * torch.log(probabilities + 1e-8)).sum(-1)
        # An entropy a rounding below zero would make the power a NaN.
        certainty = (1.0 - torch.exp(-entropy)).clamp_min(0.0)
        return torch.pow(certainty, gamma).clamp_min(floor)


def training_loss(logits: Tensor, targets: Tensor, gamma: Tensor | None = None, floor: float = 0.0) -> Tensor:
    """Mean over all tokens of weight * nll; weight is 1 without `gamma`.

    The mean divides by the number of tokens, not by the sum of the weights (parameter-golf #1130).
    """
    logits = logits.float()
    nll = token_nll(logits, targets)
    return nll.mean() if gamma is None else (mile_weight(logits, gamma, floor) * nll).mean()
