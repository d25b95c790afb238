"""From final states to losses: the tied product, the soft cap, cross-entropy, and its entropy weight.

Legend: B sequences, T positions, D model width, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from epigram.kernels.lora import LowRank
from epigram.loss import softcap, token_nll, training_loss


def tied_logits(x: Tensor, embed: Tensor, cap: float, lora: LowRank | None = None) -> Tensor:
    """Soft-capped logits, float32: (..., D) -> (..., V); embed (V, D) in the precision of x. lora: of (B, T, D)."""
    logits = F.linear(x, embed)
    return softcap((logits if lora is None else logits + lora(x)).float(), cap)


def head_loss(x: Tensor, embed: Tensor, targets: Tensor, cap: float, gamma: Tensor | None, floor: float) -> Tensor:
    """The training loss over final states x (B, T, D) and targets (B, T); embed (V, D) in the precision of x.

    See `epigram.loss.training_loss` for gamma and floor.
    """
    return training_loss(tied_logits(x, embed, cap), targets, gamma, floor)


def head_nll(x: Tensor, embed: Tensor, targets: Tensor, cap: float, lora: LowRank | None = None) -> Tensor:
    """Nats of each target, (B, T) float32. lora: what each row adds to the logits; only here, not in the fused twin."""
    return token_nll(tied_logits(x, embed, cap, lora), targets)
