"""Compares a fused operation with its plain twin, forward and backward, both measured against float64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
"""Relative norm that an error may always have: some roundings of a sum in another order; in half precision the twin's
own error is the larger part of the bound."""

SLACK = 1.5
"""Times the twin's own error: roundings at other places."""


_FEW, _SINGLE = 64, 8  # elements of a gradient, see `joined`


class Place(NamedTuple):
    """Where a test runs: sizes are tiny in the interpreter, and realistic on a device."""

    device: torch.device
    dtype: torch.dtype

    @property
    def is_large(self) -> bool:
        return self.device.type == "cuda"

    def normal(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, dtype or self.dtype)

    def tokens(self, vocab_size: int, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocab_size, shape, generator=generator).to(self.device)


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the error in norms of the exact value."""
    assert found.shape == exact.shape
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))


def assert_as_good(fused: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], floor: float) -> None:
    """No fused result is further from the exact one than its twin, up to SLACK and `floor`."""
    assert fused.keys() == plain.keys() == exact.keys()
    errors = {name: (relative(fused[name], exact[name]), relative(plain[name], exact[name])) for name in exact}
    wrong = {name: pair for name, pair in errors.items() if not pair[0] <= SLACK * pair[1] + floor}
    assert not wrong, f"relative error of fused and of plain: {wrong}"


def joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results by batch, but gradients of few numbers over all batches, and those of single ones as one vector.

    Each such number is a sum over all tokens of which little is left, sometimes a tenth of what other batches leave:
    the error of one sum is chance, and that of many is not.
    """
    joined: dict[str, Tensor] = {}
    single: list[Tensor] = []
    for name, first in results[0].items():
        found = [result[name] for result in results]
        if first.numel() >= _FEW or name in ("loss", "nats"):
            joined |= {f"{name} {index}": tensor for index, tensor in enumerate(found)}
        elif first.numel() >= _SINGLE:
            joined[name] = torch.stack(found)
        else:
            single += [tensor.reshape(-1) for tensor in found]
    return joined | {"numbers": torch.cat(single)} if single else joined


def results(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output of function(**tensors), and the gradient of each tensor for a made-up gradient of the output."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves)
    generator = torch.Generator().manual_seed(99)
    grad = torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype)  # exact in every precision
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"output": out.detach(), **{f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}}


def compare(
    fused: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Compare results on the same tensors; `exact` gets them in float64."""
    doubled = {name: tensor.double() for name, tensor in tensors.items()}
    assert_as_good(results(fused, tensors), results(plain, tensors), results(exact, doubled), FLOOR[dtype])
