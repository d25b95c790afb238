"""`epigram submit`: the folder, its numbers against the runs' own results, and what it refuses."""

import errno
import json
import math
import os
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from record_helpers import ABOUT, CAP, SEEDS
from run_helpers import result_of, train_run

from epigram.errors import UserError
from epigram.run.submission.folder import About, submit
from epigram.run.submission.logs import parse_log, read_log
from epigram.run.submission.requirements import declared, imported, requirements


def test_the_files(good: Path):
    expected = {"README.md", "submission.json", "train_gpt.py", "requirements.txt"}
    expected |= {f"train_seed{seed}.log" for seed in SEEDS} | {f"model_seed{seed}.epigram" for seed in SEEDS}
    assert {path.name for path in good.iterdir()} == expected


def test_every_figure_is_that_of_the_runs(good: Path, runs: list[Path]):
    found, readme = json.loads((good / "submission.json").read_text()), (good / "README.md").read_text()
    code = (good / "train_gpt.py").stat().st_size
    assert found["bytes_code"] == code
    losses = []
    for seed, run in zip(SEEDS, runs, strict=True):
        result, row = result_of(run), found["seed_results"][str(seed)]
        score = result["scores"]["quantized"]["sliding"]
        assert row["val_loss"] == pytest.approx(score["val_nats"], abs=1e-8)
        assert row["val_bpb"] == pytest.approx(score["val_bpb"], abs=1e-8)
        for key in ("steps", "train_s", "calibrate_s", "quantize_s"):
            assert row[key] == result[key], key
        assert row["bytes_total"] == code + (run / "model.epigram").stat().st_size
        assert row["model_sha256"] == result["artifact_sha256"]
        assert row["score_s"] == pytest.approx(sum(r["score_s"] for r in result["scores"]["quantized"].values()))
        losses.append(row["val_loss"])
        line = f"| {seed} | {row['val_loss']:.8f} | {row['val_bpb']:.8f} | {row['steps']:,} | {row['train_s']:.3f} |"
        assert line in readme
        assert (good / f"model_seed{seed}.epigram").read_bytes() == (run / "model.epigram").read_bytes()
    facts = json.loads((runs[0] / "environment.json").read_text())
    assert f"--nproc-per-node {facts['processes']} train_gpt.py" in readme, "as many as the figures were made with"
    assert found["hardware"] == f"1 x {facts['device']['name']}" and facts["device"]["name"] == facts["cpu"]
    assert found["val_loss"] == pytest.approx(statistics.fmean(losses))
    assert found["val_loss_std"] == pytest.approx(statistics.stdev(losses))
    assert found["bytes_total"] == max(row["bytes_total"] for row in found["seed_results"].values())


def test_a_record_to_beat(runs: list[Path], tmp_path: Path):
    found = submit(runs, tmp_path / "r", replace(ABOUT, record_nats=9.0), form="readable", artifacts=False)
    assert found["record"]["p"] < 0.01
    assert "Beats the record of 9.0 nats" in (tmp_path / "r" / "README.md").read_text()
    assert not list((tmp_path / "r").glob("*.epigram"))
    assert found["bytes_code"] > 500_000, "every byte of the readable form counts"


def test_a_run_that_tells_of_no_step(data_path: Path, tmp_path: Path):
    """The number of steps is in the log's last lines."""
    run, out = tmp_path / "run", tmp_path / "record"
    settings = ("seed=1", f"artifact.cap_bytes={CAP}", "run.sample_tokens=0", "run.log_every=0")
    train_run(data_path, run, *settings)
    assert "\nstep:" not in (run / "log.txt").read_text()
    assert submit([run], out, ABOUT)["seed_results"]["1"]["steps"] == 8
    assert "| 8 |" in (out / "README.md").read_text()
    log = run / "log.txt"
    log.write_text(log.read_text().replace("final_times steps:8", "final_times"))
    with pytest.raises(UserError, match="does not say how many steps it took"):
        submit([run], tmp_path / "other", ABOUT)


def test_what_is_refused(runs: list[Path], tmp_path: Path):
    out = tmp_path / "record"

    def refuses(paths: list[Path], match: str, about: About = ABOUT) -> None:
        with pytest.raises(UserError, match=match):
            submit(paths, out, about)
        assert not out.exists(), "nothing half-written"

    refuses([runs[0], runs[0]], "seed 1 comes twice")
    refuses([tmp_path], "is no run folder")
    changed = tmp_path / "changed"
    shutil.copytree(runs[1], changed, ignore=shutil.ignore_patterns("checkpoints"))
    config = (changed / "config.toml").read_text()
    (changed / "config.toml").write_text(config.replace("warmdown_frac = 0.5", "warmdown_frac = 0.4"))
    refuses([runs[0], changed], "has other settings than .*in schedule")
    (changed / "config.toml").write_text(config.replace(f"cap_bytes = {CAP}", "cap_bytes = 150000"))
    refuses([changed], r"does not fit with its code: .* of 150,000; .* --set artifact.over_cap=shrink$")
    with pytest.raises(UserError, match="=shrink, or take --form packed"):
        submit([changed], out, ABOUT, form="readable")
    (changed / "config.toml").write_text(config)
    facts = json.loads((changed / "environment.json").read_text())
    (changed / "environment.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "processes"}))
    refuses([changed], "has no 'processes': the run was made by another release")
    (changed / "environment.json").write_text(json.dumps(facts))
    (changed / "model.epigram").write_bytes(b"another")
    refuses([changed], "is not the file that the run scored")
    result = result_of(runs[1])
    (changed / "result.json").write_text(json.dumps({**result, "total_bytes": 2_000_000}))
    refuses([changed], "is no valid run: artifact and code take too many bytes")
    (changed / "result.json").write_text(json.dumps({**result, "exported_from": "a"}))
    refuses([changed], "in one go")
    with pytest.raises(UserError, match="names its author"):
        About(author=" ", github_id="b")
    for wrong, said in (
        ({"record_nats": math.nan}, "must be a positive number"),
        ({"record_nats": -5.0}, "must be a positive number"),
        ({"date": "2026-13-01"}, "is no day"),
        ({"date": "2999-01-01"}, "has not come yet"),
        ({"github_id": "a b/c@"}, "a GitHub id"),
        ({"author": "A\nB"}, "a name in one line"),
    ):
        with pytest.raises(UserError, match=said):
            replace(ABOUT, **wrong)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        submit(runs, tmp_path / "full", ABOUT)


# -- logs ---------------------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read_only(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), ".out.x")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", read_only)
    with pytest.raises(UserError, match=r"out cannot be written \(Read-only file system\): name another place"):
        submit(runs, tmp_path / "out", ABOUT)


def test_our_log(good: Path, runs: list[Path]):
    facts, result = read_log(good / "train_seed1.log"), result_of(runs[0])
    assert (facts.seed, facts.steps, facts.is_ours) == (1, 8, True)
    assert facts.label == "final_quantized_sliding_exact"
    assert facts.artifact_bytes == result["artifact_bytes"]
    assert facts.spent_s == pytest.approx(sum(result[key] for key in ("train_s", "calibrate_s", "quantize_s")))
    assert facts.calibration["kind"] == "train"
    assert len(facts.losses) == 8


def test_a_log_of_another_script():
    """The lines of parameter-golf's baseline, in which the last final score counts."""
    text = (
        "step:20/20000 train_loss:5.1 train_time:1200ms step_avg:60.0ms\n"
        "step:9000/20000 val_loss:2.0500 val_bpb:1.2150 train_time:599950ms step_avg:66.66ms\n"
        "Serialized model int8+zlib: 15800000 bytes (payload:1 raw_torch:2)\n"
        "Code size: 47642 bytes\n"
        "Total submission size int8+zlib: 15847642 bytes\n"
        "final_int8_zlib_roundtrip val_loss:2.0600 val_bpb:1.2201 eval_time:1395ms\n"
        "final_int8_zlib_roundtrip_exact val_loss:2.06001234 val_bpb:1.22012345\n"
    )
    facts = parse_log(text, "train_seed42.log")
    assert (facts.seed, facts.steps, facts.train_s, facts.score_s) == (42, 9000, 599.95, 1.395)
    assert (facts.artifact_bytes, facts.code_bytes, facts.total_bytes) == (15_800_000, 47_642, 15_847_642)
    assert (facts.val_nats, facts.val_bpb, facts.is_ours) == (2.06001234, 1.22012345, False)
    empty = parse_log("nothing", "train.log")
    assert (empty.val_bpb, empty.spent_s, empty.seed, empty.steps) == (None, None, None, None)


def test_the_number_of_steps():
    """That of the last lines, before whatever step was told of last; that, where they do not say it."""
    told = "step:5/8 train_loss:5.1 train_time:1200ms step_avg:60.0ms\n"
    said = "final_times steps:8 train_s:1.0\n"
    assert parse_log(told + said, "train.log").steps == 8
    assert parse_log(said, "train.log").steps == 8
    assert parse_log(told + "final_times train_s:1.0\n", "train.log").steps == 5
    assert parse_log(told + "final_times steps:0\n", "train.log").steps == 0
    assert parse_log("final_times train_s:1.0\n", "train.log").steps is None


# -- requirements ------------------------------------------------------------------------------------------------------


def test_requirements_are_what_is_imported():
    sources = ["import torch\nfrom tomli_w import dumps\nimport json\n", "def f():\n    import triton.language\n"]
    assert imported("import a.b\nfrom c import d\nfrom . import e\nimport os") == {"a", "c"}
    text = requirements(sources, {"torch": "2.11.0+cu130", "triton": "3.6.0"}, on_gpu=True)
    assert text == "tomli-w>=1.0\ntorch==2.11.0\ntriton==3.6.0\n"
    assert requirements(sources, {"triton": "3.6.0"}, on_gpu=False) == "tomli-w>=1.0\ntorch>=2.9\n"
    assert declared("# x\ntorch==2.9\nTomli_W >= 1\n-r other\n\nflash-attn-4[cu13]>=4\n") == {
        "torch", "tomli-w", "flash-attn-4",
    }  # fmt: skip
    with pytest.raises(UserError, match="does not declare"):
        requirements(["import nobody_declared_this"], {}, on_gpu=False)
