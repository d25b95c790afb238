"""Tests run on one thread each: several run at a time, and small tensors gain nothing from more."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from epigram import plugin

ATTENTION = "epigram.attention"

torch.set_num_threads(1)

# Without a GPU fused kernels run in Triton's interpreter, which has to be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """An error on a CUDA device is final for its process: all later tests would fail, and say nothing of themselves."""
    if not (torch.cuda.is_available() and item.get_closest_marker("gpu")):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if hasattr(item.config, "workerinput"):
            os._exit(1)  # one of several workers (xdist), in whose place another one starts
        pytest.exit(f"{item.nodeid} made the GPU unusable for this process: {error}", returncode=1)


@pytest.fixture(autouse=True)
def _float32_as_it_was() -> Iterator[None]:
    """A run on CUDA allows TF32 for the whole process; the next test decides for itself."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


# A shell that starts the tests in the background has Ctrl-C ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine makes an example slow without making it wrong.
settings.register_profile("epigram", deadline=None)
settings.load_profile("epigram")
sys.path.insert(0, str(Path(__file__).parent / "model"))  # golden_model and stirred are shared by several folders


@pytest.fixture
def shipped_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention backends that expectations are written for: one more in the folder is a candidate everywhere."""
    names, shipped = plugin.names, ["cudnn", "flash3", "flash4", "flex", "reference", "sdpa"]
    assert set(shipped) <= set(names(ATTENTION))
    monkeypatch.setattr(plugin, "names", lambda package: list(shipped) if package == ATTENTION else names(package))
