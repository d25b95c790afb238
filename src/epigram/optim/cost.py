"""Operations and bytes that the parts of an update cannot do without, to judge measured times by.

Everything is counted as if each tensor were read and written once, in float32 where not said otherwise.
"""

from collections.abc import Mapping, Sequence

from epigram.optim.muon import batches
from epigram.roles import ParameterRole

_FLOAT32 = 4


def muon_flops(roles: Mapping[str, ParameterRole], shapes: Mapping[str, Sequence[int]], num_iterations: int) -> float:
    """Operations of the Newton-Schulz iterations over the banks, a multiply-add counted as two.

    An iteration on a (short, long) matrix has three products: X Xᵀ and its square, which are symmetric, so that half
    of each is enough, and the update of X.
    """
    total = 0.0
    for batch in batches(roles, shapes):
        symmetric = batch.short**2 * batch.long + batch.short**3
        total += batch.num_matrices * (symmetric + 2.0 * batch.short**2 * batch.long)
    return num_iterations * total


def muon_bytes(num_weights: int, momentum_bytes: int) -> float:
    """Traffic besides the products: the gradient in, momentum (of `momentum_bytes` each) and weight in and out."""
    return float(num_weights * (_FLOAT32 + 2 * momentum_bytes + 2 * _FLOAT32))


def adamw_bytes(num_weights: int) -> float:
    """The gradient in, weight and two moments in and out."""
    return float(num_weights * 7 * _FLOAT32)


def average_bytes(num_weights: int) -> float:
    """The weight in, the average in and out."""
    return float(num_weights * 3 * _FLOAT32)


def clip_bytes(num_weights: int, num_lanes: int, clip: str) -> float:
    """Norms, clipping and averaging of the gradients of `num_lanes` lanes; `clip` as in `GradientConfig`.

    Every lane's norm is told, and so is that of the average, which is another where several lanes are averaged and not
    clipped one by one. Lanes are multiplied while they are added, and the average by what updates the weights.
    """
    norm, add = 1, 3  # tensors moved: g in; g and the sum in, the sum out
    norms = num_lanes + (1 if clip != "lane" and num_lanes > 1 else 0)
    return float(num_weights * _FLOAT32 * (norm * norms + add * (num_lanes - 1)))
