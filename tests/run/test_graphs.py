"""Lanes that are recorded and replayed compute what lanes that are launched do, on memory that is used again."""

import time
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from run_helpers import make_session, short
from torch import Tensor

from epigram.config import load_recipe
from epigram.data.dataset import DataFolder
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.kernels.base import PLAIN
from epigram.run import choices, setup, speed
from epigram.run.bench import step as bench_step
from epigram.run.bench.base import Bench
from epigram.run.graphs import CudaCapture, Key, LaneGraph, Work
from epigram.run.setup import Session, build_engine
from epigram.run.train import lane_step, plan_step, train_step
from epigram.run.warmup import state_hash, warm_up


class StandIn:
    """Stands in for CUDA graphs: a replay computes eagerly into the tensors of the capture.

    As with a pool of memory that graphs share, a replay leaves nothing of what the other graphs had computed.
    """

    def __init__(self) -> None:
        self.results: list[list[Tensor]] = []
        self.replays = 0

    def __call__(self, work: Work) -> tuple[list[Tensor], Callable[[], None]]:
        results = [torch.full_like(tensor, float("nan")) for tensor in work()]
        self.results.append(results)

        def replay() -> None:
            self.replays += 1
            for others in self.results:
                for tensor in others:
                    tensor.fill_(float("nan"))
            for tensor, found in zip(results, work(), strict=True):
                tensor.copy_(found)

        return results, replay


ONE_LANE = "lanes=[{count=1, seq_len=128, num_seqs=4}]"
THREE_LANES = "lanes=[{count=2, seq_len=64, num_seqs=4}, {count=1, seq_len=128, num_seqs=2}]"

PARTS = "run.micro_tokens=128"
"""Two or four parts of each of these lanes."""


def pair(data: DataFolder, *overrides: str) -> tuple[Session, Session]:
    """A session that launches its lanes and the same one that replays them, both warmed up."""
    plain, recorded = make_session(data, *overrides), make_session(data, *overrides)
    recorded.capture = StandIn()
    for session in (plain, recorded):
        warm_up(session)
    return plain, recorded


@pytest.mark.parametrize("lanes", [ONE_LANE, THREE_LANES], ids=["one lane", "three lanes of two shapes"])
@pytest.mark.parametrize("setting", ["gradients.clip=lane", "gradients.clip=global", "gradients.clip=none", PARTS])
def test_training_is_the_same_bit_for_bit(data: DataFolder, lanes: str, setting: str):
    """Two steps before the late QAT and one in it."""
    plain, recorded = pair(data, lanes, setting)
    assert isinstance(recorded.capture, StandIn)
    replays = recorded.capture.replays
    for elapsed_s in (0.0, 5.0, 29.0):
        measured = [train_step(session, plan_step(session, elapsed_s)) for session in (plain, recorded)]
        assert measured[0].equal(measured[1])
        assert state_hash(plain) == state_hash(recorded)
        for session in (plain, recorded):
            session.step += 1
    assert recorded.capture.replays == replays + 3 * len(recorded.lanes), "every lane was replayed"
    for session in (plain, recorded):
        session.loader.close()


def test_each_shape_and_phase_is_recorded_once_in_the_warm_up(data: DataFolder):
    _, recorded = pair(data, THREE_LANES)
    shapes = {(4, 65), (2, 129)}
    assert set(recorded.graphs) == {Key(shape, quantized) for shape in shapes for quantized in (False, True)}
    assert isinstance(recorded.capture, StandIn)
    assert len(recorded.capture.results) == 4


def test_the_exponent_of_the_weighting_is_that_of_the_step(data: DataFolder):
    plain, recorded = pair(data, ONE_LANE)
    batch = torch.randint(512, (4, 129), generator=torch.Generator().manual_seed(0))
    losses = set()
    for gamma in (0.0, 0.7):
        expected = lane_step(plain, batch, torch.tensor(gamma), None)
        found = lane_step(recorded, batch, torch.tensor(gamma), None)
        assert found.equal(expected)
        for session in (plain, recorded):
            session.optimizer.zero_grad()
        losses.add(found.item())
    assert len(losses) == 2


def test_a_loss_outlives_the_next_replay(data: DataFolder):
    _, recorded = pair(data, THREE_LANES)
    batches = recorded.loader.next_step()
    losses = [lane_step(recorded, batch, torch.tensor(0.0), None) for batch in batches]
    assert all(torch.isfinite(loss) for loss in losses)
    recorded.loader.close()


def test_the_stand_in_catches_gradients_that_are_kept(data: DataFolder, monkeypatch):
    """Without copies of their own the sum over lanes is lost: what the tests above would see."""
    _, recorded = pair(data, THREE_LANES)
    monkeypatch.setattr(Session, "lends_gradients", False)
    train_step(recorded, plan_step(recorded, 0.0))
    assert not all(bool(torch.isfinite(p).all()) for p in recorded.model.parameters())
    recorded.loader.close()


def test_other_shapes_are_launched(data: DataFolder):
    plain, recorded = pair(data, ONE_LANE)
    assert isinstance(recorded.capture, StandIn)
    replays = recorded.capture.replays
    batch = torch.randint(512, (3, 129), generator=torch.Generator().manual_seed(0))
    losses = [lane_step(session, batch, torch.tensor(0.0), None) for session in (plain, recorded)]
    assert losses[0].equal(losses[1])
    assert recorded.capture.replays == replays


def test_the_benchmark_of_a_step_replays():
    engine = build_engine(short(), Context())
    engine.capture = StandIn()
    bench_step.run(Bench(engine=engine, repeats=1))
    assert {key.quantized for key in engine.graphs} == {False}
    assert engine.capture.replays > 0


def test_a_parameter_without_gradient_is_told(data: DataFolder):
    session = make_session(data, ONE_LANE)
    parameters = list(session.model.parameters())
    with pytest.raises(AssertionError, match="no gradient"):
        LaneGraph(StandIn(), lambda tokens, _: tokens.sum(), parameters, torch.zeros(1, 3, dtype=torch.int64), None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.kernels=fused", "run.compile=on"], "leaves nothing to compile"),
        (["run.kernels=triton"], "kernels = 'triton' must be one of auto, fused, plain"),
        (["run.cuda_graphs=always"], "cuda_graphs = 'always' must be one of auto, on, off"),
    ],
)
def test_settings_that_cannot_be(overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        load_recipe("smoke", overrides)


@pytest.mark.parametrize(
    ("setting", "message"),
    [("run.kernels=fused", "compiles for GPUs"), ("run.cuda_graphs=on", "CUDA graphs are for CUDA devices")],
)
def test_settings_that_this_machine_cannot_honour(setting: str, message: str):
    with pytest.raises(UserError, match=message):
        build_engine(short(setting), Context())


def test_on_a_cpu_nothing_is_fused_or_recorded():
    engine = build_engine(short(), Context())
    assert engine.model.kernels is PLAIN
    assert engine.capture is None
    assert engine.paths["kernels"] == "plain"
    assert "CUDA graphs" not in engine.paths


class Hopper(Context):
    """A device that is not there."""

    @property
    def capability(self) -> tuple[int, int]:
        return (9, 0)


@pytest.mark.parametrize(
    ("kernels", "compile_", "graphs", "expected"),
    [
        ("auto", "auto", "auto", (True, False, True)),
        ("auto", "off", "auto", (True, False, True)),
        ("fused", "auto", "off", (True, False, False)),
        ("auto", "on", "auto", (False, True, False)),
        ("plain", "auto", "auto", (False, True, False)),
        ("plain", "off", "auto", (False, False, False)),
    ],
)
def test_what_is_chosen_on_a_gpu(monkeypatch, kernels: str, compile_: str, graphs: str, expected: tuple[bool, ...]):
    """Fused kernels unless compiling is asked for; compiled only when plain; recorded only when fused."""
    monkeypatch.setattr(choices, "compiler_available", lambda: True)
    context = Hopper(device=torch.device("cuda"))
    model = setup.GPT(load_recipe("pr1212").model)
    model.compute_dtype = torch.bfloat16
    compiled, paths = choices.attach_kernels(model, kernels, compile_, context)
    fused, recorded = model.kernels is not PLAIN, choices.should_capture(graphs, model, context)
    assert (fused, compiled, recorded) == expected
    assert paths["kernels"].startswith("fused" if fused else "plain")
    assert paths["compile"].startswith("on" if compiled else "off")
    if not fused:
        with pytest.raises(UserError, match="plain ones"):
            choices.should_capture("on", model, context)


# -- on a device -------------------------------------------------------------------------------------------------------

HEADS = ("model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=64", "model.model_dim=128", "model.mlp_dim=384")
"""Recipe smoke with sizes that every kernel knows."""


def on_cuda(data: DataFolder, *overrides: str) -> Session:
    context = Context(device=torch.device("cuda", 0))
    return setup.build_session(short(*HEADS, "seed=4", *overrides), data, context)


def trained(session: Session, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the first steps, the last of them quantization-aware, and the weights after them."""
    warm_up(session)
    losses = []
    for number in range(steps):
        plan = plan_step(session, 29.0 if number == steps - 1 else 1.0 * number)
        losses.append(train_step(session, plan)[0].item())
        session.step += 1
    session.loader.close()
    return losses, {name: p.detach().clone() for name, p in session.model.named_parameters()}


@pytest.mark.gpu
@pytest.mark.parametrize("lanes", [ONE_LANE, THREE_LANES], ids=["one lane", "three lanes of two shapes"])
def test_graphs_compute_what_launches_do(data: DataFolder, lanes: str):
    """Sums by atomic additions come in another order each time, so a launched run is compared with itself first.

    With one backend of attention, whose rounding would differ: what is fastest where lanes are launched may be another
    one than where they are recorded.
    """
    attention = f"run.attention={'flash4' if find_spec('flash_attn') else 'sdpa'}"
    launched, again = (trained(on_cuda(data, lanes, attention, "run.cuda_graphs=off"), 5) for _ in range(2))
    session = on_cuda(data, lanes, attention, "run.cuda_graphs=on")
    assert isinstance(session.capture, CudaCapture)
    replayed = trained(session, 5)
    assert len(session.graphs) == (2 if lanes == ONE_LANE else 4)
    # Adam divides by the size of a gradient, so that one near zero turns rounding into up to half a percent of a step.
    assert replayed[0] == pytest.approx(launched[0], rel=1e-3)
    for name, weight in launched[1].items():
        noise = (again[1][name] - weight).norm()
        difference = (replayed[1][name] - weight).norm()
        assert difference <= 10 * noise + 1e-3 * weight.norm(), name


@pytest.mark.gpu
def test_fused_and_replayed_is_plain_within_its_noise(data: DataFolder):
    """Losses of a few steps in bfloat16; those of plain float32 say how large its noise is."""
    exact, plain, fused = (
        trained(on_cuda(data, THREE_LANES, *settings), 6)[0]
        for settings in (
            ("run.kernels=plain", "run.compile=off", "run.precision=float32"),
            ("run.kernels=plain", "run.compile=off"),
            ("run.kernels=fused",),
        )
    )
    for index, loss in enumerate(exact):
        noise = max(abs(other - right) for other, right in zip(plain, exact, strict=True))
        assert abs(fused[index] - loss) <= 3 * noise + 2e-3 * loss


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_nothing_in_a_step_waits_for_the_device(data: DataFolder, graphs: str):
    """Neither in a step as trained, nor in one that is quantization-aware; torch raises where the host would wait."""
    session = on_cuda(data, THREE_LANES, f"run.cuda_graphs={graphs}")
    warm_up(session)
    for seconds in (1.0, 29.0):  # whatever is made once is made
        train_step(session, plan_step(session, seconds))
    torch.cuda.set_sync_debug_mode("error")
    try:
        measured = [train_step(session, plan_step(session, seconds)) for seconds in (1.0, 29.0)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        session.loader.close()
    assert all(bool(found.isfinite().all()) for found in measured)


@pytest.mark.gpu
def test_the_hosts_part_of_a_launch_is_told_from_the_devices():
    """A small kernel behind three milliseconds that the host takes to launch it."""
    x = torch.ones(8, device="cuda")

    def step() -> None:
        time.sleep(3e-3)
        x.add_(1)

    assert speed.cuda_ms(step) > 2.5
    assert speed.device_ms(step) < 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_attention_is_measured_as_it_will_be_launched(data: DataFolder, graphs: str, monkeypatch: pytest.MonkeyPatch):
    timed: list[float] = []

    def device_ms(step: speed.Step, measure=speed.device_ms) -> float:
        timed.append(measure(step))
        return timed[-1]

    monkeypatch.setattr(speed, "device_ms", device_ms)
    session = on_cuda(data, ONE_LANE, f"run.cuda_graphs={graphs}")
    session.loader.close()
    assert all(0 < ms < 1000 for ms in timed)
    assert bool(timed) == (graphs == "on")


@pytest.mark.gpu
def test_a_whole_run_leaves_no_trace_of_the_warm_up(data: DataFolder):
    session = on_cuda(data, THREE_LANES)
    before = state_hash(session)
    warm_up(session)
    assert state_hash(session) == before
    assert session.graphs
    assert all(p.grad is None for p in session.model.parameters())
    session.loader.close()
