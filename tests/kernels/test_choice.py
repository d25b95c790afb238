"""Which machine gets fused kernels, and what is said where it gets none."""

import pytest
import torch

from epigram import capability
from epigram.errors import UserError
from epigram.kernels import choice

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretend to have a GPU of a capability, with or without Triton."""

    def pretend(found: tuple[int, int], triton: bool = True, interpreting: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
        monkeypatch.setattr(capability, "triton_installed", lambda: triton)
        monkeypatch.setattr(choice, "_interpreting", lambda: interpreting)

    return pretend


def test_auto_takes_what_the_machine_has(machine) -> None:
    machine((9, 0))
    assert choice.use_fused("auto", CUDA)
    assert not choice.use_fused("auto", CPU)
    assert not choice.use_fused("plain", CUDA)
    machine((7, 5))
    assert not choice.use_fused("auto", CUDA)
    machine((9, 0), triton=False)
    assert not choice.use_fused("auto", CUDA)


def test_fused_in_vain_is_refused_with_the_reason(machine) -> None:
    machine((7, 5))
    with pytest.raises(UserError, match=r"compute capability 8\.0 and later.*; set it to .auto"):
        choice.use_fused("fused", CUDA)
    with pytest.raises(UserError, match=r"compiles for GPUs"):
        choice.use_fused("fused", CPU)
    machine((9, 0), triton=False)
    with pytest.raises(UserError, match=r"Triton is not installed"):
        choice.use_fused("fused", CUDA)


def test_the_interpreter_serves_a_cpu_only_when_asked(machine) -> None:
    machine((9, 0), interpreting=True)
    assert choice.use_fused("fused", CPU)
    assert not choice.use_fused("auto", CPU)
