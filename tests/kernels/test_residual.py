"""The norm of a weighted sum of streams against its twin."""

import pytest
import torch
from parity import Place, compare

from epigram.kernels.residual import mix_norm as plain


@pytest.mark.parametrize(
    "with_coefficient",
    [(False,), (True,), (True, False), (False, True), (True, True, True), (True, False, True)],
    ids=lambda flags: "+".join("cx" if flag else "x" for flag in flags),
)
def test_mix_norm(place: Place, with_coefficient: tuple[bool, ...]):
    """One to three streams, some without coefficient; neither rows nor width are multiples of a tile."""
    from epigram.kernels._triton.residual import mix_norm as fused

    shape = (8, 1000, 512) if place.is_large else (2, 35, 24)
    tensors = {}
    for index, flag in enumerate(with_coefficient):
        tensors[f"x{index}"] = place.normal(*shape, seed=index)
        if flag:
            tensors[f"c{index}"] = place.normal(shape[-1], seed=10 + index, dtype=torch.float32)

    def of(function):
        def call(**named):
            streams = tuple(named[f"x{i}"] for i in range(len(with_coefficient)))
            return function(streams, tuple(named.get(f"c{i}") for i in range(len(with_coefficient))))

        return call

    compare(of(fused), of(plain), of(plain), tensors, place.dtype)
