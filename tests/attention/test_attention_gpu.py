"""Every backend on a CUDA device, compiled, forward and backward, against the oracle in float64."""

import pytest
import torch

from epigram import plugin
from epigram.attention import reference
from epigram.attention.base import PACKAGE, Request, usable

pytestmark = pytest.mark.gpu

# bfloat16 keeps 8 bits; sums over keys average the errors out.
BF16_RELATIVE = 1.5e-2


def inputs(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(length)
    return [torch.randn(2, length, heads, 64, device="cuda", dtype=dtype).requires_grad_() for heads in (8, 4, 4)]


@pytest.mark.parametrize("window", [0, 100, 512])
@pytest.mark.parametrize("length", [200, 1024, 2000])
@pytest.mark.parametrize("name", plugin.names(PACKAGE))
def test_backend_agrees_with_float64(name: str, length: int, window: int) -> None:
    request = Request(
        device_type="cuda",
        capability=torch.cuda.get_device_capability(),
        dtype=torch.bfloat16,
        head_dim=64,
        num_heads=8,
        num_kv_heads=4,
        window=window,
        compiled=True,
    )
    if reason := usable(request)[name]:
        pytest.skip(reason)
    ours = inputs(length, torch.bfloat16)
    theirs = [x.detach().double().requires_grad_() for x in ours]
    attend = torch.compile(plugin.load(PACKAGE, name).attend, dynamic=False)
    out, expected = attend(*ours, window), reference.attend(*theirs, window)
    weights = torch.randn_like(expected)
    (out.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    for found, exact in [(out, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]:
        assert float((found.double() - exact).norm() / exact.norm()) < BF16_RELATIVE
