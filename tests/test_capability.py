"""The table of devices: precision, compilation and kernels for simulated ones."""

import pytest
import torch

from epigram import capability, plugin
from epigram.attention.base import ORACLE, PACKAGE
from epigram.capability import float64_device, rows, support, why_no_compile, why_no_triton

# device, precision, compiles, Triton kernels
SIMULATED = [
    ("GTX 1080", "cuda", (6, 1), torch.float32, False, False),
    ("V100", "cuda", (7, 0), torch.float32, True, False),
    ("T4", "cuda", (7, 5), torch.float32, True, False),
    ("A100", "cuda", (8, 0), torch.bfloat16, True, True),
    ("3090", "cuda", (8, 6), torch.bfloat16, True, True),
    ("4090", "cuda", (8, 9), torch.bfloat16, True, True),
    ("H100", "cuda", (9, 0), torch.bfloat16, True, True),
    ("B200", "cuda", (10, 0), torch.bfloat16, True, True),
    ("B300", "cuda", (10, 3), torch.bfloat16, True, True),
    ("5090", "cuda", (12, 0), torch.bfloat16, True, True),
    ("a later one", "cuda", (13, 0), torch.bfloat16, True, True),
    ("MPS", "mps", None, torch.float32, False, False),
    ("CPU", "cpu", None, torch.float32, True, False),
]


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch):
    """Says whether Triton is installed."""
    return lambda there: monkeypatch.setattr(capability, "triton_installed", lambda: there)


@pytest.mark.parametrize(("name", "device_type", "found", "precision", "compiles", "kernels"), SIMULATED)
def test_simulated_devices(triton, name, device_type, found, precision, compiles, kernels) -> None:
    triton(True)
    assert support(device_type, found).precision == precision
    assert (why_no_compile(device_type, found) is None) == compiles
    assert (why_no_triton(device_type, found) is None) == kernels
    triton(False)
    assert (why_no_compile(device_type, found) is None) == (compiles and device_type == "cpu")
    assert why_no_triton(device_type, found) is not None


@pytest.mark.parametrize(
    ("found", "name"),
    [((7, 5), "T4"), ((8, 0), "A100"), ((8, 9), "40 series"), ((9, 0), "H100"), ((10, 3), "B200"), ((12, 0), "RTX 50")],
)
def test_a_row_names_its_devices(found, name) -> None:
    assert name in support("cuda", found).device


def test_reasons_in_words(triton) -> None:
    triton(False)
    assert why_no_triton("cuda", (9, 0)) == "Triton is not installed: it comes with torch's CUDA builds on Linux"
    assert why_no_compile("cuda", (7, 5)) == "torch.compile needs Triton for CUDA devices, which is not installed"
    triton(True)
    assert why_no_triton("cuda", (7, 5)).startswith("Triton supports compute capability 8.0 and later")
    assert why_no_compile("cuda", (6, 1)) == "torch.compile supports compute capability 7.0 and later"
    assert "without scaling the loss" in support("cuda", (7, 0)).precision_reason
    assert "without scaling the loss" in support("mps").precision_reason


def test_where_float64_is() -> None:
    assert float64_device(torch.device("mps")) == torch.device("cpu")
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_the_table_is_whole() -> None:
    """Every row names backends that exist, sdpa among them and never the oracle, and has its reasons."""
    names = set(plugin.names(PACKAGE))
    for row in rows():
        for order in (row.full, row.windowed):
            assert set(order) <= names - {ORACLE} and "sdpa" in order
            assert len(set(order)) == len(order)
        for reason in (row.precision_reason, row.attention_reason, row.compile_reason, row.triton_reason):
            assert reason and not reason.endswith(".")
    since = [row.since for row in rows() if row.since is not None]
    assert since == sorted(since, reverse=True) and since[-1] == (0, 0), "every capability has a row"


def test_triton_is_looked_for_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)
    assert not capability.triton_installed()
