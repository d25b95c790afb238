"""The captured update against the same steps taken one by one."""

import pytest
import torch
from torch import Tensor, nn

from epigram.optim.average import Ema
from epigram.optim.captured import CapturedUpdate
from epigram.optim.groups import OptimConfig
from epigram.optim.optimizer import Optimizer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _on(device: str, small) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p.detach().clone().to(device)) for name, p in small.named.items()}


def _gradients(small, step: int, device: str) -> dict[str, Tensor]:
    small.fill_gradients(step)
    return {name: p.grad.to(device) for name, p in small.named.items()}


def _parts(named: dict[str, nn.Parameter], small, config: OptimConfig) -> tuple[Optimizer, Ema]:
    return Optimizer(named, small.roles, config), Ema(named, 0.9, start_step=2, decay_warmup=True)


@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_update_step_by_step(small, config: OptimConfig, device: str) -> None:
    """Six steps with changing rates, the gradients in another place each time."""
    held = []
    plain, captured = _on(device, small), _on(device, small)
    optimizer, average = _parts(plain, small, config)
    twin, twin_average = _parts(captured, small, config)
    update = CapturedUpdate(twin, twin_average)
    for step in range(6):
        rates = 1.0 - 0.1 * step, 0.9 + 0.01 * step, torch.tensor(0.5 + 0.1 * step, device=device)
        for name, gradient in _gradients(small, step, device).items():
            plain[name].grad = gradient.clone()
            captured[name].grad = gradient
            held.append(gradient)
        optimizer.step(*rates)
        average.update()
        update(*rates)
    assert (device == "cuda") == (update._graph is not None)
    for name, parameter in plain.items():
        torch.testing.assert_close(captured[name], parameter, rtol=1e-5, atol=1e-6, msg=name)
    states = [{**o.state_dict(), **a.state_dict()} for o, a in ((optimizer, average), (twin, twin_average))]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_state_may_be_restored_after_warm_up(small, config: OptimConfig, device: str) -> None:
    """Two calls to warm up and capture, undone in place, leave no trace in what follows."""
    results = []
    for warm_up in (True, False):
        named = _on(device, small)
        optimizer, average = _parts(named, small, config)
        update = CapturedUpdate(optimizer, average)
        before = {name: p.detach().clone() for name, p in named.items()}
        states = [(part, {k: v.clone() for k, v in part.state_dict().items()}) for part in (optimizer, average)]
        for step in range(2 if warm_up else 0):
            for name, gradient in _gradients(small, step, device).items():
                named[name].grad = gradient
            update(1.0, 0.9)
        for part, state in states:
            part.load_state_dict(state)
        for name, p in named.items():
            p.data.copy_(before[name])
        for step in range(2, 5):
            for name, gradient in _gradients(small, step, device).items():
                named[name].grad = gradient
            update(0.5, 0.95)
        results.append(named)
    for name, parameter in results[0].items():
        torch.testing.assert_close(results[1][name], parameter, rtol=1e-6, atol=1e-7, msg=name)


def test_refuses_a_missing_gradient(small, config: OptimConfig) -> None:
    update = CapturedUpdate(*_parts(small.named, small, config))
    small.fill_gradients(0)
    small.named["embed"].grad = None
    with pytest.raises(AssertionError, match="no gradient for embed"):
        update(1.0, 0.9)
