"""A cell, executed for real on a CPU: what it keeps is what the commands of the package find."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.evidence import cell as module
from benchmarks.evidence.cell import EVIDENCE, execute, repack
from benchmarks.evidence.plan import Cell, load_plan
from benchmarks.evidence.runner import _with_path
from epigram.config import load_recipe
from epigram.data.dataset import open_data
from epigram.evaluation.adapt_config import AdaptConfig, LoraConfig
from epigram.run import checkpoint, train
from epigram.run.job import export_job, run_job
from epigram.run.record import LOG
from epigram.run.score import score_model
from epigram.run.weights import load_model

TOY = Path(__file__).parent / "toy.toml"
ROOT = Path(__file__).parents[2]
CELLS = {cell.name: cell for cell in load_plan(TOY).cells}


def run_cell(cell: Cell, base: Path, data: Path, recipe: str = "smoke", **options: Any) -> dict[str, Any]:
    return execute(cell, base / "out" / cell.name, base / "work" / cell.name, str(data), recipe, "cpu", **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    run_cell(CELLS["plain-s1"], folder, data_path)
    repack(folder / "work" / "plain-s1")
    return folder


def rows_of(base: Path, name: str) -> dict[tuple[str, str, str], float]:
    found = json.loads((base / "out" / name / EVIDENCE).read_text())
    assert found["status"] == "finished"
    return {(row["variant"], row["model"], row["score"]): row["val_bpb"] for row in found["rows"]}


def test_scores_are_those_of_the_commands(base: Path, data_path: Path):
    rows, work = rows_of(base, "plain-s1"), base / "work" / "plain-s1"
    sliding = score_model(
        work / "base" / "model.epigram", str(data_path), methods=["sliding"], seq_len=128, stride=64, device="cpu"
    )
    floats = score_model(work / "run", str(data_path), methods=["streaming"], seq_len=128, device="cpu")
    # Batches differ, and with them the order of sums.
    assert rows["base", "quantized", "sliding@128/64"] == pytest.approx(
        sliding["scores"]["sliding"]["val_bpb"], abs=1e-6
    )
    assert rows["base", "float", "streaming@128"] == pytest.approx(floats["scores"]["streaming"]["val_bpb"], abs=1e-6)
    assert {variant for variant, _, _ in rows} == {"base", "nearest", "no-ema"}


def test_what_scores_are_over_is_kept(base: Path, data_path: Path):
    """Bytes that were counted, and those of the whole text."""
    found = json.loads((base / "out" / "plain-s1" / EVIDENCE).read_text())
    entry = open_data(data_path).manifest.splits["val"]
    assert found["text_bytes"] == entry.normalized_bytes
    whole = [row["bytes"] for row in found["rows"] if ":" not in row["score"]]
    assert set(whole) == {entry.normalized_bytes - entry.unknown_bytes}


def test_a_score_that_learns_is_that_of_the_command(base: Path, data_path: Path):
    path = base / "work" / "plain-s1" / "base" / "model.epigram"
    (row,) = module.score_all(path, str(data_path), ["lora@128/64:500"], "cpu", "base", "quantized")
    adapt = AdaptConfig(kind="lora", lora=LoraConfig(chunk_tokens=64))
    expected = score_model(path, str(data_path), seq_len=128, stride=64, max_tokens=500, adapt=adapt, device="cpu")
    found = expected["scores"]["adapted_lora"]
    assert row["val_bpb"] == pytest.approx(found["val_bpb"], abs=1e-6)
    assert abs(found["gain_bpb"]) > 1e-5, "another score than by sliding windows"


def test_what_is_compiled_beforehand(monkeypatch: pytest.MonkeyPatch):
    """Steps of models that there are: here a small one in their place."""
    for settings in module.SHARED:
        load_recipe(module.BASE_RECIPE, settings)
    done: list[dict[str, Any]] = []
    benchmark = module.benchmark

    def small(name: str, *, recipe: str, overrides: list[str], **options: Any) -> None:
        done.append(benchmark(name, recipe="smoke", overrides=[o for o in overrides if "lanes" not in o], **options))

    monkeypatch.setattr(module, "benchmark", small)
    module.compile_shared("cpu")
    assert [result["rows"][0]["name"] for result in done] == ["whole step"] * len(module.SHARED)


def test_the_average_can_be_left_out(base: Path, data_path: Path, tmp_path: Path):
    """`epigram export --set average.mode=none` takes the weights that the last step left."""
    run = base / "work" / "plain-s1" / "run"
    saved = checkpoint.load(run)
    export_job(run, data_path=str(data_path), out=tmp_path / "plain", overrides=['average.mode="none"'], device="cpu")
    packed = load_model(tmp_path / "plain", "cpu").gpt.state_dict()
    plain, averaged = saved.part("model"), saved.part("average.average")
    # Control tensors are stored in half precision, so they tell the two apart to 1e-3.
    name = min((n for n in plain if plain[n].dim() == 1), key=lambda n: -(plain[n] - averaged[n]).abs().max().item())
    assert torch.allclose(packed[name].float(), plain[name].float(), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(packed[name].float(), averaged[name].float(), rtol=1e-3, atol=1e-6)
    rows = rows_of(base, "plain-s1")
    assert rows["no-ema", "float", "blocks@64"] != rows["base", "float", "blocks@64"]


def test_sizes_by_codec_are_those_of_an_export(base: Path, data_path: Path, tmp_path: Path):
    result = json.loads((base / "out" / "plain-s1" / "result.json").read_text())
    run = base / "work" / "plain-s1" / "run"
    for codec in ("entropy", "brotli"):
        settings = [f'artifact.codec="{codec}"']
        exported = export_job(run, data_path=str(data_path), out=tmp_path / codec, overrides=settings, device="cpu")
        assert result["codecs"][codec]["artifact_bytes"] == exported["artifact_bytes"]


def test_what_is_kept_is_small_and_names_no_place(base: Path, data_path: Path):
    files = [path for path in (base / "out" / "plain-s1").rglob("*") if path.is_file()]
    assert {"config.toml", "result.json", "environment.json", "log.txt", EVIDENCE} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 100_000
    for path in files:
        if path.suffix != ".f64":
            text = path.read_text("utf-8")
            assert not [place for place in (str(data_path), str(base), str(ROOT)) if place in text], path


def test_a_run_repeats_from_its_config(base: Path, data_path: Path):
    """With counted steps to the last digit: the same weights, so the same scores."""
    found = run_cell(CELLS["again-s1"], base, data_path, str(base / "out" / "plain-s1" / "config.toml"))
    again = {(row["model"], row["score"]): row["val_bpb"] for row in found["rows"]}
    first = {key[1:]: value for key, value in rows_of(base, "plain-s1").items() if key[0] == "base"}
    assert again == {key: first[key] for key in again}
    assert len(again) == 2


def test_a_run_replays_its_clock(base: Path, data_path: Path, tmp_path: Path):
    """On another machine the wall clock would give other steps: the recorded one gives the same."""
    kept = base / "out" / "plain-s1"
    settings = ['budget.clock="replay"', "budget.steps=0", f'budget.replay="{kept}"']
    config = str(kept / "config.toml")
    run_job(config, data_path=str(data_path), out=tmp_path / "run", overrides=settings, until="train", device="cpu")
    once, again = checkpoint.load(base / "work" / "plain-s1" / "run"), checkpoint.load(tmp_path / "run")
    assert once.state["step"] == again.state["step"] == 8
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in once.tensors.items())


def test_a_whole_job_pauses_and_goes_on(data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGTERM in training leaves a checkpoint; the next call ends with the scores of a run that was never stopped."""
    cell, once, paused = CELLS["whole-s1"], tmp_path / "once", tmp_path / "paused"
    run_cell(cell, once, data_path)
    train_step = train.train_step

    def stopped(session: Any, plan: Any) -> torch.Tensor:
        if plan.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(session, plan)

    monkeypatch.setattr(train, "train_step", stopped)
    assert run_cell(cell, paused, data_path)["status"] == "paused"
    assert "step:3/" in (paused / "out" / "whole-s1" / LOG).read_text("utf-8"), "how far it came"
    monkeypatch.undo()
    run_cell(cell, paused, data_path, resume=True)
    assert rows_of(paused, "whole-s1") == rows_of(once, "whole-s1")


def test_a_cell_that_was_ended_after_training_goes_on(data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the midst of its variants: the training is not made again, and every score is there once."""
    monkeypatch.setattr(module, "export_job", fails_at("nearest", export_job))
    with pytest.raises(KeyboardInterrupt):
        run_cell(CELLS["plain-s1"], tmp_path, data_path)
    monkeypatch.setattr(module, "export_job", export_job)
    steps: list[int] = []
    monkeypatch.setattr(train, "train_step", lambda session, plan: steps.append(plan.step))
    found = run_cell(CELLS["plain-s1"], tmp_path, data_path, resume=True)
    assert not steps
    keys = [(row["variant"], row["model"], row["score"]) for row in found["rows"]]
    assert len(keys) == len(set(keys)) and {key[0] for key in keys} == {"base", "nearest", "no-ema"}


def fails_at(name: str, job: Callable[..., Any]) -> Callable[..., Any]:
    """`job`, which ends as by a signal once it has made the variant `name`."""

    def export(run: Path, *, out: Path, **options: Any) -> Any:
        job(run, out=out, **options)
        if out.name == name:
            raise KeyboardInterrupt

    return export


@pytest.mark.slow
def test_the_commands(data_path: Path, tmp_path: Path):
    """The runner with its real processes: a run, one that fails, and the sizes that are found beside."""
    command = [sys.executable, "-m", "benchmarks.evidence", "run", "--plan", str(TOY), "--device", "cpu"]
    command += ["--data", f"toy={data_path}", "--seconds", "200", "--only", "plain-s1", "--only", "diverges"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--archive", str(tmp_path / "a.tgz")]
    done = subprocess.run(
        command, cwd=ROOT, env=_with_path({**os.environ, "OMP_NUM_THREADS": "1"}), capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "finished 1, failed 1: diverges-s1337" in done.stdout
    assert "plain-s1: sizes by codec found" in done.stdout
    failed = json.loads((tmp_path / "out" / "diverges-s1337" / EVIDENCE).read_text())
    assert failed["status"] == "failed"
    assert "DivergedError" in failed["reason"]
    assert not (tmp_path / "work" / "plain-s1").exists()  # models and checkpoints are large


@pytest.mark.slow
def test_a_command_that_is_ended_leaves_results_and_no_process(data_path: Path, tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.evidence", "run", "--plan", str(TOY), "--device", "cpu"]
    command += ["--data", f"toy={data_path}", "--seconds", "200", "--only", "plain-s1"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--archive", str(tmp_path / "a.tgz")]
    runner = subprocess.Popen(command, cwd=ROOT, env=_with_path({**os.environ}), stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    lines = iter(runner.stdout.readline, "")
    assert any("plain-s1 starts" in line for line in lines)
    runner.terminate()
    # The pipe is closed when the last process that holds it has ended.
    said = "".join(lines)
    assert runner.wait(30) == 143
    assert "cut off by the end of the time: plain-s1" in said
    assert json.loads((tmp_path / "out" / "plain-s1" / EVIDENCE).read_text())["status"] == "cut"
    with tarfile.open(tmp_path / "a.tgz") as tar:
        assert f"out/plain-s1/{EVIDENCE}" in tar.getnames()
