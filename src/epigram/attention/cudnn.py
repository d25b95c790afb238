"""Full attention through cuDNN's fused kernels, by way of torch.

torch itself takes cuDNN for `scaled_dot_product_attention` only where its authors found it to be the faster kernel;
this backend asks for it everywhere else too, so that a run can measure it against `sdpa`, which leaves the choice to
torch. It is a file of its own, not a switch in sdpa: what is used is then a name in the log, and nothing in a compiled
graph asks for the device.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from epigram.attention import sdpa
from epigram.attention.base import Request, why_not_heads

_MOST_HEAD_DIM = 128
# Earlier ones gave wrong gradients for lengths that are no multiple of 128; torch draws the same line.
_OLDEST = 91501


def check(request: Request) -> str | None:
    """CUDA from compute capability 8.0 on, half precision, no window, head sizes that are multiples of 8 up to 128."""
    if request.device_type != "cuda" or request.capability is None:
        return "cudnn is for CUDA devices"
    if request.capability < (8, 0):
        major, minor = request.capability
        return f"cudnn needs compute capability 8.0, this device has {major}.{minor}"
    if request.window:
        return "cudnn has no windows through torch"
    if request.longer_keys:
        return "cudnn's causal mask counts queries from the first key, so none can lie before them"
    if reason := why_not_heads("cudnn", request, _MOST_HEAD_DIM):
        return reason
    version = torch.backends.cudnn.version()
    if version is None or version < _OLDEST:
        return f"cudnn is used from 9.15.1 (91501) on, this torch has {version or 'none'}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """See `epigram.attention.base`. What only generation has goes the way of sdpa: queries that follow cached keys, and
    texts longer than the cache, whose length is then every layer's window."""
    if q.shape[1] != k.shape[1] or q.shape[1] == 1 or 0 < window < k.shape[1]:
        return sdpa.attend(q, k, v, window)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa.unmasked(q, k, v, causal=True)
