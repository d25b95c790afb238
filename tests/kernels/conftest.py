"""Kernels run compiled on a GPU, and in Triton's interpreter (see tests/conftest.py) where there is none."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from parity import Place

_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@pytest.fixture(params=[pytest.param("cpu", marks=_NO_GPU), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(
    params=[
        pytest.param("cpu-float32", marks=_NO_GPU),
        pytest.param("cpu-float16", marks=_NO_GPU),  # Triton's interpreter has no products in bfloat16
        pytest.param("cuda-bfloat16", marks=pytest.mark.gpu),
    ]
)
def place(request: pytest.FixtureRequest) -> Place:
    device, dtype = request.param.split("-")
    return Place(torch.device(device), getattr(torch, dtype))
