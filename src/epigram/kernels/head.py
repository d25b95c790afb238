"""From final states to losses: the tied product, the soft cap, cross-entropy, and its entropy weight.

Legend: B sequences, T positions, D model width, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from epigram.loss import softcap, token_nll, training_loss


def head_loss(x: Tensor, embed: Tensor, targets: Tensor, cap: float, gamma: Tensor | None, floor: float) -> Tensor:
    """The training loss over final states x (B, T, D) and targets (B, T); embed (V, D) in the precision of x.

    See `epigram.loss.training_loss` for gamma and floor.
    """
    return training_loss(softcap(F.linear(x, embed).float(), cap), targets, gamma, floor)


def head_nll(x: Tensor, embed: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Nats of each target, (B, T) float32."""
    return token_nll(softcap(F.linear(x, embed).float(), cap), targets)
