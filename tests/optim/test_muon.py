"""Muon against a loop over single matrices in double precision, and against the published implementation."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from epigram.dist.share import Share
from epigram.errors import UserError
from epigram.optim.base import Group, Part
from epigram.optim.muon import Muon, MuonConfig, batches, resolve_dtype
from epigram.roles import ParameterRole, matrices

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "muon.safetensors")
QUINTIC = (3.4445, -4.7750, 2.0315)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value)


def _muon(small, config: MuonConfig) -> Muon:
    """Muon over the banks of `small`, layers 0 and 1 early, 2 to 4 late."""
    banks = [name for name, role in small.roles.items() if role.kind == "matrix"]
    halves = {"early": (config.lr_early, (0, 2)), "late": (config.lr_late, (2, 5))}
    groups = [
        Group(
            name=half,
            rule="muon",
            lr=lr,
            weight_decay=config.weight_decay,
            parts=tuple(Part(bank, layers) for bank in banks),
        )
        for half, (lr, layers) in halves.items()
    ]
    return Muon(small.named, small.roles, groups, config)


def _plain_newton_schulz(update: Tensor) -> Tensor:
    """One matrix, one operation at a time, each rounded to the dtype of `update` as published."""

    def product(left: Tensor, right: Tensor) -> Tensor:
        # Summed in double precision, so that the rounding is the same on every CPU.
        return (left.double() @ right.double()).to(update.dtype)

    a, b, c = QUINTIC
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = product(x, x.T)
        x = a * x + product(b * gram + c * product(gram, gram), x)
    return x.T if update.shape[0] > update.shape[1] else x


def _plain_step(
    weight: Tensor, gradient: Tensor, momentum: Tensor, lr: float, mu: float, decay: float, equal_rows: bool
) -> tuple[Tensor, Tensor]:
    """New weight and momentum of one matrix after one step, in the dtype of the momentum."""
    gradient = gradient.to(momentum.dtype)
    momentum = mu * momentum + gradient
    update = gradient.add(momentum, alpha=mu)
    if equal_rows:
        update = update / update.norm(dim=1, keepdim=True)
    kappa = math.sqrt(max(1, weight.shape[0] / weight.shape[1]))
    update = _plain_newton_schulz(update).to(weight.dtype)
    return weight * (1 - lr * decay) - lr * kappa * update, momentum


@pytest.mark.parametrize("equal_rows", [False, True])
def test_equals_a_loop_over_matrices(small, equal_rows: bool) -> None:
    """Four steps with changing rates and gradients that are still to be scaled."""
    config = MuonConfig(lr_early=0.024, lr_late=0.019, weight_decay=0.04, normalize_rows=equal_rows, dtype="float32")
    muon = _muon(small, config)
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    layer_of = {}
    for name, role in small.roles.items():
        if role.kind == "matrix":
            for view in matrices(role, small.named[name].detach()):
                expected[view.name] = (view.weight.double(), torch.zeros_like(view.weight).double())
                layer_of[view.name] = view.layer
    for step in range(4):
        multiplier, mu, scale = 1.0 - 0.2 * step, 0.92 + 0.01 * step, 0.5 + 0.25 * step
        small.fill_gradients(step)
        for name, role in small.roles.items():
            if role.kind == "matrix":
                for view in matrices(role, small.named[name].grad):
                    weight, momentum = expected[view.name]
                    lr = multiplier * (0.024 if layer_of[view.name] < 2 else 0.019)
                    gradient = scale * view.weight.double()
                    expected[view.name] = _plain_step(weight, gradient, momentum, lr, mu, 0.04, equal_rows)
        muon.step(_scalar(multiplier), _scalar(mu), _scalar(scale))
    assert len(expected) == 5 * 6
    for name, role in small.roles.items():
        if role.kind == "matrix":
            for view in matrices(role, small.named[name].detach()):
                torch.testing.assert_close(
                    view.weight.double(), expected[view.name][0], rtol=1e-4, atol=1e-5, msg=view.name
                )
            for view in matrices(role, muon.state()[f"momentum.{name}"]):
                torch.testing.assert_close(
                    view.weight.double(), expected[view.name][1], rtol=1e-5, atol=1e-5, msg=view.name
                )


DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("equal_rows", [False, True])
def test_fused_equals_plain(equal_rows: bool, device: str) -> None:
    """Two steps of a wide, a tall and two square splits of two layers, two iterations each."""
    pytest.importorskip("triton")
    splits = {"qk": (("q", 16), ("k", 8)), "up": (("up", 40),), "down": (("down", 16),)}
    shapes = {"qk": (2, 24, 16), "up": (2, 40, 16), "down": (2, 16, 40)}
    roles = {
        name: ParameterRole(kind="matrix", num_layers=2, bank=name, splits=split) for name, split in splits.items()
    }
    config = MuonConfig(
        lr_early=0.02,
        lr_late=0.04,
        weight_decay=0.1,
        num_iterations=2,
        normalize_rows=equal_rows,
        dtype="float32",
        momentum_dtype="float32",
    )
    parts = {half: tuple(Part(name, (half, half + 1)) for name in shapes) for half in (0, 1)}
    groups = [
        Group(name="early", rule="muon", lr=0.02, weight_decay=0.1, parts=parts[0]),
        Group(name="late", rule="muon", lr=0.04, weight_decay=0.1, parts=parts[1]),
    ]
    found: list[dict[str, Tensor]] = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(0)
        draw = [[torch.randn(shape, generator=generator).to(device) for shape in shapes.values()] for _ in range(3)]
        named = {name: nn.Parameter(value) for name, value in zip(shapes, draw[0], strict=True)}
        muon = Muon(named, roles, groups, config, fused=fused)
        for step, gradients in enumerate(draw[1:]):
            for parameter, gradient in zip(named.values(), gradients, strict=True):
                parameter.grad = gradient
            muon.step(*(torch.tensor(value, device=device) for value in (1 - step / 2, 0.9, 0.7)))
        found.append({**{name: p.detach() for name, p in named.items()}, **muon.state()})
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.gpu
def test_fused_in_bfloat16_is_as_near_to_double_precision_as_plain() -> None:
    """Two layers of the published shapes, one step: both round a few times in each of five iterations."""
    splits = {"qkv": (("q", 512), ("k", 256), ("v", 256)), "up": (("up", 1536),), "down": (("down", 512),)}
    shapes = {"qkv": (2, 1024, 512), "up": (2, 1536, 512), "down": (2, 512, 1536)}
    roles = {
        name: ParameterRole(kind="matrix", num_layers=2, bank=name, splits=split) for name, split in splits.items()
    }
    groups = [Group(name="all", rule="muon", lr=1.0, weight_decay=0.0, parts=tuple(Part(name) for name in shapes))]
    found = []
    for dtype, fused in (("float64", False), ("bfloat16", False), ("bfloat16", True)):
        generator = torch.Generator("cuda").manual_seed(0)
        named = {name: nn.Parameter(torch.zeros(shape, device="cuda")) for name, shape in shapes.items()}
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator, device="cuda")
        config = MuonConfig(lr_early=1.0, lr_late=1.0, weight_decay=0.0, momentum_dtype="float32")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("epigram.optim.muon.resolve_dtype", lambda name, device, dtype=dtype: getattr(torch, dtype))
            muon = Muon(named, roles, groups, config, fused=fused)
        muon.step(*(torch.tensor(value, device="cuda") for value in (1.0, 0.95, 0.01)))
        found.append(torch.cat([p.detach().flatten() for p in named.values()]))
    plain, fused_error = (_relative_difference(update, found[0]) for update in found[1:])
    assert plain < 0.05
    assert fused_error < 1.2 * plain


def _relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_the_loop_is_the_published_algorithm() -> None:
    """With the published order of bfloat16 roundings the loop above gives the published weights."""
    weights = GOLDEN["start"].clone()
    momenta = torch.zeros_like(weights, dtype=torch.bfloat16)
    for step in range(3):
        before = weights.clone()
        for index, gradient in enumerate(GOLDEN[f"grad.{step}"]):
            weights[index], momenta[index] = _plain_step(
                weights[index], gradient, momenta[index], 0.02, 0.95, 0.04, equal_rows=False
            )
        # Of an update's size; 1e-4 and less where the products round alike.
        assert _relative_difference(weights - before, GOLDEN[f"after.{step}"] - before) < 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_equals_the_published_implementation(dtype: str) -> None:
    """As far as bfloat16 allows: the published update itself is 3 % from the same update in double precision.

    Ours rounds less often and is 1.6 % from it in bfloat16. Without Nesterov, weight decay or kappa the
    difference would be 20 % or more.
    """
    bank = nn.Parameter(GOLDEN["start"].clone())
    role = ParameterRole(kind="matrix", num_layers=4, bank="up", splits=(("up", 48),))
    config = MuonConfig(lr_early=0.02, lr_late=0.02, weight_decay=0.04, dtype=dtype, momentum_dtype=dtype)
    groups = [Group(name="all", rule="muon", lr=0.02, weight_decay=0.04, parts=(Part("bank"),))]
    muon = Muon({"bank": bank}, {"bank": role}, groups, config)
    published = GOLDEN["start"]
    for step in range(3):
        before = bank.detach().clone()
        bank.grad = GOLDEN[f"grad.{step}"].clone()
        muon.step(_scalar(1.0), _scalar(0.95), _scalar(1.0))
        after = GOLDEN[f"after.{step}"]
        assert _relative_difference(bank.detach() - before, after - published) < 0.05
        published = after


def test_zero_matrix_with_zero_gradient_stays_zero(small) -> None:
    muon = _muon(small, MuonConfig(lr_early=0.02, lr_late=0.02, weight_decay=0.04))
    small.fill_gradients(0)
    for name in ("banks.up", "banks.down"):
        small.named[name].data[3] = 0
        small.named[name].grad[3] = 0
    muon.step(_scalar(1.0), _scalar(0.95), _scalar(1.0))
    for name in ("banks.up", "banks.down"):
        assert small.named[name][3].eq(0).all()
        assert small.named[name][2].ne(0).any()


def test_learning_rate_differs_by_layer(small) -> None:
    config = MuonConfig(lr_early=0.03, lr_late=0.01, weight_decay=0.0)
    muon = _muon(small, config)
    small.fill_gradients(0)
    before = small.clone()
    for name in ("banks.qkv", "banks.up"):
        small.named[name].grad[:] = small.named[name].grad[0].clone()
    muon.step(_scalar(0.5), _scalar(0.9), _scalar(1.0))
    for name in ("banks.qkv", "banks.up"):
        moved = (small.named[name] - before.named[name]).detach()
        torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-5)
        for layer in (2, 3, 4):
            torch.testing.assert_close(moved[layer] * 3, moved[0], rtol=1e-3, atol=1e-5)


def test_tall_matrices_move_by_kappa(small) -> None:
    """For equal gradients `up` (40 x 16) moves sqrt(2.5) times as far as its transpose `down` (16 x 40)."""
    muon = _muon(small, MuonConfig(lr_early=0.02, lr_late=0.02, weight_decay=0.0, dtype="float32"))
    small.fill_gradients(0)
    before = small.clone()
    small.named["banks.down"].grad = small.named["banks.up"].grad.mT.contiguous()
    muon.step(_scalar(1.0), _scalar(0.95), _scalar(1.0))
    up, down = ((small.named[name] - before.named[name]).detach() for name in ("banks.up", "banks.down"))
    torch.testing.assert_close(up, math.sqrt(40 / 16) * down.mT, rtol=1e-3, atol=1e-5)


def test_refuses_a_bank_without_gradient(small) -> None:
    muon = _muon(small, MuonConfig(lr_early=0.02, lr_late=0.02, weight_decay=0.0))
    small.fill_gradients(0)
    small.named["banks.out"].grad = None
    with pytest.raises(AssertionError, match=r"banks\.out has no gradient"):
        muon.step(_scalar(1.0), _scalar(0.95), _scalar(1.0))


def test_precision_follows_the_device() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_config_names_every_problem() -> None:
    with pytest.raises(UserError) as error:
        MuonConfig(lr_early=-1.0, lr_late=math.nan, weight_decay=0.0, coefficients="cubic", dtype="float16")
    for word in ("lr_early", "lr_late", "coefficients", "quintic", "muon.dtype", "bfloat16"):
        assert word in str(error.value)
    with pytest.raises(UserError, match=r"num_iterations = 6 .* between 1 and 5"):
        MuonConfig(lr_early=0.1, lr_late=0.1, weight_decay=0.0, coefficients="polar_express", num_iterations=6)


def _roles_and_shapes(data: st.DataObject) -> tuple[dict[str, ParameterRole], dict[str, tuple[int, ...]]]:
    roles, shapes = {}, {}
    size = st.sampled_from([4, 8, 12])
    for index in range(data.draw(st.integers(1, 4))):
        layers = data.draw(st.integers(1, 5))
        rows = data.draw(st.lists(size, min_size=1, max_size=3))
        splits = tuple((f"m{i}", r) for i, r in enumerate(rows))
        name = f"bank{index}"
        roles[name] = ParameterRole(kind="matrix", num_layers=layers, bank=name, splits=splits)
        shapes[name] = (layers, sum(rows), data.draw(size))
    return roles, shapes


@given(data=st.data(), world_size=st.integers(1, 7))
def test_plan_covers_every_matrix_once_over_all_processes(data: st.DataObject, world_size: int) -> None:
    roles, shapes = _roles_and_shapes(data)
    count = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    plan = batches(roles, shapes)
    assert len({(batch.short, batch.long) for batch in plan}) == len(plan)
    for batch in plan:
        for segment in batch.segments:
            assert segment.num_matrices == len(count[segment.bank])
            for rank in range(world_size):
                share = Share(segment.num_matrices, rank, world_size)
                view = segment.of(share.of(count[segment.bank]))
                view += 1
                assert segment.oriented(view).shape == (share.num_own, batch.short, batch.long)
    assert all(tensor.eq(1).all() for tensor in count.values())


def test_plan_of_the_published_model() -> None:
    """72 matrices in three batches: q with out, k with v, up with down."""
    splits = {
        "qkv": (("q", 512), ("k", 256), ("v", 256)),
        "out": (("out", 512),),
        "up": (("up", 1536),),
        "down": (("down", 512),),
    }
    roles = {bank: ParameterRole(kind="matrix", num_layers=12, bank=bank, splits=rows) for bank, rows in splits.items()}
    shapes = {
        "qkv": (12, 1024, 512),
        "out": (12, 512, 512),
        "up": (12, 1536, 512),
        "down": (12, 512, 1536),
    }
    plan = batches(roles, shapes)
    assert [(batch.short, batch.long, batch.num_matrices) for batch in plan] == [
        (512, 1536, 24),
        (512, 512, 24),
        (256, 512, 24),
    ]
    kappas = {segment.bank: segment.kappa for batch in plan for segment in batch.segments}
    assert kappas == {"qkv": 1.0, "out": 1.0, "up": math.sqrt(3), "down": 1.0}
