"""Backends whose libraries are replaced by stand-ins in plain torch."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import stand_ins

FLASH = ("flash3", "flash4")
MODULES = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface", "flash_attn_interface", "flash_attn_config")


@pytest.fixture
def install(monkeypatch) -> Iterator[Callable[..., None]]:
    """Makes the given modules importable and no other FlashAttention library; none before the first call."""
    package = importlib.import_module("epigram.attention")

    def forget() -> None:
        for name in FLASH:
            sys.modules.pop(f"epigram.attention.{name}", None)
            if hasattr(package, name):
                delattr(package, name)

    def put(modules: dict[str, ModuleType]) -> None:
        forget()
        for name in MODULES:
            monkeypatch.setitem(sys.modules, name, modules.get(name))  # None: cannot be imported
        stand_ins.CALLS.clear()

    put({})
    yield put
    forget()
