"""AdamW against torch.optim.AdamW, with per-layer rates as torch knows them: separate parameters."""

import math

import pytest
import torch
from torch import Tensor, nn

from epigram.errors import UserError
from epigram.optim.adamw import AdamW, AdamWConfig, AdamWOverride
from epigram.optim.groups import OptimConfig, assign

STEPS = 20


def _reference(small, rates: dict[str, list[tuple[slice | None, float, float]]]):
    """torch.optim.AdamW over copies of the slices, and a function that gives them the scaled gradients."""
    slices = [(name, index, lr, decay) for name, parts in rates.items() for index, lr, decay in parts]

    def cut(tensor: Tensor, index: slice | None) -> Tensor:
        return tensor.detach().clone() if index is None else tensor.detach()[index].clone()

    copies = [nn.Parameter(cut(small.named[name], index)) for name, index, _, _ in slices]
    groups = [
        {"params": [copy], "lr": lr, "weight_decay": decay}
        for copy, (_, _, lr, decay) in zip(copies, slices, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)

    def feed(scale: float) -> None:
        for copy, (name, index, _, _) in zip(copies, slices, strict=True):
            copy.grad = scale * cut(small.named[name].grad, index)

    def check() -> None:
        for copy, (name, index, _, _) in zip(copies, slices, strict=True):
            ours = cut(small.named[name], index)
            torch.testing.assert_close(ours, copy.detach(), rtol=1e-5, atol=1e-6, msg=f"{name} {index}")

    return optimizer, feed, check


def test_twenty_steps_equal_torch(small, config: OptimConfig) -> None:
    early, late = slice(0, 2), slice(2, 5)
    rates = {
        "embed": [(None, 0.022, 0.04)],
        "bigram.proj": [(None, 0.020, 0.03)],
        "backout": [(None, 0.020 * 5, 0.0)],  # overridden below
        "skip.weight": [(None, 0.020, 0.03)],
        "attn_scale": [(early, 0.020, 0.03), (late, 0.038, 0.03)],
        "resid_mix": [(early, 0.020, 0.03), (late, 0.038, 0.03)],
    }
    settings = {name: getattr(config.adamw, name) for name in config.adamw.__dataclass_fields__}
    override = AdamWOverride(parameter="backout", lr_scale=5.0, weight_decay=0.0)
    adamw_config = AdamWConfig(**{**settings, "overrides": (override,)})
    groups = assign(small.named, small.roles, OptimConfig(muon=config.muon, adamw=adamw_config))
    adamw = AdamW(small.named, [group for group in groups if group.rule == "adamw"], adamw_config)
    optimizer, feed, check = _reference(small, rates)
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        multiplier, scale = 1.0 - 0.04 * step, 0.5 + 0.1 * step
        small.fill_gradients(step)
        feed(scale)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * multiplier
        optimizer.step()
        adamw.step(torch.tensor(multiplier), torch.tensor(scale))
        check()


def test_where_the_kernel_ignores_the_scale(small, config: OptimConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Apple's GPUs: the same steps, and none with a scale of 0, whatever the gradients are."""
    kernel = torch._fused_adamw_

    def ignoring(*arguments, grad_scale=None, found_inf=None, **options) -> None:
        kernel(*arguments, **options)

    other = small.clone()
    groups = [group for group in assign(small.named, small.roles, config) if group.rule == "adamw"]
    expected, adamw = AdamW(small.named, groups, config.adamw), AdamW(other.named, groups, config.adamw)
    adamw._kernel_scales = False
    for step, scale in enumerate((0.5, 0.0, 0.1)):
        for model, optimizer, used in ((small, expected, kernel), (other, adamw, ignoring)):
            monkeypatch.setattr(torch, "_fused_adamw_", used)
            model.fill_gradients(step)
            if scale == 0:
                model.named["embed"].grad.fill_(math.inf)
            optimizer.step(torch.tensor(0.9), torch.tensor(scale))
    for name, parameter in small.named.items():
        torch.testing.assert_close(other.named[name], parameter, rtol=1e-6, atol=1e-8)
    for name, tensor in expected.state().items():
        torch.testing.assert_close(adamw.state()[name], tensor, rtol=1e-5, atol=1e-9)


def test_early_and_late_layers_move_differently(small, config: OptimConfig) -> None:
    """The first Adam step is lr * sign(g) plus decay: its size is the rate of the layer."""
    groups = assign(small.named, small.roles, config)
    adamw = AdamW(small.named, [group for group in groups if group.rule == "adamw"], config.adamw)
    before = small.clone()
    small.fill_gradients(3)
    adamw.step(torch.tensor(1.0), torch.tensor(1.0))
    start, after = before.named["attn_scale"].detach(), small.named["attn_scale"].detach()
    sign = small.named["attn_scale"].grad.sign()
    for layer in range(5):
        lr = 0.020 if layer < 2 else 0.038
        expected = start[layer] * (1 - lr * 0.03) - lr * sign[layer]
        torch.testing.assert_close(after[layer], expected, rtol=1e-4, atol=1e-6)


def test_moments_are_complete_and_float32(small, config: OptimConfig) -> None:
    groups = assign(small.named, small.roles, config)
    adamw = AdamW(small.named, [group for group in groups if group.rule == "adamw"], config.adamw)
    small.fill_gradients(0)
    adamw.step(torch.tensor(1.0), torch.tensor(1.0))
    state = adamw.state()
    for name, role in small.roles.items():
        if role.kind != "matrix":
            gradient = small.named[name].grad
            torch.testing.assert_close(state[f"exp_avg.{name}"], 0.1 * gradient)
            torch.testing.assert_close(state[f"exp_avg_sq.{name}"], 0.05 * gradient.square())
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert state["steps"].eq(1).all()


def test_refuses_a_missing_gradient(small, config: OptimConfig) -> None:
    groups = assign(small.named, small.roles, config)
    adamw = AdamW(small.named, [group for group in groups if group.rule == "adamw"], config.adamw)
    small.fill_gradients(0)
    small.named["backout"].grad = None
    with pytest.raises(AssertionError, match="no gradient for backout"):
        adamw.step(torch.tensor(1.0), torch.tensor(1.0))


def test_config_names_every_problem() -> None:
    with pytest.raises(UserError) as error:
        AdamWConfig(
            lr_token=-1.0,
            lr_scalar_early=0.1,
            lr_scalar_late=math.inf,
            weight_decay_token=0.0,
            weight_decay_scalar=0.0,
            beta2=1.0,
            overrides=(AdamWOverride(parameter="x", lr_scale=1.0, weight_decay=0.0),) * 2,
        )
    for word in ("lr_token = -1.0", "lr_scalar_late = inf", "beta2 = 1.0", "'x' twice"):
        assert word in str(error.value)
    with pytest.raises(UserError, match=r"lr_scale in adamw\.overrides of 'x' = -1"):
        AdamWOverride(parameter="x", lr_scale=-1.0, weight_decay=0.0)
