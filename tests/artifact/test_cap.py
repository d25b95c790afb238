import math
from pathlib import Path

import pytest
import torch

from epigram import plugin
from epigram.artifact.size import FLOAT16_BITS, SCALE_BITS, CapCheck, TensorFormat, forecast
from epigram.artifact.tensors import Contents, save
from epigram.cli import check
from epigram.config import ArtifactConfig, load_recipe
from epigram.quantized import QuantizedTensor
from epigram.run.submission.rules.limits import Limits


def test_the_cap_is_decimal() -> None:
    fits = CapCheck(artifact_bytes=15_900_000, code_bytes=100_000, cap_bytes=16_000_000)
    over = CapCheck(artifact_bytes=15_900_001, code_bytes=100_000, cap_bytes=16_000_000)
    assert fits.fits
    assert fits.margin_bytes == 0
    assert not over.fits
    assert over.margin_bytes == -1
    assert str(over).endswith("16,000,001 bytes, 1 over the cap of 16,000,000")


@pytest.mark.parametrize("name", ["pr1212", "pr1130", "pr1019", "pr549", "h100"])
def test_recipes_and_checks_hold_to_the_cap_of_the_challenge(name: str) -> None:
    (option,) = [option for option in check.command.params if option.name == "cap"]
    assert load_recipe(name).artifact.cap_bytes == ArtifactConfig().cap_bytes == Limits().cap_bytes == 16_000_000
    assert option.default == 16_000_000


def test_code_counts() -> None:
    check = CapCheck(artifact_bytes=15_692_752, code_bytes=135_902, cap_bytes=16_000_000)
    assert check.total_bytes == 15_828_654
    assert str(check).startswith("15,692,752 artifact + 135,902 code = 15,828,654 bytes, 171,346 under")


def test_without_a_cap_everything_fits() -> None:
    check = CapCheck(artifact_bytes=10**9, code_bytes=1, cap_bytes=None)
    assert check.fits
    assert check.margin_bytes is None


def test_forecast_of_the_published_model() -> None:
    """#1212: 28.3 M int6 weights at 4.17 bits, three int8 tables, 129,638 float16; it measured 15.69 MB."""
    matrices = [(512, 512), (256, 512), (256, 512), (512, 512), (1536, 512), (512, 1536)] * 12
    tables = [(1024, 512), (5120, 128), (1024, 128)]
    formats = [TensorFormat(shape=shape, bits_per_weight=4.17, num_scales=shape[0]) for shape in matrices]
    formats += [TensorFormat(shape=shape, bits_per_weight=4.5, num_scales=shape[0]) for shape in tables]
    formats.append(TensorFormat(shape=(129_638,), bits_per_weight=FLOAT16_BITS))
    size = forecast(formats, scale_bits=0.0)  # its floor makes all scales equal
    assert size == pytest.approx(15_690_000, rel=0.01)
    assert forecast(formats, scale_bits=0.0, tokenizer_bytes=13_000) == size + 13_000
    assert forecast(formats, scale_bits=8.0) == size + 43_008 + 7_168


@pytest.mark.parametrize("codec", plugin.names("epigram.artifact.codecs"))
def test_forecast_comes_true(tmp_path: Path, codec: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, QuantizedTensor | torch.Tensor] = {}
    formats = []
    for i in range(8):
        weights = torch.randn(300, 200, generator=generator) * torch.rand(300, 1, generator=generator).exp()
        step = (7.0 / 31 * weights.std(1)).half()
        codes = (weights / step.float()[:, None]).round().clamp(-31, 31).to(torch.int8)
        tensors[f"layers.{i}.q"] = QuantizedTensor(codes, step, 31)
        # The entropy of a Gaussian in steps of 7 / 31 of its spread.
        order0 = math.log2(31 / 7.0) + 0.5 * math.log2(2 * math.pi * math.e)
        bits = plugin.load("epigram.artifact.codecs", codec).forecast_bits(order0)
        formats.append(TensorFormat(shape=(300, 200), bits_per_weight=bits, num_scales=300))
    tensors["gate"] = torch.randn(5000, generator=generator).half()
    formats.append(TensorFormat(shape=(5000,), bits_per_weight=16.0 if codec == "store" else FLOAT16_BITS))
    expected = forecast(formats, scale_bits=16.0 if codec == "store" else SCALE_BITS)
    assert save(tmp_path / "m", Contents(model={}, tensors=tensors), codec).total_bytes == pytest.approx(
        expected, rel=0.02
    )
