"""Fixtures of the quantization tests."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # quant_toy is shared by several files

from quant_toy import Toy, make_toy


@pytest.fixture
def toy() -> Toy:
    return make_toy()


@pytest.fixture
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parents[1] / "golden" / "quant.safetensors")
