"""The loop: what a step does, when it ends, and what it leaves when it goes wrong."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import losses_of, make_session, result_of, rows_of, saved_tensors, short, train_run
from torch import Tensor

from epigram.artifact import tensors as artifact
from epigram.data.dataset import DataFolder
from epigram.data.loader import Loader
from epigram.dist.context import Context
from epigram.optim.optimizer import Optimizer
from epigram.quant.qat import fake_quantize
from epigram.quantized import QuantizedTensor
from epigram.run import budget, train
from epigram.run.guard import DivergedError
from epigram.run.record import RunRecord
from epigram.run.report.build import build
from epigram.run.setup import Session, build_engine
from epigram.run.train import compute_step, lane_step, plan_step, train_step

ROUNDING = 1e-4
"""Adam divides by the size of a gradient, so that one near zero turns rounding into up to half a percent of a step."""


def quiet(session: Session, **changes: object) -> None:
    """Change settings of run/ in a session that is built."""
    session.config = replace(session.config, run=replace(session.config.run, **changes))


def parameters_of(session: Session) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in session.model.named_parameters()}


@pytest.mark.parametrize(("clip", "parts"), [("lane", 1), ("global", 1), ("lane", 2)])
def test_a_step_is_what_one_would_write_by_hand(data: DataFolder, clip: str, parts: int):
    """Two lanes of 64 and one of 128 tokens; two steps before the late QAT and one in it. Parts give the same step."""
    session = make_session(data, f"gradients.clip={clip}", "seed=3", f"run.micro_tokens={256 // parts}")
    assert session.paths.get("lanes are computed in parts") == ("4 x 64 in 2, 2 x 128 in 2" if parts > 1 else None)
    twin = make_session(data, "seed=3")
    named = dict(twin.model.named_parameters())
    optimizer = Optimizer(named, twin.model.roles(), twin.config.optim)
    average = {name: p.detach().clone() for name, p in named.items()}
    windows = Loader(data.split("train"), twin.config.flat_lanes, 3, 0)
    for number, elapsed_s in enumerate((0.0, 5.0, 29.0)):
        plan = plan_step(session, elapsed_s)
        assert plan.qat == (number == 2)
        loss, norm, *_ = train_step(session, plan).tolist()
        session.step += 1
        losses, norms = [], []
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
        for tokens in windows.next_step():
            found = twin.model.loss(
                tokens[:, :-1], tokens[:, 1:], torch.tensor(plan.gamma), 0.2, twin.quantized if plan.qat else None
            )
            gradients = [g.double() for g in torch.autograd.grad(found, list(named.values()))]
            length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            factor = min(1.0, 0.3 / length) if clip == "lane" else 1.0
            for name, gradient in zip(named, gradients, strict=True):
                total[name] += gradient * factor / 3
            losses.append(float(found.detach()))
            norms.append(length)
        if clip == "global":
            norms = [math.sqrt(sum(float(g.square().sum()) for g in total.values()))]
            total = {name: g * min(1.0, 0.3 / norms[0]) for name, g in total.items()}
        for name, parameter in named.items():
            parameter.grad = total[name].float()
        optimizer.step(plan.lr_multiplier, plan.momentum)
        optimizer.zero_grad()
        for name, parameter in named.items():
            average[name] = 0.9 * average[name] + 0.1 * parameter.detach()
        assert loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert norm == pytest.approx(np.mean(norms), rel=1e-4)
    atol = ROUNDING * (4 if parts > 1 else 1)  # parts sum in another order, and Adam divides by the size of a gradient
    for name, parameter in session.model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-4, atol=atol)
        off = (parameter - named[name]).abs() > 2e-5 + 1e-4 * named[name].abs()  # by a gradient near zero: rare
        assert parts > 1 or float(off.float().mean()) < 1e-3, name
    for name, mean in average.items():
        torch.testing.assert_close(session.average.state_dict()[f"average.{name}"], mean, rtol=1e-4, atol=atol)
    for used in (session.loader, twin.loader, windows):
        used.close()


@pytest.mark.parametrize(("most_tokens", "shapes"), [(512, {(4, 128)}), (511, {(2, 128)}), (1, {(1, 128)})])
def test_gradients_of_parts_add_up(most_tokens: int, shapes: set[tuple[int, int]]):
    """Also with weights by entropy, and where not a single sequence is as short as asked for."""
    found, gamma = [], torch.tensor(0.7)
    tokens = torch.randint(512, (4, 129), generator=torch.Generator().manual_seed(0))
    for most in (10_000, most_tokens):
        engine = build_engine(
            short("lanes=[{count=1, seq_len=128, num_seqs=4}]", f"run.micro_tokens={most}"), Context()
        )
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():  # gradients at the initial values are zero or nearly so
            for parameter in engine.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.05)
        plain, seen = engine.lane_loss, set()

        def watched(inputs, *rest, plain=plain, seen=seen):
            seen.add(tuple(inputs.shape))
            return plain(inputs, *rest)

        engine.lane_loss = watched
        loss = lane_step(engine, tokens, gamma, None)
        found.append((seen, loss, {name: p.grad for name, p in engine.model.named_parameters()}))
    (_, loss, whole), (seen, sum_of_parts, gradients) = found
    assert seen == shapes
    torch.testing.assert_close(sum_of_parts, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert (gradient - whole[name]).norm() <= 1e-5 * whole[name].norm(), name


def test_quantization_in_training_reaches_every_matrix(session: Session):
    """Each bank that the export rounds comes to the transform, and leaves it as the export's grid has it."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def transform(name: str, bank: Tensor) -> Tensor:
        seen[name] = bank, session.quantized(name, bank)
        return seen[name][1]

    for bank in session.model.banks.parameters():  # some begin at zero, which has no rounding error
        torch.nn.init.normal_(bank, std=0.1)
    tokens = torch.randint(0, 512, (2, 33))
    session.model.loss(tokens[:, :-1], tokens[:, 1:], None, 0.2, transform)
    roles = {role.bank: role for role in session.model.roles().values() if role.kind == "matrix"}
    assert seen.keys() == roles.keys()
    for name, (bank, rounded) in seen.items():
        assert rounded.equal(fake_quantize(bank, roles[name].splits, session.config.quant.grid)), name
        assert not rounded.equal(bank), name


def test_what_computes_a_step_needs_no_data(data: DataFolder):
    """On the windows that a session's loader hands out, an engine by itself takes the session's steps."""
    session, windows = make_session(data), make_session(data).loader
    engine = build_engine(session.config, Context())
    for _ in range(2):
        plan = plan_step(session, 0.0)
        assert torch.equal(train_step(session, plan), compute_step(engine, windows.next_step(), plan))
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, session.model.get_parameter(name)), name
    for loader in (session.loader, windows):
        loader.close()


def test_the_plan_is_a_function_of_step_and_clock(session: Session):
    """Closed forms of smoke's schedules: warm-down over the second half, MiLe's triangle, momentum over 10 steps."""
    for step, elapsed_s, lr, momentum, gamma in (
        (0, 0.0, 1.0, 0.85, 0.0),
        (5, 12.0, 1.0, 0.90, 0.75),
        (30, 21.0, 0.6, 0.95, 0.75 * 0.5),
        (30, 27.0, 0.2, 0.95, 0.75 / 6),
    ):
        session.step = step
        plan = plan_step(session, elapsed_s)
        assert (plan.lr_multiplier, plan.momentum, plan.gamma) == pytest.approx((lr, momentum, gamma))
        assert plan.qat == (lr < 0.3)
        assert plan.progress == elapsed_s / 30


def fake_steps(monkeypatch, step_s: float, measured: tuple[float, float] = (5.0, 1.0)):
    """Steps that do nothing and take `step_s` of a fake clock, which is returned."""
    now = [100.0]

    class Time:
        @staticmethod
        def perf_counter() -> float:
            return now[0]

    def step(session: Session, plan: object) -> Tensor:
        now[0] += step_s
        loss, norm = measured
        applied = float(math.isfinite(loss) and math.isfinite(norm))
        return torch.tensor([loss, norm, applied, *[loss] * 3, *[norm] * 3])

    monkeypatch.setattr(budget, "time", Time)
    monkeypatch.setattr(train, "train_step", step)
    return now


def test_after_a_stall_checkpoints_keep_their_distance(data: DataFolder, record: RunRecord, monkeypatch):
    """Not one a step until the dates that were missed are made up for."""
    session = make_session(data, *WALL, "run.checkpoint_every_s=2")
    now, saved = fake_steps(monkeypatch, step_s=1.0), []
    real = train.train_step

    def stalled(session: Session, plan: train.StepPlan) -> Tensor:
        now[0] += 4 if session.step == 1 else 0
        return real(session, plan)

    monkeypatch.setattr(train, "train_step", stalled)
    monkeypatch.setattr(train, "save_checkpoint", lambda session, record: saved.append(session.trained_s))
    train.train(session, record, dict)
    assert saved == [7.0, 9.0], "due at 2, seen at 6, then due at 8: each after the step that begins then"
    session.loader.close()


WALL = ("budget.clock=wall", "budget.steps=0", "budget.train_s=12", "budget.calibrate_s=2")


def test_validation_and_checkpoints_do_not_count(data: DataFolder, record: RunRecord, monkeypatch):
    session = make_session(data, *WALL, "run.val_every=2", "run.checkpoint_every_s=4")
    now = fake_steps(monkeypatch, step_s=1.0)
    scored, saved = [], []

    def validate() -> dict[str, float]:
        scored.append(session.step)
        now[0] += 100
        return {"val_nats": 5.0, "val_bpb": 3.0}

    def save(session: Session, record: RunRecord) -> None:
        saved.append((session.step, session.trained_s))
        now[0] += 1000

    monkeypatch.setattr(train, "save_checkpoint", save)
    train.train(session, record, validate)
    assert session.step == 10
    assert session.times_s == [float(step) for step in range(10)]
    assert session.trained_s == 10.0
    assert scored == [0, 2, 4, 6, 8]
    assert saved == [(5, 5.0), (9, 9.0)]
    validations = [row for row in rows_of(record.folder) if "val_bpb" in row]
    assert [(row["step"], row["elapsed_s"]) for row in validations] == [(s, float(s)) for s in scored]
    session.loader.close()


def test_what_the_device_still_has_to_do_counts(session: Session, record: RunRecord, monkeypatch):
    """Before a pause begins, every step that was queued is waited for."""
    quiet(session, val_every=3, log_every=0)
    done: list[str] = []
    drain = train.Pace.drain
    monkeypatch.setattr(train.Pace, "drain", lambda pace: (drain(pace), done.append(f"drained {len(pace._queue)}")))

    def validate() -> dict[str, float]:
        done.append("validated")
        return {"val_nats": 5.0, "val_bpb": 3.0}

    train.train(session, record, validate)
    assert done == ["drained 0", "validated"] * 3 + ["drained 0"]


def test_the_number_of_steps_can_be_limited(data_path: Path, tmp_path: Path):
    result = train_run(data_path, tmp_path / "run", "budget.max_steps=2", until="train")
    assert result["steps"] == 2
    assert len(losses_of(tmp_path / "run")) == 2
    assert result["tokens"] == 2 * 768


def test_measured_pace_is_real_whatever_drives_the_schedules(data: DataFolder, record: RunRecord, monkeypatch):
    """Counted steps of 5 s each on the schedules' clock, which really take 0.25 s."""
    session = make_session(data, "budget.steps=6")
    fake_steps(monkeypatch, step_s=0.25)
    train.train(session, record, dict)
    rows = rows_of(record.folder)
    assert [row["elapsed_s"] for row in rows] == pytest.approx([5, 10, 15, 20, 25, 30])
    assert [row["step_ms"] for row in rows] == pytest.approx([250.0] * 6)
    assert [row["tokens_per_s"] for row in rows] == pytest.approx([768 / 0.25] * 6)
    assert session.trained_s == 1.5
    session.loader.close()


def test_a_slow_machine_is_not_silent(data: DataFolder, record: RunRecord, monkeypatch):
    """Steps of 6 s, of which the recipe asks to see one in a thousand: after the first ten, a line comes every 18 s."""
    session = make_session(data, "budget.steps=20", "run.log_every=1000")
    fake_steps(monkeypatch, step_s=6.0)
    train.train(session, record, dict)
    assert [row["step"] for row in rows_of(record.folder)] == [*range(1, 11), 13, 16, 19]
    session.loader.close()


LONG_WARMDOWN = ("schedule.warmdown_frac=0", "schedule.warmdown_steps=100", "schedule.momentum_warmup_steps=5")


def warnings_of(record: RunRecord) -> list[tuple[str, str]]:
    """The warnings in a log, each with the first word of the line before it."""
    lines = ["", *(record.folder / "log.txt").read_text().splitlines()]
    return [(before.split(" ")[0], line) for before, line in pairwise(lines) if line.startswith("warning:")]


def test_a_warmdown_that_does_not_fit_is_told_once(data: DataFolder, record: RunRecord, monkeypatch):
    """Ten seconds of steps of 0.25 s; the log of a run that goes on from step 20 says nothing more."""
    session = make_session(data, *WALL, *LONG_WARMDOWN, "schedule.made_for_steps=200", "run.log_every=5")
    monkeypatch.setattr(train, "save_checkpoint", lambda session, record: None)
    fake_steps(monkeypatch, step_s=0.25)
    train.train(session, record, dict)
    assert session.step == 40
    ((before, warning),) = warnings_of(record)
    assert before.startswith("step:10/")
    assert "warmdown_steps = 100 is longer than what the budget has time for, about 40 steps" in warning
    assert "start at 40 %; try --set schedule.warmdown_steps=0 --set schedule.warmdown_frac=0.5, as in the" in warning
    logged = {row["step"]: row["lr"] for row in rows_of(record.folder)}
    assert logged[2] == pytest.approx(0.4, abs=0.02), "the schedule does what is said of it"
    session.step, session.trained_s = 20, 5.0
    train.train(session, record, dict)
    assert session.step == 40
    assert len(warnings_of(record)) == 1
    session.loader.close()


def test_a_number_of_steps_that_is_known_is_judged_at_the_start(data: DataFolder, record: RunRecord, monkeypatch):
    """That the run is to end early changes nothing: its schedules are those of all steps."""
    session = make_session(data, *LONG_WARMDOWN, "budget.steps=50", "budget.max_steps=12", "run.log_every=1")
    fake_steps(monkeypatch, step_s=0.25)
    train.train(session, record, dict)
    ((before, warning),) = warnings_of(record)
    assert before == "", "nothing was logged before"
    assert "warmdown_steps = 100 is longer than what the budget has time for, about 50 steps" in warning
    session.loader.close()


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (5.0, math.nan), (5.0, math.inf)])
def test_a_loss_or_gradient_that_is_no_number_ends_the_run(session: Session, record, monkeypatch, bad):
    quiet(session, log_every=0)
    fake_steps(monkeypatch, step_s=0.1, measured=bad)
    with pytest.raises(DivergedError, match="^step 1 gave a loss of .*lower the learning rates"):
        train.train(session, record, dict)
    assert session.step <= 3


def test_a_diverged_run_says_so_and_keeps_no_bad_checkpoint(data_path: Path, tmp_path: Path, monkeypatch):
    """NaN in the loss of one lane of step 3; a checkpoint is due after every step."""
    real, steps = train.train_step, []

    def poisoned(session: Session, plan) -> Tensor:
        steps.append(plan.step)
        plain = session.lane_loss
        if plan.step == 2:
            session.lane_loss = lambda *a: plain(*a) * (math.nan if a[0].shape[1] == 128 else 1.0)
        measured = real(session, plan)
        session.lane_loss = plain
        return measured

    monkeypatch.setattr(train, "train_step", poisoned)
    run = tmp_path / "run"
    with pytest.raises(DivergedError, match="^step 3 gave a loss of nan"):
        train_run(data_path, run, "run.checkpoint_every_s=0.01", "run.log_every=0")
    assert result_of(run)["status"] == "failed"
    assert "step 3 gave a loss of nan" in result_of(run)["reason"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002"]
    assert all(tensor.isfinite().all() for tensor in saved_tensors(run).values())
    assert not (run / "model.epigram").exists()
    build([run], tmp_path / "report.html")
    assert "step 3 gave a loss of nan" in (tmp_path / "report.html").read_text()


def test_the_artifact_is_made_of_the_averages(finished: Path):
    saved = saved_tensors(finished)
    stored = artifact.load(finished / "model.epigram").tensors
    for name in ("attn_scale", "q_gain", "skip.gate", "smear.gate"):
        assert stored[name].equal(saved[f"average.average.{name}"].half()), name
    assert not saved["average.average.q_gain"].equal(saved["model.q_gain"])
    table = stored["embed"]  # rounded to nearest
    assert isinstance(table, QuantizedTensor)
    clipped, half_step = table.codes.abs() == table.qmax, table.scale.float()[:, None] * 0.5001
    assert clipped.float().mean() < 0.01
    assert (((table.dequantize() - saved["average.average.embed"]).abs() <= half_step) | clipped).all()
    assert not (((table.dequantize() - saved["model.embed"]).abs() <= half_step) | clipped).all()
    for layer in range(4):
        matrix = stored[f"layers.{layer}.down"]
        assert isinstance(matrix, QuantizedTensor)
        average, weights = (saved[f"{part}.banks.down"][layer] for part in ("average.average", "model"))
        error = (matrix.dequantize() - average).square().sum()
        assert error < 0.02 * average.square().sum()
        assert error < 0.2 * (matrix.dequantize() - weights).square().sum()


def test_without_averaging_it_is_made_of_the_weights(data_path: Path, tmp_path: Path):
    train_run(data_path, tmp_path / "run", "average.mode=none")
    saved = saved_tensors(tmp_path / "run")
    assert not [name for name in saved if name.startswith("average.")]
    assert artifact.load(tmp_path / "run" / "model.epigram").tensors["q_gain"].equal(saved["model.q_gain"].half())


def test_what_is_logged(finished: Path):
    rows = [row for row in rows_of(finished) if "train_loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0]["train_loss"] == pytest.approx(math.log(512), rel=0.02)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.5
    assert [row["phase"] for row in rows] == ["train"] * 7 + ["qat"]
    assert [row["tokens"] for row in rows] == [768 * n for n in range(1, 9)]
    lines = (finished / "log.txt").read_text().splitlines()
    assert sum(line.startswith("step:") for line in lines) == 8
    assert json.loads((finished / "environment.json").read_text())["paths"]["attention"] == "sdpa"
