"""What this machine reaches at best, measured: a large copy, and a large matrix product."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from epigram.dist.context import Context
from epigram.run.bench._timing import measure

_REPEATS = 10
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # far beyond the last cache
_PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}


class Work(NamedTuple):
    """What a computation cannot do without: operations (a multiply-add is two) and bytes of memory traffic."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """copy_bytes_per_s: bytes read plus bytes written. product_flops_per_s: in the precision `dtype`."""

    copy_bytes_per_s: float
    product_flops_per_s: float
    dtype: str

    def floor_ms(self, parts: Iterable[Work]) -> float:
        """The least time for `parts` one after the other, operations and traffic of each overlapping perfectly."""
        seconds = (max(p.flops / self.product_flops_per_s, p.bytes / self.copy_bytes_per_s) for p in parts)
        return 1000 * sum(seconds)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_ceilings(context: Context, dtype: torch.dtype) -> Ceilings:
    """Medians of a copy of 1 GiB and a product of 8192 x 8192 matrices on a GPU, 128 MiB and 1024 on a CPU."""
    return Ceilings(
        copy_bytes_per_s=_copy_rate(context),
        product_flops_per_s=_product_rate(context, dtype),
        dtype=str(dtype).removeprefix("torch."),
    )


def _copy_rate(context: Context) -> float:
    source = torch.ones(_COPY_BYTES[_kind(context)] // 4, device=context.device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), context, repeats=_REPEATS)
    return 2 * source.numel() * source.itemsize / (timing.median_ms / 1000)


def _product_rate(context: Context, dtype: torch.dtype) -> float:
    """Of random matrices: products of zeros draw less power and run faster than any real one."""
    size = _PRODUCT_SIZE[_kind(context)]
    left, right = (torch.randn(size, size, device=context.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    timing = measure(lambda: torch.mm(left, right, out=out), context, repeats=_REPEATS)
    return 2 * size**3 / (timing.median_ms / 1000)


def _kind(context: Context) -> str:
    return "cuda" if context.device.type == "cuda" else "cpu"
