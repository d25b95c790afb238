"""A checkpoint is whole or absent, and a run goes on from it as if nothing had happened."""

import errno
import json
import os
import re
import shutil
import threading
import tomllib
from pathlib import Path

import pytest
import torch
from run_helpers import assert_same_training, losses_of, result_of, saved_tensors, train_run
from safetensors import SafetensorError

from epigram.errors import UserError
from epigram.run import checkpoint, job, train
from epigram.run.budget import read_clock
from epigram.run.checkpoint import Saver, complete, load
from epigram.run.job import run_job
from epigram.run.record import RunRecord
from epigram.run.setup import Session
from epigram.run.train import resume, save_checkpoint

STATE = {"step": 1, "times_s": [0.0], "trained_s": 0.5, "loader": {"seed": 1}, "facts": {"recipe": "x"}}
TENSORS = "shard-00001-model-00001-of-00001.safetensors"


def parts(value: float) -> dict:
    return {
        "model": {"a.b": torch.full((3, 2), value), "c": torch.tensor(value), "half": torch.ones(2, dtype=torch.half)},
        "random": {"cpu": torch.arange(5, dtype=torch.uint8), "none": torch.empty(0)},
        "average": {},
    }


def save_at(run: Path, step: int, keep: int = 2) -> Path:
    """The checkpoint of `step`, when it is written."""
    saver = Saver()
    try:
        saver.save(run, step, parts(float(step)), {**STATE, "step": step}, keep)
        saver.wait()
    finally:
        saver.close()
    return complete(run)[-1]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def no_room(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room_in_safetensors(*arguments: object, **options: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_what_is_saved_is_loaded(tmp_path: Path):
    found = load(save_at(tmp_path, 7))
    assert found.state == {**STATE, "step": 7}
    for part, named in parts(7.0).items():
        loaded = found.part(part)
        assert loaded.keys() == named.keys()
        for name, tensor in named.items():
            assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
            assert loaded[name].equal(tensor)


def test_nothing_in_it_is_a_pickle(tmp_path: Path):
    """Whoever loads a checkpoint of somebody else executes nothing."""
    assert sorted(path.name for path in save_at(tmp_path, 7).iterdir()) == [TENSORS, "state.json"]


def test_the_state_is_that_of_the_moment_of_saving(tmp_path: Path):
    """Training goes on while the files are written."""
    live, saver, writing = parts(1.0), Saver(), threading.Event()
    saver._thread.submit(writing.wait)  # what was handed in waits its turn
    saver.save(tmp_path, 1, live, STATE, 2)
    live["model"]["a.b"].fill_(5.0)
    assert not complete(tmp_path)
    writing.set()
    saver.wait()
    saver.close()
    assert load(tmp_path).part("model")["a.b"].equal(torch.full((3, 2), 1.0))


def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path: Path):
    for step in (8, 9, 10, 100):
        save_at(tmp_path, step)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    assert load(tmp_path).state["step"] == 100
    assert load(tmp_path / "checkpoints" / "step-00000010").state["step"] == 10
    save_at(tmp_path, 101, keep=0)
    assert len(complete(tmp_path)) == 3


@pytest.mark.parametrize("ends", ["state", "rename", "kept"])
def test_a_run_that_ends_while_writing_leaves_whole_ones(tmp_path: Path, monkeypatch, ends: str):
    """Between the files, between writing and renaming, and in the midst of dropping old ones."""
    save_at(tmp_path, 1)

    class Killed(BaseException):
        pass

    def killed(*arguments: object, **options: object) -> None:
        raise Killed

    places = {"state": (Path, "write_text"), "rename": (os, "replace"), "kept": (checkpoint.shutil, "rmtree")}
    with monkeypatch.context() as patch:
        patch.setattr(*places[ends], killed)
        with pytest.raises(Killed):
            save_at(tmp_path, 2, keep=1)
    assert load(tmp_path).state["step"] == (2 if ends == "kept" else 1)
    assert len(complete(tmp_path)) == 1
    save_at(tmp_path, 3, keep=2)
    assert names(tmp_path) == [f"step-0000000{2 if ends == 'kept' else 1}", "step-00000003"]


def test_what_a_killed_run_left_is_no_checkpoint_and_goes(tmp_path: Path):
    save_at(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoints/step-00000001", tmp_path / "checkpoints/.writing-00000002")
    assert load(tmp_path).state["step"] == 1
    save_at(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize(
    ("place", "error"),
    [(("safetensors.torch.save",), no_room_in_safetensors), ((Path, "write_text"), no_room), ((os, "fsync"), no_room)],
)
def test_a_full_disk_is_named_and_leaves_the_old_one(tmp_path: Path, monkeypatch, place, error):
    save_at(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(*place, error)
        with pytest.raises(UserError, match="step 2 cannot be written.*No space left on device"):
            save_at(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert load(tmp_path).part("model")["c"] == 1.0


def test_after_a_failure_the_next_one_can_be_written(tmp_path: Path, monkeypatch):
    saver = Saver()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        saver.save(tmp_path, 1, parts(1.0), STATE, 2)
        with pytest.raises(UserError, match="No space left"):
            saver.wait()
    saver.save(tmp_path, 2, parts(2.0), {**STATE, "step": 2}, 2)
    saver.wait()
    saver.close()
    assert names(tmp_path) == ["step-00000002"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    save_at(tmp_path, 5)
    saver = Saver()
    saver.save(tmp_path, 5, parts(-1.0), {**STATE, "step": 5}, keep=1)
    saver.wait()
    saver.close()
    assert names(tmp_path) == ["step-00000005"]
    assert load(tmp_path).part("model")["c"] == -1.0


def test_one_that_is_replaced_and_cannot_be_removed_costs_nothing(tmp_path: Path, monkeypatch):
    """As on a network file system, while somebody reads it."""
    save_at(tmp_path, 5)
    real = shutil.rmtree

    def in_use(path: Path, ignore_errors: bool = False) -> None:
        if path.exists() and path.name == ".writing-before":
            if not ignore_errors:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            return
        real(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", in_use)
        save_at(tmp_path, 5)
    assert load(tmp_path).state["step"] == 5
    save_at(tmp_path, 6)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_where_the_new_one_cannot_have_its_name_the_old_one_keeps_it(tmp_path: Path, monkeypatch):
    save_at(tmp_path, 5)
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(source).name == ".writing-00000005":
            no_room()
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(UserError, match="what was written before is complete"):
            save_at(tmp_path, 5)
    assert load(tmp_path).state["step"] == 5


def test_one_that_makes_way_while_it_is_read_gives_the_next(tmp_path: Path, monkeypatch):
    save_at(tmp_path, 5)
    real = checkpoint._crc

    def late(path: Path) -> int:
        if path.parent.name == "step-00000005":
            monkeypatch.setattr(checkpoint, "_crc", real)
            save_at(tmp_path, 6, keep=1)
        return real(path)

    monkeypatch.setattr(checkpoint, "_crc", late)
    assert load(tmp_path).state["step"] == 6
    save_at(tmp_path, 7, keep=1)
    with pytest.raises(UserError, match="is damaged"):  # asked for by its own name
        load(tmp_path / "checkpoints/step-00000006")
    (tmp_path / "checkpoints/step-00000008").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="step-00000008 is damaged"):  # nothing newer will come for it
        load(tmp_path)


@pytest.mark.parametrize("file", [TENSORS, "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "bit"])
def test_a_damaged_one_is_named(tmp_path: Path, file: str, damage: str):
    path = save_at(tmp_path, 1) / file
    if damage == "gone":
        path.unlink()
    elif damage == "bit":
        whole = bytearray(path.read_bytes())
        whole[-1] ^= 1  # of a weight, or the last bracket
        path.write_bytes(whole)
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-5])
    with pytest.raises(UserError, match="step-00000001 is damaged .*remove it"):
        load(tmp_path)


@pytest.mark.parametrize("state", [[], {}, {"step": 1}])
def test_a_state_of_another_kind_is_refused(tmp_path: Path, state: object):
    (save_at(tmp_path, 1) / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="damaged .*not what this release writes"):
        load(tmp_path)


def test_no_checkpoint_at_all(tmp_path: Path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        load(tmp_path)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        load(tmp_path / "nowhere")


# -- going on ---------------------------------------------------------------------------------------------------------


def interrupt_in_step(monkeypatch, step: int) -> None:
    """Ctrl-C in the midst of a step, between two parts of the update."""
    real = train.train_step

    def interrupted(session: Session, plan) -> torch.Tensor:
        if plan.step == step:
            session.average.apply = lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
        return real(session, plan)

    monkeypatch.setattr(train, "train_step", interrupted)


def go_on(run: Path, *overrides: str, **options) -> dict:
    return run_job("", resume=run, overrides=overrides, device="cpu", **options)


@pytest.mark.parametrize("clock", ["steps", "replay"])
def test_a_resumed_run_is_the_uninterrupted_one(data_path: Path, finished: Path, tmp_path: Path, monkeypatch, clock):
    """Late QAT begins behind the checkpoint; the data are found again without being named."""
    settings = ["run.checkpoint_every_s=10"]
    if clock == "replay":
        settings += ["budget.clock=replay", "budget.steps=0", f"budget.replay={finished}"]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            train_run(data_path, run, *settings)
    assert result_of(run)["status"] == "interrupted"
    assert [path.name for path in complete(run)] == ["step-00000004"]
    result = go_on(run)
    assert (result["steps"], result_of(run)["status"]) == (8, "finished")
    assert_same_training(run, finished)
    assert (run / "model.epigram").read_bytes() == (finished / "model.epigram").read_bytes()
    assert (
        result["scores"]["quantized"]["sliding"]["val_nats"]
        == (result_of(finished)["scores"]["quantized"]["sliding"]["val_nats"])
    )
    assert losses_of(run)[:6] + losses_of(run)[8:] == losses_of(finished), "steps 5 and 6 were taken twice"
    assert read_clock(run) == read_clock(finished)


def test_a_finished_run_goes_on_from_its_weights_not_from_their_average(
    data_path: Path, finished: Path, tmp_path: Path
):
    run = tmp_path / "run"
    train_run(data_path, run, "budget.max_steps=5", until="train")
    go_on(run, "budget.max_steps=0", until="train")
    assert_same_training(run, finished)


def test_resuming_at_the_end_takes_no_step(data_path: Path, tmp_path: Path):
    """The time of the last step counts: on a wall clock there is none left either."""
    run = tmp_path / "run"
    wall = ("budget.clock=wall", "budget.steps=0", "budget.train_s=0.9", "budget.calibrate_s=0.5")
    train_run(data_path, run, *wall, until="train")
    before, first = saved_tensors(run), result_of(run)
    assert first["train_s"] >= 0.4
    go_on(run, until="train")
    after = result_of(run)
    assert after["steps"] == first["steps"]
    assert after["train_s"] == pytest.approx(first["train_s"], abs=0.05)
    assert all(tensor.equal(before[name]) for name, tensor in saved_tensors(run).items())


@pytest.mark.parametrize(
    "setting", ["optim.muon.lr_early=0.5", "budget.steps=5", "average.decay=0.5", "guard.max_skips=1"]
)
def test_what_no_step_was_taken_with_does_not_come_into_the_record(finished: Path, tmp_path: Path, setting: str):
    """Else a score could be told of a training that never was. What comes after it may change."""
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "config.toml").read_bytes()
    name = re.escape(setting.partition("=")[0])
    with pytest.raises(UserError, match=rf"the training of this run is complete \({name}\): train one"):
        go_on(run, setting)
    assert (run / "config.toml").read_bytes() == before
    assert result_of(run)["status"] == "finished"
    assert go_on(run, "quant.grid.floor=0.5", "score.methods=['blocks']", "run.log_every=3")["steps"] == 8


def test_the_time_of_both_parts_counts(data_path: Path, tmp_path: Path):
    run = tmp_path / "run"
    train_run(data_path, run, "budget.max_steps=4", until="train")
    first_s = result_of(run)["train_s"]
    go_on(run, "budget.max_steps=0", until="train")
    assert result_of(run)["train_s"] > first_s
    assert result_of(run)["step_ms"] == pytest.approx(1000 * result_of(run)["train_s"] / 8, abs=0.2)


def test_checkpoints_keep_their_distance_after_resuming(data_path: Path, tmp_path: Path):
    """Not one a step until the next date, counted from the beginning, is caught up with."""
    run = tmp_path / "run"
    settings = ("run.checkpoint_every_s=7.5", "run.checkpoint_keep=0")
    train_run(data_path, run, *settings, "budget.max_steps=5", until="train")
    assert names(run) == ["step-00000003", "step-00000005"]
    go_on(run, "budget.max_steps=0", until="train")
    assert names(run) == ["step-00000003", "step-00000005", "step-00000008"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=2", "seed changed"),
        ("lanes.0.num_seqs=8", "lanes changed"),
        ("model.mlp_dim=256", "does not fit this model.*banks.up"),
        ("average.mode=none", "a run without averaging"),
        ("model.nonsense=1", "unknown key"),
    ],
)
def test_another_recipe_cannot_be_gone_on_with(finished: Path, tmp_path: Path, change: str, message: str):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        go_on(run, change)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_data_are_refused(finished: Path, data_path: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(data_path, other)
    shard = next(other.glob("*_train_*.bin"))
    content = bytearray(shard.read_bytes())
    content[1024:1026] = b"\1\0" if content[1024:1026] != b"\1\0" else b"\2\0"
    shard.write_bytes(content)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with pytest.raises(UserError, match="shards changed since the checkpoint"):
        go_on(run, data_path=str(other))


def test_no_run_to_go_on_with(finished: Path, tmp_path: Path):
    with pytest.raises(UserError, match="is no run folder: it has no config.toml"):
        go_on(tmp_path / "nowhere")
    shutil.copy(finished / "config.toml", tmp_path)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        go_on(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_a_run_that_went_on_elsewhere_meanwhile_is_left_alone(
    data_path: Path, finished: Path, tmp_path: Path, monkeypatch
):
    """The first process of a run was told to stop, and wrote a checkpoint after the second had read the one before."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    real = job.resume_session

    def late(session: Session, saved: checkpoint.Checkpoint) -> None:
        real(session, saved)
        save_at(run, 9)

    monkeypatch.setattr(job, "resume_session", late)
    before = (run / "result.json").read_bytes()
    with pytest.raises(UserError, match="went on from step 8 to 9 in another process, .*: resume again"):
        go_on(run, "budget.steps=12")
    assert (run / "result.json").read_bytes() == before


def test_results_of_before_are_forgotten(data_path: Path, finished: Path, tmp_path: Path, monkeypatch):
    """A run that is resumed and ends early must not show the score of the model that it had."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    interrupt_in_step(monkeypatch, 8)
    assert (run / "model.epigram").exists()
    with pytest.raises(KeyboardInterrupt):
        go_on(run, "budget.steps=12")
    assert not (run / "model.epigram").exists(), "it would be scored as the run's model"
    assert "scores" not in result_of(run)
    assert "total_bytes" not in result_of(run)
    assert tomllib.loads((run / "config.toml").read_text())["budget"]["steps"] == 12


def test_a_clock_that_cannot_be_written_costs_no_training(session: Session, record: RunRecord, monkeypatch, capsys):
    monkeypatch.setattr(Path, "write_bytes", no_room)
    save_checkpoint(session, record)
    session.saver.wait()
    assert load(record.folder).state["step"] == session.step
    assert "warning: clock.f64 cannot be written" in capsys.readouterr().err
    assert not list(record.folder.glob(".clock*"))


def test_a_checkpoint_holds_what_an_export_needs(session: Session, record: RunRecord):
    record.update(recipe="smoke", seed=1, parameters=5, data="/d", warmup_s=1.0, scores={"old": {}})
    session.trained_s, session.step, session.times_s = 2.0, 4, [0.0, 0.5, 1.0, 1.5]
    save_checkpoint(session, record)
    session.saver.wait()
    assert load(record.folder).state["facts"] == {
        "recipe": "smoke", "seed": 1, "parameters": 5, "data": "/d", "warmup_s": 1.0,
        "train_s": 2.0, "steps": 4, "tokens": 4 * 768, "step_ms": 500.0, "skipped_steps": 0,
    }  # fmt: skip
    session.trained_s, session.step, session.times_s = 0.0, 0, []
    resume(session, load(record.folder))
    assert (session.trained_s, session.step, session.times_s) == (2.0, 4, [0.0, 0.5, 1.0, 1.5])
