"""Kernels run compiled on a GPU, and in Triton's interpreter (see tests/conftest.py) where there is none."""

import pytest
import torch

_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@pytest.fixture(params=[pytest.param("cpu", marks=_NO_GPU), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
