"""Who computes a fused operation: a Triton kernel, or its plain twin in torch.

An operation is `kernels/<op>.py` with the public function and the plain twin, and `kernels/_triton/<op>.py` with the
kernel. The second one needs Triton to be imported, so the first one does that only when it is asked to be fused.
"""

import torch

from epigram.capability import capability_of, triton_installed, why_no_triton
from epigram.errors import UserError

CHOICES = ("auto", "fused", "plain")


def use_fused(kernels: str, device: torch.device) -> bool:
    """Whether `kernels`, one of CHOICES, means the fused kernels on `device`.

    "auto" takes them on a CUDA device that has them. Raises UserError when "fused" is asked for in vain. In Triton's
    interpreter (TRITON_INTERPRET=1) "fused" works on a CPU too, far too slowly for anything but tests.
    """
    assert kernels in CHOICES, kernels
    problem = why_not(device)
    if kernels == "fused" and problem and not (device.type == "cpu" and _interpreting()):
        raise UserError(f'kernels = "fused" cannot be used here: {problem}; set it to "auto" or "plain"')
    return kernels == "fused" or (kernels == "auto" and problem is None)


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, in a sentence; None when they can."""
    return why_no_triton(device.type, capability_of(device))


def _interpreting() -> bool:
    if not triton_installed():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
