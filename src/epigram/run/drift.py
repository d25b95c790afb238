"""Replicas that should be equal to the last bit are compared: a hash of every parameter, across all processes."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from epigram.dist import collectives
from epigram.dist.context import Context
from epigram.errors import UserError

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size of an element
_SPREAD = 2 * 0x1E3779B97F4A7C15  # even, so that one more is odd: no element's change is multiplied away
_CHUNK = 1 << 22  # elements hashed at a time: their positions take eight bytes each


class DriftError(UserError):
    """Weights that all processes should have in common differ."""


def check_replicas(context: Context, named: Mapping[str, Tensor], step: int) -> None:
    """Compare the tensors `named` of all processes bit by bit; waits for the device. All processes call it.

    Raises DriftError in every process, which names what differs where.
    """
    if not context.has_peers:
        return
    own = torch.stack([bit_hash(tensor) for tensor in named.values()]).cpu()
    of_ranks = collectives.gathered(context, own).tolist()
    problems = [
        f"{name} on rank {', '.join(map(str, ranks))}"
        for name, hashes in zip(named, zip(*of_ranks, strict=True), strict=True)
        if (ranks := _outliers(hashes))
    ]
    if problems:
        raise DriftError(
            f"after step {step} the processes' weights are no longer equal ({'; '.join(problems)}): one of the devices "
            "or links computes wrongly; go on from the last checkpoint without it"
        )


@torch.no_grad()
def bit_hash(tensor: Tensor) -> Tensor:
    """A hash of the tensor's bits and their places, 0-dim int64 on its device, the same on every kind of device.

    Each element, as an integer of its bits, counts times an odd number made of its place, modulo 2**64: a change of a
    single element always changes the sum.
    """
    words = tensor.detach().contiguous().reshape(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].long()
        places = torch.arange(start, start + len(chunk), device=tensor.device)
        total += (chunk * (places * _SPREAD + 1)).sum()
    return total


def _outliers(hashes: tuple[int, ...]) -> list[int]:
    """Ranks that differ from what most have, or from the first of those that are as many."""
    ((common, count), *_) = Counter(hashes).most_common(1)
    return [] if count == len(hashes) else [rank for rank, value in enumerate(hashes) if value != common]
