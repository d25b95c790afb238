"""torch.compile as epigram uses it: for each shape once, and never uncompiled in silence."""

from typing import Any

import torch

_MOST_GRAPHS = 64  # of one function: lengths of lanes times phases


def compile_shapes(function: Any) -> Any:
    """`function`, compiled for each shape and phase that it is called with.

    torch stops to compile after eight of them and goes on in silence, several times slower; here it raises instead.
    Sums over rows and over columns stay in kernels of their own: where torch 2.10 to 2.13 joins them, gradients of
    slices of one parameter (scales and coefficients of layers) may never be written (torch issue 193061).
    """
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = _MOST_GRAPHS, True
    joins = hasattr(inductor.triton, "mix_order_reduction")
    return torch.compile(function, dynamic=False, options={"triton.mix_order_reduction": False} if joins else None)
