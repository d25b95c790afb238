"""What an update needs at least, against counts of what runs and of tensors by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from epigram.optim.cost import adamw_bytes, average_bytes, clip_bytes, muon_bytes, muon_flops
from epigram.optim.gradients import LaneGradients
from epigram.optim.orthogonalize import coefficients, orthogonalize
from epigram.roles import ParameterRole


def test_square_matrices_need_two_thirds_of_what_runs() -> None:
    """Of three equal products two are symmetric, of which half would do."""
    roles = {"bank": ParameterRole(kind="matrix", num_layers=3, bank="out", splits=(("out", 16),))}
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(3, 16, 16), coefficients("quintic", 5), torch.float32)
    needed = muon_flops(roles, {"bank": (3, 16, 16)}, 5)
    assert needed == pytest.approx(counter.get_total_flops() * 2 / 3)


def test_matrices_of_all_shapes_are_counted() -> None:
    """By hand: two layers of a (8, 4) and a (4, 4), and two of a (4, 12); one iteration."""
    roles = {
        "qk": ParameterRole(kind="matrix", num_layers=2, bank="qk", splits=(("q", 8), ("k", 4))),
        "down": ParameterRole(kind="matrix", num_layers=2, bank="down", splits=(("down", 4),)),
    }
    found = muon_flops(roles, {"qk": (2, 12, 4), "down": (2, 4, 12)}, 1)

    def by_hand(short: int, long: int) -> int:
        return short * short * long + short**3 + 2 * short * short * long

    assert found == 2 * (by_hand(4, 8) + by_hand(4, 4) + by_hand(4, 12))


def test_traffic_of_the_rules() -> None:
    """Bytes of 10 weights: gradient in, weight in and out, and the moments in and out."""
    assert muon_bytes(10, momentum_bytes=2) == 10 * (4 + 8 + 4)
    assert adamw_bytes(10) == 10 * (4 + 8 + 8 + 8)
    assert average_bytes(10) == 10 * (4 + 8)


class Traffic(TorchDispatchMode):
    """Bytes of tensors of `least` elements or more that operations read and write, each once an operation."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.bytes = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self.bytes += self._of(value)
            self.bytes += self._of(value) if argument.is_write else 0
        self.bytes += sum(self._of(value) for value in tree_leaves(found))
        return found

    def _of(self, value: object) -> int:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        return sum(tensor.nbytes for tensor in tensors if tensor.numel() >= self.least)


@pytest.mark.parametrize(
    ("clip", "lanes", "needed", "moved"),
    [
        ("lane", 1, 1, 1),  # read for the norm: the optimizer scales
        ("lane", 3, 3 + 2 * 3, 3 + 2 * 3 + 3 * 2),  # each but the first is added; a pass of its own scales each
        ("global", 1, 1, 2),  # one lane is the average, whose norm is computed again
        ("global", 3, 3 + 2 * 3 + 1, 3 + 2 * 3 + 1 + 2),  # the norm of the sum too; a pass weights the first
        ("none", 1, 1, 2),
        ("none", 2, 2 + 3 + 1, 2 + 3 + 1 + 2),
    ],
)
def test_traffic_of_clipping(clip: str, lanes: int, needed: int, moved: int) -> None:
    """In tensors: what is counted as needed, and what really moves, which is never less."""
    named = {name: nn.Parameter(torch.zeros(size)) for name, size in (("a", 100), ("b", 60))}
    gradients = LaneGradients(named, clip=clip, max_norm=0.3, lane_weights=[1 / lanes] * lanes)
    left = [[torch.ones_like(parameter) for parameter in named.values()] for _ in range(lanes)]
    with Traffic(least=60) as traffic:
        for lane in range(lanes):
            for parameter, gradient in zip(named.values(), left[lane], strict=True):
                parameter.grad = gradient
            gradients.add(lane)
        gradients.finish()
    assert clip_bytes(160, lanes, clip) == 160 * 4 * needed
    assert traffic.bytes == 160 * 4 * moved >= 160 * 4 * needed
