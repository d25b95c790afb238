"""What an update needs at least, against counts of what runs and of tensors by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from epigram.optim.cost import adamw_bytes, average_bytes, clip_bytes, muon_bytes, muon_flops
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


@pytest.mark.parametrize(
    ("clip", "lanes", "tensors"),
    [
        ("lane", 1, 1 + 2),  # read for the norm, scaled in place
        ("lane", 3, (1 + 2) + 2 * (1 + 3)),  # and for each further lane: read, then read with the sum, which is written
        ("global", 1, 1 + 2),
        ("global", 3, 2 + 2 * 3 + 1 + 2),  # weighted, two added, the norm of the sum, scaled
        ("none", 1, 1),  # the norm is reported all the same
        ("none", 2, 2 + 3 + 1),
    ],
)
def test_traffic_of_clipping(clip: str, lanes: int, tensors: int) -> None:
    assert clip_bytes(10, lanes, clip) == 10 * 4 * tensors
