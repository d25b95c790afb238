"""The warm-up runs all that the run will use, and leaves nothing behind."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from run_helpers import assert_same_training, make_session, train_run
from torch import Tensor
from torch._dynamo.utils import counters

from epigram import progress
from epigram.data.dataset import DataFolder
from epigram.run import budget, warmup
from epigram.run.setup import Session, state_of
from epigram.run.train import plan_step, train_step
from epigram.run.warmup import state_hash, warm_up

ONE_LAYER = (
    "model.num_layers=1", "model.window_layers=[]", "model.xsa_layers=[]", "model.value_embed_layers=[]",
    "model.backout_layer=-1", "model.bigram_buckets=0", "model.smear=false", "model.skips=none", "model.rotary_dim=0",
    "lanes=[{count=1, seq_len=32, num_seqs=2}]", "quant.calibration.seq_len=32", "schedule.mile_peak=0",
)  # fmt: skip


def all_of(session: Session) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": t.detach().clone() for part, named in state_of(session).items() for name, t in named.items()
    }


def test_everything_is_as_before(session: Session):
    session.loader.next_step()  # somewhere in the middle
    train_step(session, plan_step(session, 0.0))
    tensors, loader, random = all_of(session), session.loader.state_dict(), torch.random.get_rng_state()
    hashed = state_hash(session)
    warm_up(session)
    assert state_hash(session) == hashed
    after = all_of(session)
    assert after.keys() == tensors.keys()
    assert all(after[name].equal(tensors[name]) for name in tensors)
    assert session.loader.state_dict() == loader
    assert torch.random.get_rng_state().equal(random)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_shows_progress(session: Session, rank: int, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    monkeypatch.setattr(session, "context", replace(session.context, rank=rank))
    warm_up(session)
    assert ("warm-up (1 of " in capsys.readouterr().err) == (rank == 0)


def test_random_numbers_that_it_draws_are_drawn_again(session: Session, monkeypatch):
    """A compiler's autotuning may draw some."""
    plain, random = session.lane_loss, torch.random.get_rng_state()
    monkeypatch.setattr(session, "lane_loss", lambda *a: plain(*a) + 0 * torch.rand(()))
    warm_up(session)
    assert torch.random.get_rng_state().equal(random)


def test_a_run_is_the_same_without_it(data_path: Path, finished: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("epigram.run.job.warm_up", lambda session: None)
    train_run(data_path, tmp_path / "cold", until="train")
    assert_same_training(tmp_path / "cold", finished)


@pytest.mark.parametrize("place", ["model", "optimizer", "average"])
def test_the_hash_sees_one_changed_bit_anywhere(session: Session, place: str):
    before = state_hash(session)
    for tensor in state_of(session)[place].values():
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        flat[-1] ^= 1
        assert state_hash(session) != before
        flat[-1] ^= 1
    assert state_hash(session) == before


def test_the_hash_sees_the_loader_the_random_state_and_gradients(session: Session):
    seen = {state_hash(session)}
    session.loader.next_step()
    seen.add(state_hash(session))
    torch.rand(1)
    seen.add(state_hash(session))
    session.model.embed.grad = torch.zeros_like(session.model.embed)
    seen.add(state_hash(session))
    assert len(seen) == 4


def leak_a_window(session: Session, monkeypatch) -> None:
    update = session.average.set_weight
    monkeypatch.setattr(session.average, "set_weight", lambda *a: (session.loader.next_step(), update(*a)))


def leak_a_gradient(session: Session, monkeypatch) -> None:
    monkeypatch.setattr(session.optimizer, "zero_grad", lambda: None)


def leak_a_moment(session: Session, monkeypatch) -> None:
    restore = warmup._restore

    def all_but_the_optimizer(session, saved):
        moments = {name: t.clone() for name, t in session.optimizer.state_dict().items()}
        restore(session, saved)
        for name, tensor in session.optimizer.state_dict().items():
            tensor.copy_(moments[name])

    monkeypatch.setattr(warmup, "_restore", all_but_the_optimizer)


@pytest.mark.parametrize("leak", [leak_a_window, leak_a_gradient, leak_a_moment])
def test_a_warm_up_that_leaks_is_caught(session: Session, monkeypatch, leak):
    leak(session, monkeypatch)
    with pytest.raises(AssertionError, match="left a trace"):
        warm_up(session)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_every_shape_and_phase_is_exercised_before_the_clock(data: DataFolder, monkeypatch, threshold: float):
    """With the shapes, types and phases of the training that follows, so that nothing is compiled on the clock."""
    session = make_session(data, f"schedule.qat_threshold={threshold}")
    calls: list[tuple] = []
    plain = session.lane_loss

    def watched(tokens, targets, gamma, floor, transform):
        facts = [(x.shape, x.stride(), x.dtype) for x in (tokens, targets, gamma)]
        calls.append((*facts, floor, transform is not None))
        return plain(tokens, targets, gamma, floor, transform)

    monkeypatch.setattr(session, "lane_loss", watched)
    warm_up(session)
    warmed = set(calls)
    assert len(warmed) == (2 if threshold else 1) * 2  # two lengths
    calls.clear()
    for elapsed_s in (0.0, 29.9):
        train_step(session, plan_step(session, elapsed_s))
    assert set(calls) == warmed
    session.loader.close()


def test_it_comes_before_the_clock(session: Session, monkeypatch):
    monkeypatch.setattr(budget.WallClock, "start", lambda self, elapsed_s=0.0: pytest.fail("the clock runs"))
    warm_up(session)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_late_qat_acts(data: DataFolder, monkeypatch, backend: str):
    """What was a no-op in #315 and #1212: after the toggle the compiled loss changes, and is that of eager QAT."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    torch.compiler.reset()
    counters.clear()
    session = make_session(data, *ONE_LAYER, "run.compile=on", "quant.grid.matrix_bits=4")
    for bank in session.model.banks.parameters():  # some begin at zero, which has no rounding error
        torch.nn.init.normal_(bank, std=0.1, generator=torch.Generator().manual_seed(1))
    warm_up(session)
    compiled_graphs = counters["stats"]["unique_graphs"]
    batch = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(2))

    def compiled(transform):
        return session.lane_loss(batch[:, :-1], batch[:, 1:], None, 0.2, transform)

    def gradients_of(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(session.model.parameters())))

    plain, quantized, again = compiled(None), compiled(session.quantized), compiled(None)
    assert counters["stats"]["unique_graphs"] == compiled_graphs == 2, "compiled in the warm-up, and only there"
    eager = session.model.loss(batch[:, :-1], batch[:, 1:], None, 0.2, session.quantized)
    torch.testing.assert_close(quantized, eager, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients_of(quantized), gradients_of(eager), rtol=1e-3, atol=1e-6)
    assert abs(float(quantized.detach() - plain.detach())) > 1e-3
    assert plain.equal(again)
    session.loader.close()


def test_more_shapes_than_torch_compiles_unasked(data: DataFolder, monkeypatch):
    """torch gives up in silence after eight graphs of one function."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    lanes = ", ".join(f"{{count=1, seq_len={8 * n}, num_seqs=1}}" for n in range(1, 10))
    one_layer = [setting for setting in ONE_LAYER if not setting.startswith("lanes")]
    session = make_session(data, *one_layer, f"lanes=[{lanes}]", "run.compile=on", "schedule.qat_threshold=0")
    warm_up(session)
    assert counters["stats"]["unique_graphs"] == 9
    session.loader.close()
