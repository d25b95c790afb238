"""The whole optimizer: learning, state, and independence from the host."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from epigram.errors import UserError
from epigram.optim.groups import OptimConfig
from epigram.optim.optimizer import Optimizer
from epigram.roles import ParameterRole


def _run(optimizer: Optimizer, small, steps: range) -> None:
    for step in steps:
        small.fill_gradients(step)
        optimizer.step(1.0 - 0.05 * step, 0.92 + 0.005 * step)


def _weights(small) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in small.named.items()}


def _assert_identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_resumed_run_is_bit_identical(small, config: OptimConfig) -> None:
    optimizer = Optimizer(small.named, small.roles, config)
    _run(optimizer, small, range(5))
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    resumed = small.clone()
    second = Optimizer(resumed.named, resumed.roles, config)
    second.load_state_dict(saved)
    _assert_identical(second.state_dict(), saved)
    _run(optimizer, small, range(5, 10))
    _run(second, resumed, range(5, 10))
    _assert_identical(_weights(small), _weights(resumed))
    _assert_identical(optimizer.state_dict(), second.state_dict())


def test_state_matters(small, config: OptimConfig) -> None:
    """Without the state the same continuation ends elsewhere, for each rule."""
    optimizer = Optimizer(small.named, small.roles, config)
    _run(optimizer, small, range(5))
    forgetful = small.clone()
    _run(optimizer, small, range(5, 6))
    _run(Optimizer(forgetful.named, forgetful.roles, config), forgetful, range(5, 6))
    for name in ("banks.up", "embed", "attn_scale"):
        assert not torch.allclose(small.named[name], forgetful.named[name], atol=1e-4)


def test_state_holds_a_moment_for_every_parameter(small, config: OptimConfig) -> None:
    state = Optimizer(small.named, small.roles, config).state_dict()
    for name, role in small.roles.items():
        keys = (
            [f"muon.momentum.{name}"]
            if role.kind == "matrix"
            else [f"adamw.exp_avg.{name}", f"adamw.exp_avg_sq.{name}"]
        )
        assert [state[key].shape for key in keys] == [small.named[name].shape] * len(keys)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("muon.momentum.banks.up"), r"muon\.momentum\.banks\.up is missing"),
        (lambda state: state.update(ghost=torch.zeros(1)), r"ghost is not part of it"),
        (
            lambda state: state.update({"adamw.exp_avg.embed": torch.zeros(3, 16)}),
            r"adamw\.exp_avg\.embed is torch\.float32 \(3, 16\) instead of torch\.float32 \(64, 16\)",
        ),
        (
            lambda state: state.update({"muon.momentum.banks.out": state["muon.momentum.banks.out"].bfloat16()}),
            r"banks\.out is torch\.bfloat16",
        ),
    ],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(
    small, config: OptimConfig, spoil, message: str
) -> None:
    optimizer = Optimizer(small.named, small.roles, config)
    _run(optimizer, small, range(2))
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    spoil(state)
    with pytest.raises(UserError, match=message):
        optimizer.load_state_dict(state)
    _assert_identical(optimizer.state_dict(), before)


def test_multiplier_zero_moves_nothing_but_remembers(small, config: OptimConfig) -> None:
    optimizer = Optimizer(small.named, small.roles, config)
    before = _weights(small)
    small.fill_gradients(0)
    optimizer.step(0.0, 0.95)
    _assert_identical(_weights(small), before)
    assert torch.equal(optimizer.state_dict()["muon.momentum.banks.up"], small.named["banks.up"].grad)


def test_scale_multiplies_the_gradients(small, config: OptimConfig) -> None:
    """Steps with a scale equal steps from gradients that were multiplied before; without one it is 1 again."""
    scaled = small.clone()
    optimizer, other = (Optimizer(s.named, s.roles, config) for s in (small, scaled))
    for step, scale in enumerate((0.25, 3.0, None)):
        for each in (small, scaled):
            each.fill_gradients(step)
        for parameter in small.named.values():
            parameter.grad *= scale or 1.0
        optimizer.step(1.0, 0.95)
        other.step(1.0, 0.95, None if scale is None else torch.tensor(scale))
    for name, parameter in small.named.items():
        torch.testing.assert_close(scaled.named[name], parameter, rtol=1e-4, atol=1e-5, msg=name)


def test_kernels_are_chosen_by_the_device_unless_named(small, config: OptimConfig) -> None:
    assert not Optimizer(small.named, small.roles, config).fused
    assert not Optimizer(small.named, small.roles, config, kernels="plain").fused
    pytest.importorskip("triton")
    if not torch.cuda.is_available():  # then tests run in Triton's interpreter, which serves a CPU when asked
        assert Optimizer(small.named, small.roles, config, kernels="fused").fused


def test_zero_grad(small, config: OptimConfig) -> None:
    optimizer = Optimizer(small.named, small.roles, config)
    small.fill_gradients(0)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in small.named.values())


def test_learns_a_linear_map(config: OptimConfig) -> None:
    """Muon and AdamW together drive a solvable regression near zero."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 16, generator=generator)
    targets = inputs @ torch.randn(16, 8, generator=generator) / 4 + 0.5
    named = {"bank": nn.Parameter(torch.zeros(1, 8, 16)), "bias": nn.Parameter(torch.zeros(8))}
    roles = {
        "bank": ParameterRole(kind="matrix", num_layers=1, bank="bank", splits=(("w", 8),)),
        "bias": ParameterRole(kind="control"),
    }
    optimizer = Optimizer(named, roles, config)
    for step in range(200):
        optimizer.zero_grad()
        loss = (inputs @ named["bank"][0].T + named["bias"] - targets).square().mean()
        loss.backward()
        optimizer.step(1 - step / 200, 0.9)
    assert loss < 2e-3 * targets.square().mean()


def test_refuses_low_precision_parameters(small, config: OptimConfig) -> None:
    small.named["embed"] = nn.Parameter(small.named["embed"].detach().bfloat16())
    with pytest.raises(AssertionError, match="not float32 and contiguous: embed"):
        Optimizer(small.named, small.roles, config)


def test_step_never_asks_the_device_for_a_value(small, config: OptimConfig) -> None:
    """Tensors without data stand in: whatever needs a value on the host raises."""
    with FakeTensorMode():
        named = {name: nn.Parameter(torch.empty(p.shape)) for name, p in small.named.items()}
        optimizer = Optimizer(named, small.roles, config)
        for p in named.values():
            p.grad = torch.empty(p.shape)
        optimizer.step(0.5, 0.95)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_step_in_a_cuda_graph_equals_the_eager_step(small, config: OptimConfig) -> None:
    """Captured once and replayed with other multipliers: equal to the same steps outside a graph."""

    def on_gpu(source) -> Optimizer:
        source.named = {name: nn.Parameter(p.detach().cuda()) for name, p in source.named.items()}
        return Optimizer(source.named, source.roles, config)

    captured, eager = small.clone(), small
    graphed, plain = on_gpu(captured), on_gpu(eager)
    gradients = {name: torch.zeros_like(p) for name, p in captured.named.items()}
    for name, p in captured.named.items():
        p.grad = gradients[name]
    start = {name: p.detach().clone() for name, p in captured.named.items()}
    empty = {name: tensor.clone() for name, tensor in graphed.state_dict().items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed.step(1.0, 0.9)  # warm-up, undone below
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.update()
    graphed.load_state_dict(empty)
    for name, p in captured.named.items():
        p.data.copy_(start[name])
    for step in range(3):
        multiplier, momentum = 1.0 - 0.2 * step, 0.9 + 0.02 * step
        for index, name in enumerate(eager.named):
            generator = torch.Generator("cuda").manual_seed(100 * step + index)
            gradient = torch.randn(gradients[name].shape, generator=generator, device="cuda")
            gradients[name].copy_(gradient)
            eager.named[name].grad = gradient
        graphed.set_rates(multiplier, momentum)
        graph.replay()
        plain.step(multiplier, momentum)
    for name in eager.named:
        torch.testing.assert_close(captured.named[name], eager.named[name], rtol=1e-5, atol=1e-6)
