"""The moving average against its closed form."""

import pytest
import torch
from torch import Tensor, nn

from epigram.errors import UserError
from epigram.optim.average import AverageConfig, Ema, NoAverage, average_of


def _history(steps: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"bank": (2, 3, 4), "scale": ()}
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(steps)]


def _parameters(values: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.clone()) for name, value in values.items()}


def _follow(average, params: dict[str, nn.Parameter], history: list[dict[str, Tensor]]) -> None:
    for values in history:
        for name, parameter in params.items():
            parameter.data.copy_(values[name])
        average.update()


def _weighted(history: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    return {
        name: sum(w * values[name].double() for w, values in zip(weights, history, strict=True)).float()
        for name in history[0]
    }


def _check(average: Ema, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(average.state_dict()[f"average.{name}"], value, rtol=1e-5, atol=1e-6)


def test_closed_form() -> None:
    """After n updates: decay^n p_0 + sum_k (1 - decay) decay^(n - k) p_k."""
    history, decay = _history(31), 0.9
    params = _parameters(history[0])
    ema = Ema(params, decay)
    _follow(ema, params, history[1:])
    weights = [decay**30] + [(1 - decay) * decay ** (30 - k) for k in range(1, 31)]
    assert sum(weights) == pytest.approx(1)
    _check(ema, _weighted(history, weights))


def test_start_step_follows_until_then() -> None:
    history, decay = _history(8), 0.75
    params = _parameters(history[0])
    ema = Ema(params, decay, start_step=5)
    _follow(ema, params, history[1:6])
    _check(ema, history[5])
    _follow(ema, params, history[6:])
    first, second, third = history[5:]
    _check(ema, _weighted([first, second, third], [decay**2, (1 - decay) * decay, 1 - decay]))


def test_decay_warmup() -> None:
    history = _history(4)
    params = _parameters(history[0])
    ema = Ema(params, 0.15, decay_warmup=True)
    _follow(ema, params, history[1:])
    expected = history[0]
    for decay, values in zip([1 / 10, 0.15, 0.15], history[1:], strict=True):
        expected = _weighted([expected, values], [decay, 1 - decay])
    _check(ema, expected)


def test_both_halves_of_an_update() -> None:
    """`apply` alone repeats the last weight: what changes from step to step is `set_weight`'s."""
    history = _history(2)
    params = _parameters(history[0])
    ema = Ema(params, 0.75)
    for name, parameter in params.items():
        parameter.data.copy_(history[1][name])
    ema.set_weight()
    _check(ema, history[0])
    assert ema.state_dict()["num_updates"] == 1
    ema.apply()
    _check(ema, _weighted(history, [0.75, 0.25]))
    ema.apply()
    _check(ema, _weighted(history, [0.75**2, 1 - 0.75**2]))
    assert ema.state_dict()["num_updates"] == 1


def test_copy_to() -> None:
    history = _history(3)
    params = _parameters(history[0])
    ema = Ema(params, 0.5)
    _follow(ema, params, history[1:])
    averages = {name: ema.state_dict()[f"average.{name}"].clone() for name in params}
    ema.copy_to()
    for name, p in params.items():
        assert torch.equal(p, averages[name])
    _check(ema, averages)


def test_low_precision_weights_are_averaged_in_float32() -> None:
    """Updates below half a bfloat16 step add up in the average and would be lost in bfloat16."""
    weight = torch.ones(4, dtype=torch.bfloat16)
    ema = Ema({"w": weight}, 0.999)
    weight.fill_(1.0078125)
    for _ in range(50):
        ema.update()
    state = ema.state_dict()["average.w"]
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, torch.full((4,), 1.0078125 - 0.0078125 * 0.999**50))
    ema.copy_to()
    assert torch.equal(weight, state.bfloat16())


def test_resumed_average_is_bit_identical() -> None:
    history = _history(12)
    settings = {"start_step": 3, "decay_warmup": True}
    params = _parameters(history[0])
    ema = Ema(params, 0.9, **settings)
    _follow(ema, params, history[1:6])
    saved = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    other = _parameters(history[5])
    resumed = Ema(other, 0.9, **settings)
    resumed.load_state_dict(saved)
    _follow(ema, params, history[6:])
    _follow(resumed, other, history[6:])
    for name, tensor in ema.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
    assert ema.state_dict()["num_updates"] == 11


def test_state_that_does_not_fit_is_refused() -> None:
    ema = Ema(_parameters(_history(1)[0]), 0.9)
    state = ema.state_dict()
    del state["average.scale"]
    with pytest.raises(UserError, match=r"average\.scale is missing"):
        ema.load_state_dict(state)


def test_modes() -> None:
    params = _parameters(_history(1)[0])
    assert isinstance(average_of(params, AverageConfig(mode="ema")), Ema)
    none = average_of(params, AverageConfig(mode="none"))
    assert isinstance(none, NoAverage)
    before = {name: p.detach().clone() for name, p in params.items()}
    none.update()
    none.copy_to()
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert none.state_dict() == {}
    with pytest.raises(UserError, match="a run without averaging"):
        none.load_state_dict({"num_updates": torch.zeros(())})


def test_config_problems() -> None:
    with pytest.raises(UserError, match="decay = 1 takes nothing in"):
        AverageConfig(mode="ema", decay=1.0)
    with pytest.raises(UserError, match=r"mode = 'swa'.*choose one of ema, none; .*decay = 1\.5"):
        AverageConfig(mode="swa", decay=1.5)
