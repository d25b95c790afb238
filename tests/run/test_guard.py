"""What is not finite, or leaps, does not reach the weights; and the recipe says what becomes of the run."""

import math
from pathlib import Path

import pytest
import torch
from run_helpers import make_session, result_of, saved_tensors, train_run
from torch import Tensor

from epigram.config import GuardConfig
from epigram.data.dataset import DataFolder
from epigram.data.lanes import Lane
from epigram.errors import UserError
from epigram.run import train
from epigram.run.guard import DivergedError, Guard, Measured, verdict
from epigram.run.setup import Session, state_of
from epigram.run.train import plan_step, train_step

LANES = (Lane(seq_len=64, num_seqs=4), Lane(seq_len=128, num_seqs=2))


def measured(loss: float, applied: bool = True, norms: tuple[float, float] = (1.0, 1.0)) -> Measured:
    return Measured([loss, sum(norms) / 2, float(applied), loss, loss, *norms])


def copied(session: Session) -> dict[str, Tensor]:
    parts = state_of(session)
    return {f"{part}.{name}": t.detach().clone() for part, named in parts.items() for name, t in named.items()}


def poison(session: Session, value: float, seq_len: int = 128, gradient_only: bool = False) -> None:
    """The loss of lanes of this length, or its gradient alone, is `value` from now on."""
    plain = session.lane_loss

    def poisoned(tokens: Tensor, *rest: object) -> Tensor:
        loss = plain(tokens, *rest)
        if tokens.shape[1] != seq_len:
            return loss
        return loss + (loss - loss.detach()) * value if gradient_only else loss * value

    session.lane_loss = poisoned  # type: ignore[assignment]


@pytest.mark.parametrize("clip", ["lane", "global", "none"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_bad_step_changes_nothing(data: DataFolder, clip: str, value: float, gradient_only: bool):
    """Weights, moments, momentum, averages: to the last bit; the step that follows is as good as ever."""
    session, twin = (make_session(data, f"gradients.clip={clip}") for _ in range(2))
    for each in (session, twin):
        train_step(each, plan_step(each, 0.0))
    before, plain = copied(session), session.lane_loss
    poison(session, value, gradient_only=gradient_only)
    found = Measured(train_step(session, plan_step(session, 5.0)).tolist())
    assert not found.applied
    assert [math.isfinite(norm) for norm in found.norms] == [True, True, False]
    assert [math.isfinite(loss) for loss in found.losses] == [True, True, gradient_only and not math.isinf(value)] or (
        gradient_only  # inf times nothing is no number, in the loss too
    )
    after = copied(session)
    del before["average.num_updates"], after["average.num_updates"]  # it counts steps
    assert [name for name in before if not before[name].equal(after[name])] == []
    session.lane_loss = plain
    twin.loader.next_step()
    twin.average.state_dict()["num_updates"].add_(1)
    for each in (session, twin):
        assert Measured(train_step(each, plan_step(each, 10.0)).tolist()).applied
    assert [name for name, t in copied(twin).items() if not t.equal(copied(session)[name])] == []
    for each in (session, twin):
        each.close()


@pytest.mark.parametrize(
    ("losses", "norms", "norm", "limit", "expected"),
    [
        ([5.0, 5.0], [1.0, 1.0], 1.0, math.inf, 1.0),
        ([5.0, 5.0], [1.0, 1.0], 1.0, 5.0, 1.0),
        ([5.0, 5.5], [1.0, 1.0], 1.0, 5.0, 0.0),
        ([5.0, math.nan], [1.0, 1.0], 1.0, math.inf, 0.0),
        ([5.0, math.inf], [1.0, 1.0], 1.0, math.inf, 0.0),
        ([5.0, 5.0], [math.inf, 1.0], 1.0, math.inf, 0.0),
        ([5.0, 5.0], [1.0, 1.0], math.nan, math.inf, 0.0),
    ],
)
def test_the_verdict(losses: list[float], norms: list[float], norm: float, limit: float, expected: float):
    assert verdict(torch.tensor(losses), torch.tensor(norms), torch.tensor(norm), limit).item() == expected


def test_so_many_may_be_left_out():
    guard = Guard(GuardConfig(max_skips=2), LANES)
    assert guard.look(0, measured(5.0)) is None
    bad = measured(math.nan, applied=False, norms=(1.0, math.nan))
    line = guard.look(1, bad)
    assert line is not None
    assert line.startswith("warning: step 2 gave a loss of nan and a gradient norm of nan in lane 0 (4 x 64 tokens:")
    assert line.endswith("left out, 1 of at most 2")
    assert guard.look(2, bad)
    assert guard.skipped == 2
    with pytest.raises(DivergedError, match="^step 4 gave a loss of nan .*the update was not made.*guard.max_skips"):
        guard.look(3, bad)


@pytest.mark.parametrize("isolated", [False, True])
def test_isolated_documents_may_have_been_too_many(isolated: bool):
    bad = measured(math.nan, applied=False, norms=(1.0, math.nan))
    with pytest.raises(DivergedError) as error:
        Guard(GuardConfig(max_skips=0), LANES, isolated=isolated).look(0, bad)
    assert ("more of them than FlashAttention has room for" in str(error.value)) == isolated
    assert str(error.value).endswith("set run.attention=flex or sdpa") == isolated


def fed(action: str, losses: list[float]) -> Guard:
    guard = Guard(GuardConfig(max_skips=1, spike_factor=1.5, spike_window=20, spike_action=action), LANES)
    for step, loss in enumerate(losses):
        assert guard.look(step, measured(loss)) is None
    return guard


def test_a_spike_is_measured_against_the_median_of_losses_surely_known():
    """Those of the last steps may or may not have arrived: they never count, so that a repeated run decides alike."""
    losses = [3.0 + 0.01 * step for step in range(40)]
    guard = fed("skip", losses)
    known = losses[18:38]  # step 40 begins when step 37 is read at the latest
    assert guard.limit(40) == pytest.approx(1.5 * (known[9] + known[10]) / 2)
    again = Guard(GuardConfig(max_skips=1, spike_factor=1.5, spike_window=20, spike_action="skip"), LANES)
    again.load_state_dict(guard.state_dict())
    assert again.limit(40) == guard.limit(40)
    assert fed("skip", losses[:5]).limit(5) == math.inf, "too few for a median"


def test_a_short_window_is_full_with_fewer():
    guard = Guard(GuardConfig(max_skips=1, spike_factor=1.5, spike_window=4, spike_action="skip"), LANES)
    for step, loss in enumerate([9.0, 1.0, 2.0, 3.0, 4.0, 99.0, 99.0, 99.0]):
        limit = guard.limit(step)
        guard.look(step, measured(loss))
    assert limit == pytest.approx(1.5 * 2.5), "of the four before those that may not have arrived"


@pytest.mark.parametrize("action", ["warn", "skip", "stop"])
def test_what_becomes_of_a_spike(action: str):
    guard = fed(action, [3.0] * 30)
    assert guard.limit(30) == (math.inf if action == "warn" else 4.5)
    spike = measured(6.0, applied=action == "warn")
    if action == "stop":
        with pytest.raises(DivergedError, match="^step 31 gave a loss of 6.0000, 2.00 times the median") as error:
            guard.look(30, spike)
        assert 'guard.spike_action = "skip"' in str(error.value), "more skips alone would not help"
        return
    line = guard.look(30, spike)
    assert line is not None
    assert "step 31 gave a loss of 6.0000, 2.00 times the median" in line
    assert guard.skipped == (action == "skip")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_skips": -1}, "max_skips = -1"),
        ({"spike_factor": 0.5}, "spike_factor = 0.5 must be above 1"),
        ({"spike_window": 0}, "spike_window = 0"),
        ({"spike_action": "ignore"}, "one of warn, skip, stop"),
        ({"spike_factor": 2.0, "spike_action": "skip"}, "needs max_skips"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GuardConfig(**settings)


def test_a_run_goes_on_after_bad_steps(data_path: Path, tmp_path: Path, monkeypatch):
    """Two lanes of step 3, one of step 5; both are in the log and in the result, and survive a resume."""
    real = train.train_step

    def poisoned(session: Session, plan) -> Tensor:
        plain = session.lane_loss
        if plan.step in (2, 4):
            poison(session, math.nan, 64 if plan.step == 2 else 128)
        found = real(session, plan)
        session.lane_loss = plain
        return found

    monkeypatch.setattr(train, "train_step", poisoned)
    run = tmp_path / "run"
    result = train_run(data_path, run, "guard.max_skips=2", until="train")
    assert (result["steps"], result["skipped_steps"]) == (8, 2)
    log = (run / "log.txt").read_text()
    assert "warning: step 3 gave a loss of nan and a gradient norm of nan in lane 0 (4 x 64 tokens" in log
    assert "lane 1 (4 x 64 tokens" in log
    assert "warning: step 5 gave a loss of nan and a gradient norm of nan in lane 2 (2 x 128 tokens" in log
    assert all(tensor.isfinite().all() for tensor in saved_tensors(run).values())
    with pytest.raises(UserError, match="step 5 gave a loss of nan"):
        train_run(data_path, tmp_path / "other", "guard.max_skips=1", until="train")
    assert result_of(tmp_path / "other")["status"] == "failed"
