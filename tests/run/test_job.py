"""The main job: what a run folder holds when all goes well, and that it can be read when something does not."""

import errno
import json
import math
import os
import shutil
import sys
import time
import tomllib
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from run_helpers import result_of, rows_of, saved_tensors, short, train_run, write_text

from epigram.artifact import container
from epigram.config import load_recipe, parse_config, recipe_names
from epigram.data.dataset import DataFolder, open_data
from epigram.data.shards import write_shard
from epigram.dist.context import Context
from epigram.errors import DataError, UserError
from epigram.evaluation.scorer import score
from epigram.evaluation.windows import Method
from epigram.run import job, setup, train
from epigram.run.describe import describe
from epigram.run.job import _new_folder, run_job
from epigram.run.report.build import build as build_report
from epigram.run.setup import Session
from epigram.run.space import check_memory, needed_bytes, token_memory_bytes
from epigram.run.weights import load_model


def log_of(run: Path) -> list[str]:
    return (run / "log.txt").read_text().splitlines()


def assert_readable(run: Path, reason: str, tmp_path: Path) -> None:
    """`epigram report` makes a page of it that tells the reason."""
    (found,) = build_report([run], tmp_path / "report.html")
    assert found.problems == ()
    assert reason in (tmp_path / "report.html").read_text()


def test_what_a_run_folder_holds(finished: Path, data_path: Path):
    result = result_of(finished)
    assert result["status"] == "finished"
    assert (result["recipe"], result["seed"], result["steps"], result["tokens"]) == ("smoke", 1, 8, 8 * 768)
    assert result["parameters"] == sum(t.numel() for n, t in saved_tensors(finished).items() if n.startswith("model."))
    assert result["data"] == str(data_path.resolve())
    assert result["artifact_bytes"] == (finished / "model.epigram").stat().st_size
    assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"]
    assert sum(row["bytes"] for row in result["sizes"]) == result["artifact_bytes"]
    assert result["cap_bytes"] == 200_000
    assert all(result[key] >= 0 for key in ("setup_s", "warmup_s", "train_s", "calibrate_s", "quantize_s", "pack_s"))
    assert result["step_ms"] == pytest.approx(1000 * result["train_s"] / 8, abs=0.2)
    assert result["sample"].startswith("The")
    assert parse_config(tomllib.loads((finished / "config.toml").read_text())).recipe == "smoke"
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] + sample["text"] for sample in samples] == [result["sample"]]
    assert_readable(finished, "finished", finished.parent)


def test_the_stored_scores_are_those_of_the_file(finished: Path, data):
    """Computed once more, from the file, with another batch size."""
    model, tokens = load_model(finished / "model.epigram", "cpu"), data.stream("val")
    for name, stride in (("blocks", 128), ("sliding", 64)):
        method = Method(name=name, seq_len=128, stride=stride)
        found = score(
            model.gpt.nll, tokens, data.tokenizer.byte_tables(), method, device=torch.device("cpu"), batch_tokens=384,
            expected_bytes=data.split_bytes("val"),
        )  # fmt: skip
        row = result_of(finished)["scores"]["quantized"][name]
        assert row["val_nats"] == pytest.approx(found.val_nats, rel=1e-6)
        assert (row["tokens"], row["bytes"]) == (len(tokens) - 1, data.split_bytes("val"))
        assert row["val_bpb"] == pytest.approx(row["val_nats"] * row["tokens"] / row["bytes"] / math.log(2))
        line = f"final_quantized_{name}_exact val_loss:{row['val_nats']:.8f} val_bpb:{row['val_bpb']:.8f}"
        assert line in log_of(finished)


def test_the_forecast_comes_before_the_training(finished: Path):
    lines = log_of(finished)
    (forecast,) = (line for line in lines if line.startswith("forecast:"))
    assert lines.index(forecast) < next(i for i, line in enumerate(lines) if line.startswith("step:"))
    expected = int(forecast.split("about ")[1].split(" bytes")[0].replace(",", ""))
    assert expected == pytest.approx(result_of(finished)["total_bytes"], rel=0.1)


def test_the_log_begins_with_folder_and_data(finished: Path, data):
    folder, holdings = log_of(finished)[:2]
    assert folder == f"run folder: {finished}"
    train_tokens, val_tokens = len(data.stream("train")), len(data.stream("val"))
    num_bytes = len(data.text("val", val_tokens))
    assert holdings == (
        f"data {data.path.name}: {train_tokens:,} tokens to train on, {val_tokens:,} ({num_bytes:,} bytes of text) "
        "held out for the score"
    )


def test_a_folder_in_use_is_told_before_text_is_built(finished: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(job, "prepare_data", lambda path, config: pytest.fail("text is built"))
    with pytest.raises(UserError, match="is not empty"):
        run_job("smoke", data_path="text.txt", out=finished)


def test_a_forecast_over_the_cap_is_a_warning(data_path: Path, tmp_path: Path):
    settings = ("artifact.cap_bytes=50000", "budget.max_steps=1", "schedule.momentum_warmup_steps=2")
    train_run(data_path, tmp_path / "run", *settings, until="train")
    (warning,) = (line for line in log_of(tmp_path / "run") if line.startswith("warning:"))
    assert "% of the cap of 50,000; the run will probably end over it" in warning


def test_the_table_at_the_end(finished: Path, tmp_path: Path, data):
    """Bytes, both models by each method, and general compressors on the same text."""
    out = tmp_path / "out"
    result = job.export_job(finished, out=out, overrides=["run.compressors=true"], device="cpu")
    lines = log_of(out)
    assert any(f"{result['artifact_bytes']:,} artifact + 0 code = " in line for line in lines)
    for model, methods in result["scores"].items():
        for method, row in methods.items():
            assert any(
                f"epigram, {model} model, {method}" in line and f"{row['val_bpb']:.4f}" in line for line in lines
            )
    rows = {row["label"]: row for row in result["compressors"]}
    text = data.tokenizer.decode_bytes(data.stream("val"))
    assert {row["text_bytes"] for row in rows.values()} == {len(text)} == {data.split_bytes("val")}
    alone = brotli.compress(text, quality=11, lgwin=24)
    (label,) = (label for label in rows if "brotli" in label and "alone" in label)
    assert rows[label]["bpb"] == pytest.approx(8 * len(alone) / len(text), rel=0.02)
    assert any(label in line and f"{rows[label]['bpb']:.4f}" in line for line in lines)


def test_training_alone_and_the_rest_later(data_path: Path, finished: Path, tmp_path: Path):
    result = train_run(data_path, tmp_path / "run", until="train")
    assert result["steps"] == 8
    assert not (tmp_path / "run" / "model.epigram").exists()
    exported = job.export_job(tmp_path / "run", device="cpu")
    assert exported["run"] == str(tmp_path / "run" / "export-1")
    made = tmp_path / "run" / "export-1" / "model.epigram"
    assert made.read_bytes() == (finished / "model.epigram").read_bytes()


def test_validation_on_the_way(data_path: Path, tmp_path: Path, data, monkeypatch):
    lengths, score_split = set(), job.score_split
    monkeypatch.setattr(job, "score_split", lambda *a, **k: lengths.add(a[2].seq_len) or score_split(*a, **k))
    train_run(data_path, tmp_path / "run", "run.val_every=4", "run.val_tokens=300", until="train")
    rows = [row for row in rows_of(tmp_path / "run") if "val_bpb" in row]
    assert [row["step"] for row in rows] == [0, 4]
    assert rows[0]["val_nats"] == pytest.approx(math.log(512), rel=0.02), "before the first step"
    assert rows[1]["val_nats"] < rows[0]["val_nats"] - 0.5
    assert lengths == {short().score.seq_len} != {short().flat_lanes[0].seq_len}, "not that of this process's lanes"


def test_a_codec_whose_library_is_missing_is_told_before_training(data_path: Path, tmp_path: Path, monkeypatch):
    """At the end everything would be done but the file."""
    monkeypatch.delitem(sys.modules, "epigram.artifact.codecs.brotli", raising=False)
    monkeypatch.setitem(sys.modules, "brotli", None)
    monkeypatch.setattr(job, "_train", lambda *_: pytest.fail("it trained"))
    with pytest.raises(UserError, match=r"needs the library 'brotli', .* choose another of entropy, store$"):
        train_run(data_path, tmp_path / "run", "artifact.codec=brotli")


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_left_alone(data_path: Path, finished: Path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is not empty"):
        train_run(data_path, finished)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    first = _new_folder("smoke", Context())
    assert first.parent == Path("runs")
    assert first.name == time.strftime("smoke-%Y%m%d-%H%M%S", time.localtime(1_700_000_000))
    first.mkdir(parents=True)
    second = _new_folder("smoke", Context())
    assert second == first.with_name(first.name + "-2")
    second.mkdir()
    assert _new_folder("smoke", Context()).name == first.name + "-3"


# -- what a user gets wrong -------------------------------------------------------------------------------------------


def test_a_vocabulary_that_does_not_fit(data_path: Path, tmp_path: Path):
    with pytest.raises(UserError, match="vocabulary of 512, the recipe 600: set model.vocab_size=512, or build"):
        train_run(data_path, tmp_path / "run", "model.vocab_size=600")
    assert not (tmp_path / "run").exists()


def test_missing_data(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        train_run(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_shard_of_other_tokens(data_path: Path, tmp_path: Path):
    """An id beyond the vocabulary: on a GPU it would be an assertion somewhere in a kernel."""
    folder = tmp_path / "data"
    shutil.copytree(data_path, folder)
    shard = next(folder.glob("*_train_*.bin"))
    content = bytearray(shard.read_bytes())
    content[1024:] = b"\xff\x7f" * ((len(content) - 1024) // 2)
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"{shard.name} holds the id 32767, beyond the vocabulary of 512"):
        train_run(folder, tmp_path / "run")
    assert result_of(tmp_path / "run")["status"] == "failed"


def test_no_compiler_where_one_is_asked_for(data_path: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs a C"):
        train_run(data_path, tmp_path / "run", "run.compile=on")
    assert not (tmp_path / "run").exists()


# -- what goes wrong on the way ---------------------------------------------------------------------------------------


def in_step(monkeypatch, step: int, happens) -> None:
    real = train.train_step

    def watched(session: Session, plan) -> torch.Tensor:
        if plan.step == step:
            happens(session)
        return real(session, plan)

    monkeypatch.setattr(train, "train_step", watched)


def test_a_shard_cut_short_under_the_run_is_named(data_path: Path, tmp_path: Path, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(data_path, folder)
    shard = next(folder.glob("*_train_*.bin"))
    in_step(monkeypatch, 2, lambda session: os.truncate(shard, 5000))
    run = tmp_path / "run"
    with pytest.raises(DataError, match=f"{shard.name} changed since it was opened"):
        train_run(folder, run)
    result = result_of(run)
    assert (result["status"], shard.name in result["reason"]) == ("failed", True)
    assert len(rows_of(run)) >= 3
    assert_readable(run, shard.name, tmp_path)


def test_ctrl_c(data_path: Path, tmp_path: Path, monkeypatch):
    def interrupt(session: Session) -> None:
        raise KeyboardInterrupt

    in_step(monkeypatch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run(data_path, tmp_path / "run")
    assert result_of(tmp_path / "run")["status"] == "interrupted"
    assert_readable(tmp_path / "run", "stopped by Ctrl-C", tmp_path)


def no_room(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_too_small_is_refused_before_training(data_path: Path, tmp_path: Path, monkeypatch):
    run = tmp_path / "run"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=17_000_000))
    with pytest.raises(UserError, match="has 17,000,000 bytes free, and the run needs 1.*a checkpoint takes 2,"):
        train_run(data_path, run)
    assert result_of(run)["status"] == "failed"
    assert not (run / "checkpoints").exists()


def test_what_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch):
    """A whole lane of h100 took 25 GB and more on a CPU until the system killed the process."""
    whole = "run.micro_tokens=49152"
    monkeypatch.setattr(job, "prepare_data", lambda path, config: pytest.fail("text is built"))
    monkeypatch.setattr("epigram.run.space.memory_bytes", lambda: 16_000_000_000)
    with pytest.raises(
        UserError,
        match=r"49,152 tokens at a time take about \d\d GB of memory .* has 16: set run.micro_tokens=24576 or",
    ):
        run_job("h100", out=tmp_path / "run", overrides=[whole], device="cpu")
    assert not (tmp_path / "run").exists()
    one = ["lanes=[{count=1,seq_len=131072,num_seqs=1}]", "run.micro_tokens=49152"]
    with pytest.raises(UserError, match=r"131,072 tokens at a time .* make the lane's seq_len shorter"):
        check_memory(load_recipe("h100", one), "cpu")
    check_memory(load_recipe("h100", [whole]), "cuda")
    for recipe in ("h100", "pr1212", "demo"):
        check_memory(load_recipe(recipe), "cpu")


def test_a_token_takes_the_memory_that_was_measured():
    """Peak memory of processes with two sizes of lanes, of which the difference is that of their tokens."""
    wide = "model.vocab_size=1024", "model.num_layers=12", "model.model_dim=512", "model.mlp_dim=1536"
    for recipe, settings, measured in (("demo", (), 115_000), ("h100", wide, 761_000)):
        config = load_recipe(recipe, settings)
        assert token_memory_bytes(config.model) == pytest.approx(measured, rel=0.05)


def test_what_a_run_will_write():
    """keep + 1 checkpoints, or as many as there will be; those that are there make way for new ones."""
    config = load_recipe("smoke", ["run.checkpoint_every_s=3", "run.checkpoint_keep=2"])
    rest = needed_bytes(config, 0)
    assert rest > config.artifact.cap_bytes
    assert needed_bytes(config, 1000) == rest + 3000
    assert needed_bytes(config, 1000, existing=2) == rest + 1000
    assert needed_bytes(config, 1000, existing=9) == rest + 1000
    assert (
        needed_bytes(load_recipe("smoke", ["run.checkpoint_every_s=3", "run.checkpoint_keep=0"]), 1000) == rest + 11000
    )
    assert needed_bytes(load_recipe("smoke"), 1000) == rest + 1000


@pytest.mark.parametrize(
    ("kept", "message"),
    [(0, "holds out 0 tokens"), (1, "holds out 1 tokens"), (None, "is not the file that the manifest")],
)
def test_validation_text_that_cannot_be_scored_is_found_before_training(
    data_path: Path, tmp_path: Path, monkeypatch, kept: int | None, message: str
):
    """An empty split, one token, and one token changed for another of other bytes."""
    folder = tmp_path / "data"
    shutil.copytree(data_path, folder)
    data = open_data(folder)
    (shard,), tokens = data.split("val"), data.stream("val")
    if kept is None:
        sizes = data.tokenizer.byte_tables().token_bytes
        tokens[5] = int(np.argmax(sizes != sizes[tokens[5]]))
    write_shard(shard.path, tokens[:kept], "val")
    if kept is not None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["splits"]["val"]["shards"][0]["tokens"] = kept
        (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("trained"))
    with pytest.raises((UserError, DataError), match=message):
        train_run(folder, tmp_path / "run")


def test_a_disk_that_is_full_at_a_checkpoint(data_path: Path, tmp_path: Path, monkeypatch):
    """Between the steps it is a warning and the one before stays; at the end there is nothing to hope for."""
    run = tmp_path / "run"

    def fill_up(session: Session) -> None:
        session.saver.wait()
        monkeypatch.setattr("epigram.run.checkpoint._flush", no_room)

    in_step(monkeypatch, 5, fill_up)
    with pytest.raises(UserError, match="checkpoint of step 8 cannot be written.*No space left on device"):
        train_run(data_path, run, "run.checkpoint_every_s=10")
    assert any(
        "warning: the checkpoint of step 7 cannot be written" in line and line.endswith("training goes on")
        for line in log_of(run)
    )
    assert result_of(run)["status"] == "failed"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert_readable(run, "No space left on device", tmp_path)


def test_a_disk_that_is_full_at_the_artifact(data_path: Path, finished: Path, tmp_path: Path, monkeypatch):
    """The training is not lost: the checkpoint is there, and an export makes up for it."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(container.os, "fsync", no_room_for(".epigram", os.fsync))
        with pytest.raises(UserError, match="No space left on device"):
            train_run(data_path, run)
    assert result_of(run)["status"] == "failed"
    assert not [path for path in run.iterdir() if "epigram" in path.name], "nothing half-written"
    assert_readable(run, "No space left on device", tmp_path)
    job.export_job(run, device="cpu")
    assert (run / "export-1" / "model.epigram").read_bytes() == (finished / "model.epigram").read_bytes()


def no_room_for(part: str, real):
    """`os.fsync` that fails for files with `part` in their names."""

    def fsync(descriptor: int) -> None:
        if part in os.readlink(f"/proc/self/fd/{descriptor}"):
            no_room()
        real(descriptor)

    return fsync


# -- text as data -----------------------------------------------------------------------------------------------------


def test_text_is_built_once_and_kept(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt", 200, seed=3)
    first = train_run(Path("text.txt"), Path("a"), "budget.max_steps=1", until="train")
    built = sorted(Path(".cache/epigram/data").glob("text*"))
    second = train_run(Path("text.txt"), Path("b"), "budget.max_steps=1", until="train")
    assert first["data"] == second["data"] == str(built[0].resolve())
    assert sorted(Path(".cache/epigram/data").glob("text*")) == built
    third = train_run(Path("text.txt"), Path("c"), "data.val_frac=0.2", "budget.max_steps=1", until="train")
    assert third["data"] != first["data"]
    monkeypatch.chdir("/")
    resumed = run_job("", resume=tmp_path / "a", overrides=["budget.max_steps=2"], until="train", device="cpu")
    assert resumed["steps"] == 2, "data are found from another folder too"
    said = "the training of this run is complete: what follows it is done again"
    assert said not in log_of(tmp_path / "a")
    run_job("", resume=tmp_path / "a", overrides=["budget.max_steps=2"], until="train", device="cpu")
    assert said in log_of(tmp_path / "a")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_built(name: str, data: DataFolder, monkeypatch):
    """At its full size: parameters, their groups, averages, attention. Only the windows are small, as the text is."""
    monkeypatch.setattr(setup, "check_fit", lambda config, data: None)
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight, generator: weight.fill_(0.1))  # seconds
    windows = [f"lanes.{i}.{key}" for i in range(len(load_recipe(name).lanes)) for key in ("seq_len=16", "num_seqs=1")]
    session = setup.build_session(load_recipe(name, [*windows, "quant.calibration.seq_len=16"]), data, Context())
    held = sum(p.numel() for p in session.model.parameters())
    state = session.optimizer.state_dict()
    moments = sum(t.numel() for key, t in state.items() if key.startswith("muon.") and "momentum" in key)
    assert moments == sum(bank.numel() for bank in session.model.banks.parameters())
    assert held == describe(load_recipe(name))["parameters"]
    assert set(session.paths) >= {"device", "precision", "compile", "attention", "lanes"}
    session.loader.close()
