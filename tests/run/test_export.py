"""The steps after training: calibrate, quantize, pack, read back, score; and what happens when a limit is exceeded."""

import json
import math
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import result_of, short, write_text

from epigram import progress
from epigram.artifact import tensors as artifact
from epigram.data.build import build
from epigram.data.dataset import DataFolder
from epigram.dist.context import Context
from epigram.errors import ArtifactError, UserError
from epigram.quantized import QuantizedTensor
from epigram.run import export, fit, job
from epigram.run.export import calibration_batches, left_to_quantize_s, over_budget
from epigram.run.job import OverBudgetError, export_job
from epigram.run.weights import load_model


def export_run(run: Path, out: Path, *overrides: str, **options) -> dict:
    return export_job(run, out=out, overrides=overrides, device="cpu", **options)


def test_other_settings_from_the_same_checkpoint(finished: Path, tmp_path: Path):
    result = export_run(finished, tmp_path / "out", "quant.method=rtn", "artifact.codec=brotli")
    first = result_of(finished)
    held = artifact.inspect(tmp_path / "out" / "model.epigram").contents
    assert held["codec"] == "brotli"
    assert held["provenance"]["kind"] == "none"
    assert {row["method"] for row in result["quantization"]} == {"rtn", "float16"}
    assert {row["method"] for row in first["quantization"]} == {"gptq", "rtn", "float16"}
    assert result["scores"]["float"]["blocks"]["val_nats"] == first["scores"]["float"]["blocks"]["val_nats"]
    assert result["scores"]["quantized"] != first["scores"]["quantized"]
    for key in ("recipe", "seed", "parameters", "data", "train_s", "steps", "tokens"):
        assert result[key] == first[key], key
    assert result["exported_from"] == str(finished.resolve())
    config = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert (config["quant"]["method"], config["artifact"]["codec"], config["recipe"]) == ("rtn", "brotli", "smoke")
    assert result_of(tmp_path / "out")["status"] == "finished"


def test_the_same_settings_give_the_same_file(finished: Path, tmp_path: Path):
    export_run(finished, tmp_path / "out")
    assert (tmp_path / "out" / "model.epigram").read_bytes() == (finished / "model.epigram").read_bytes()


def test_processes_calibrate_on_all_windows(finished: Path, data: DataFolder, monkeypatch):
    """Each reads its share, and what they saw is added up: the second process here, then the first."""
    config = short("quant.calibration.num_windows=6")
    model = load_model(finished, "cpu").gpt
    sent: list[torch.Tensor] = []

    def hessians(context: Context) -> dict[str, torch.Tensor]:
        return export.calibrate(model, config, calibration_batches(model, config, data, context), context)

    whole = hessians(Context())
    monkeypatch.setattr(export.collectives, "summed", lambda context, tensor: sent.append(tensor.clone()) or tensor)
    hessians(Context(rank=1, world_size=2))
    received = iter(sent)
    monkeypatch.setattr(export.collectives, "summed", lambda context, tensor: tensor.add_(next(received)))
    shared = hessians(Context(world_size=2))
    assert shared.keys() == whole.keys()
    for name, hessian in whole.items():
        torch.testing.assert_close(shared[name], hessian, rtol=1e-4, atol=1e-4 * float(hessian.abs().max()), msg=name)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_shows_progress(finished: Path, data: DataFolder, rank: int, monkeypatch, capsys):
    """One process stands for each of several at the same work."""
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    context = Context(rank=rank)
    model = load_model(finished, "cpu", shown=context.is_main).gpt
    export.quantize(model, short(), data, context)
    said = capsys.readouterr().err
    assert [f"{work}: " in said for work in ("unpacking", "calibrate", "quantize")] == [rank == 0] * 3
    assert rank == 0 or said == ""


def test_exports_are_numbered(finished: Path, tmp_path: Path):
    (tmp_path / "export-1").mkdir()
    assert job._next_export(tmp_path, Context()) == tmp_path / "export-2"
    with pytest.raises(UserError, match="is not empty"):
        export_run(finished, finished)


@pytest.mark.parametrize("methods", ['["blocks", "sliding"]', '["sliding"]'])
def test_like_is_compared_with_like(finished: Path, tmp_path: Path, methods: str):
    """The float model by the first method, and the quantized one close to it by the same."""
    scores = export_run(finished, tmp_path / "out", f"score.methods={methods}")["scores"]
    (first,) = scores["float"]
    assert first == json.loads(methods)[0]
    assert list(scores["quantized"]) == json.loads(methods)
    before, after = scores["float"][first], scores["quantized"][first]
    assert {**before, "val_nats": 0, "val_bpb": 0, "score_s": 0} == {
        **after, "val_nats": 0, "val_bpb": 0, "score_s": 0,
    }  # fmt: skip
    assert abs(after["val_nats"] - before["val_nats"]) < 0.01


def test_coarser_steps_cost_score(finished: Path, tmp_path: Path):
    fine = result_of(finished)["scores"]
    coarse = export_run(finished, tmp_path / "out", "quant.grid.matrix_bits=2", "quant.method=rtn")["scores"]
    assert coarse["float"]["blocks"]["val_nats"] == fine["float"]["blocks"]["val_nats"]
    assert coarse["quantized"]["blocks"]["val_nats"] > fine["quantized"]["blocks"]["val_nats"] + 0.02


def test_scores_come_from_the_file(finished: Path, tmp_path: Path, monkeypatch):
    """What is changed between quantizing and reading back shows in the scores of the file, and only there."""
    real = fit.pack

    def pack_without_embedding(path, config, stored, *rest):
        table = stored["embed"]
        assert isinstance(table, QuantizedTensor)
        blank = {**stored, "embed": replace(table, codes=torch.zeros_like(table.codes))}
        return real(path, config, blank, *rest)

    monkeypatch.setattr(fit, "pack", pack_without_embedding)
    scores = export_run(finished, tmp_path / "out")["scores"]
    for row in scores["quantized"].values():
        assert row["val_nats"] == pytest.approx(np.log(512), rel=1e-6), "a blank head finds all tokens equally likely"
    assert scores["float"]["blocks"]["val_nats"] < 5


def test_a_file_that_is_altered_before_it_is_read_is_noticed(finished: Path, tmp_path: Path, monkeypatch):
    real = fit.pack

    def pack_and_alter(path, *arguments):
        report = real(path, *arguments)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return report

    monkeypatch.setattr(fit, "pack", pack_and_alter)
    with pytest.raises(ArtifactError, match="altered"):
        export_run(finished, tmp_path / "out")
    result = result_of(tmp_path / "out")
    assert (result["status"], "quantized" in result["scores"]) == ("failed", False)


# -- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_on_text_that_the_model_writes(finished: Path, tmp_path: Path, monkeypatch):
    """As in parameter-golf #1019: no text is read, and the file says so."""
    monkeypatch.setattr(export, "_training_windows", lambda *a: pytest.fail("training text was read"))
    settings = ("quant.calibration.source=self", "quant.calibration.seq_len=32", "quant.calibration.seed=5")
    result = export_run(finished, tmp_path / "out", *settings)
    provenance = artifact.inspect(tmp_path / "out" / "model.epigram").contents["provenance"]
    assert provenance == result["calibration"] == {
        "kind": "self-generated", "split": "", "windows": 4, "seq_len": 32, "tokens": 128, "seed": 5,
    }  # fmt: skip
    ours, other = result["scores"]["quantized"]["blocks"], result["scores"]["float"]["blocks"]
    assert abs(ours["val_nats"] - other["val_nats"]) < 0.02
    assert artifact.inspect(finished / "model.epigram").contents["provenance"]["kind"] == "train"


def test_any_table_method_gets_the_hessians_that_it_needs(finished: Path, data: DataFolder, monkeypatch):
    """A quantizer that somebody adds, not only gptq."""
    model, config = load_model(finished, "cpu").gpt, short("quant.table_method=rtn")
    windows = [torch.from_numpy(data.stream("val")[:64].astype(np.int64))[None]]
    assert "head" not in export.calibrate(model, config, windows, Context())
    monkeypatch.setattr(export, "needs_hessians", lambda method: method == "rtn")
    assert "head" in export.calibrate(model, config, windows, Context())


def windows_of(data: DataFolder, finished: Path, world_size: int, *overrides: str) -> list[list[torch.Tensor]]:
    config, model = short(*overrides), load_model(finished / "model.epigram", "cpu").gpt
    return [
        list(calibration_batches(model, config, data, Context(rank=rank, world_size=world_size)))
        for rank in range(world_size)
    ]


def rows(batches: list[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.tolist()]


@pytest.mark.parametrize("num_windows", [1, 7, 8])
def test_ranks_share_the_training_windows(data: DataFolder, finished: Path, num_windows: int):
    settings = (f"quant.calibration.num_windows={num_windows}", "quant.calibration.seq_len=64")
    (alone,) = windows_of(data, finished, 1, *settings)
    assert all(batch.dtype == torch.int64 for batch in alone)
    assert len(rows(alone)) == num_windows
    text = np.concatenate([shard.read() for shard in data.split("train")]).tobytes()
    for row in rows(alone):
        assert np.array(row, np.uint16).tobytes() in text, "a window of the training text"
    for world_size in (2, 3):
        shares = windows_of(data, finished, world_size, *settings)
        assert sorted(row for share in shares for row in rows(share)) == sorted(rows(alone))
        assert max(map(len, map(rows, shares))) - min(map(len, map(rows, shares))) <= 1
    assert rows(windows_of(data, finished, 1, *settings, "quant.calibration.seed=1")[0]) != rows(alone)


def test_ranks_share_the_texts_that_the_model_writes(data: DataFolder, finished: Path, monkeypatch: pytest.MonkeyPatch):
    """Together they write what one process would, each text once."""
    monkeypatch.setattr(export, "_SELF_BATCH", 2)
    settings = ("quant.calibration.source=self", "quant.calibration.num_windows=5", "quant.calibration.seq_len=16")
    (alone,) = windows_of(data, finished, 1, *settings)
    assert len(set(rows(alone))) == 5
    for world_size in (2, 3):
        shares = windows_of(data, finished, world_size, *settings)
        assert sorted(row for share in shares for row in rows(share)) == sorted(rows(alone))
    silent = set(np.flatnonzero(data.tokenizer.byte_tables().is_edge).tolist())
    assert not silent.intersection(token for row in rows(alone) for token in row)


def test_windows_longer_than_any_shard_are_refused(data: DataFolder, finished: Path):
    longer = max(shard.num_tokens for shard in data.split("train")) + 1
    settings = (f"lanes.1.seq_len={longer}", f"quant.calibration.seq_len={longer}")
    with pytest.raises(UserError, match="no training shard holds .* set quant.calibration.seq_len lower"):
        windows_of(data, finished, 1, *settings)


def test_shards_that_look_like_validation_are_refused(data: DataFolder, finished: Path):
    disguised = replace(data, shards={"train": data.split("val"), "val": data.split("val")})
    with pytest.raises(UserError, match="looks like validation data"):
        windows_of(disguised, finished, 1, "quant.calibration.seq_len=16")


# -- limits -----------------------------------------------------------------------------------------------------------

SPENT = {
    "train_s": 50.0, "calibrate_s": 7.0, "quantize_s": 3.0, "total_bytes": 200_000,
    "scores": {"quantized": {"blocks": {"score_s": 20.0}, "sliding": {"score_s": 40.0}}, "float": {}},
}  # fmt: skip
WALL = ("budget.clock=wall", "budget.steps=0")


def test_a_run_exactly_at_its_limits_keeps_them():
    assert over_budget(short(*WALL), SPENT) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize_s": 3.1}, "took 60.1 s of 60.0 s"),
        ({"total_bytes": 200_001}, "200,001 bytes, 1 over the cap of 200,000"),
        ({"scores": {"quantized": {"blocks": {"score_s": 60.5}}}}, "scoring took 60.5 s of 60.0 s"),
    ],
)
def test_each_limit_by_itself(change: dict, message: str):
    (problem,) = over_budget(short(*WALL), {**SPENT, **change})
    assert message in problem


def test_what_compiling_adds_to_a_score_is_named():
    slow = {"scores": {"quantized": {"blocks": {"score_s": 60.5}}}}
    (problem,) = over_budget(short(*WALL), {**SPENT, **slow, "paths": {"compile": "on"}})
    assert problem.endswith("raise score.stride, or set run.compile=off, since what compiling for a score takes counts")


def test_counted_steps_have_no_time_limit():
    assert over_budget(short(), {**SPENT, "train_s": 1e6}) == []


def test_over_the_cap_fails_when_all_is_done(finished: Path, tmp_path: Path):
    with pytest.raises(OverBudgetError, match=r"the cap of 20,000: .*; scoring took .* s of 0.0 s"):
        export_run(finished, tmp_path / "out", "artifact.cap_bytes=20000", "budget.score_s=0.00001")
    result = result_of(tmp_path / "out")
    assert result["status"] == "finished"
    assert result["total_bytes"] > result["cap_bytes"] == 20_000
    assert set(result["scores"]["quantized"]) == {"blocks", "sliding", "streaming"}
    assert artifact.load(tmp_path / "out" / "model.epigram").cap_bytes == 20_000


def test_the_code_counts_against_the_cap(finished: Path, tmp_path: Path):
    size = result_of(finished)["artifact_bytes"]
    fits = export_run(finished, tmp_path / "a", "artifact.code_bytes=20000", f"artifact.cap_bytes={size + 20_100}")
    assert fits["total_bytes"] == fits["artifact_bytes"] + 20_000
    with pytest.raises(OverBudgetError, match="artifact and code take"):
        export_run(finished, tmp_path / "b", "artifact.code_bytes=20000", f"artifact.cap_bytes={size + 19_900}")


def test_a_run_over_its_cap_is_shrunk_to_it(finished: Path, tmp_path: Path):
    """The widest file that fits: nearly full, of coarser steps, scored as such, and the time counted."""
    whole = result_of(finished)
    cap = int(0.93 * whole["artifact_bytes"]) + 1000
    limits = (f"artifact.cap_bytes={cap}", "artifact.code_bytes=1000")
    result = export_run(finished, tmp_path / "out", *limits, "artifact.over_cap=shrink")
    path = tmp_path / "out" / "model.epigram"
    assert result["artifact_bytes"] == path.stat().st_size
    assert 0.99 * cap < result["total_bytes"] == path.stat().st_size + 1000 <= cap
    assert result["shrink_factor"] > 1.01
    assert result["scores"]["quantized"]["blocks"]["val_nats"] != whole["scores"]["quantized"]["blocks"]["val_nats"]
    bits = [{row["tensor_class"]: row["entropy_bits"] for row in r["quantization"]} for r in (whole, result)]
    assert bits[1]["mlp"] < bits[0]["mlp"] if "mlp" in bits[0] else bits[1] != bits[0]
    assert not list((tmp_path / "out").glob("*.trial"))
    assert "over the cap as configured" in (tmp_path / "out" / "log.txt").read_text()


def test_one_that_fits_is_left_as_it_is(finished: Path, tmp_path: Path):
    result = export_run(finished, tmp_path / "out", "artifact.over_cap=shrink")
    assert (tmp_path / "out" / "model.epigram").read_bytes() == (finished / "model.epigram").read_bytes()
    assert result["shrink_factor"] == 1


def test_a_cap_that_no_step_can_keep(finished: Path, tmp_path: Path):
    """What floats and header take is not made smaller by coarser steps: the file is the configured one."""
    why = r"with steps 16 times as wide it would still be [\d,]+ bytes over: shrink the model"
    with pytest.raises(OverBudgetError, match=f"over the cap of 3,000: {why}") as error:
        export_run(finished, tmp_path / "out", "artifact.cap_bytes=3000", "artifact.over_cap=shrink")
    assert "over_cap" not in str(error.value), "it is set"
    assert result_of(tmp_path / "out")["shrink_factor"] == 1
    assert not list((tmp_path / "out").glob("*.trial"))
    log = (tmp_path / "out" / "log.txt").read_text()
    assert re.search(f"warning: over the cap, and written as configured: {why}", log)
    assert "files written" not in log


def test_without_time_left_nothing_is_quantized_again(finished: Path, tmp_path: Path, monkeypatch):
    cap = f"artifact.cap_bytes={int(0.9 * result_of(finished)['artifact_bytes'])}"
    monkeypatch.setattr(job, "left_to_quantize_s", lambda config, result: 0.001)
    monkeypatch.setattr(fit, "quantize_model", lambda *a: pytest.fail("the time was over"))
    with pytest.raises(OverBudgetError, match=r": 0.0 s of budget.train_s were left, .*: raise budget.calibrate_s, or"):
        export_run(finished, tmp_path / "out", cap, "artifact.over_cap=shrink")
    assert result_of(tmp_path / "out")["shrink_factor"] == 1


def test_what_is_left_of_the_time_of_training():
    assert left_to_quantize_s(short(*WALL), {**SPENT, "train_s": 45.5}) == pytest.approx(4.5)
    assert left_to_quantize_s(short(), SPENT) == math.inf, "counted steps have no time limit"


def test_a_floor_is_raised_where_it_sets_the_step(finished: Path, tmp_path: Path):
    floor = ("quant.grid.clip=search", "quant.grid.floor=1.0")
    whole = export_run(finished, tmp_path / "whole", *floor)
    cap = int(0.9 * whole["artifact_bytes"])
    result = export_run(finished, tmp_path / "out", *floor, f"artifact.cap_bytes={cap}", "artifact.over_cap=shrink")
    assert 0.99 * cap < result["total_bytes"] <= cap
    assert result["shrink_factor"] > 1.01


def test_shrinking_needs_something_to_widen():
    with pytest.raises(UserError, match="floor = 0 has neither"):
        short("artifact.over_cap=shrink", "quant.grid.clip=max", "quant.grid.floor=0")


# -- what does not belong together ------------------------------------------------------------------------------------


def test_no_run(finished: Path, tmp_path: Path):
    with pytest.raises(UserError, match="is no run folder"):
        export_run(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="is no run folder"):
        export_run(finished / "model.epigram", tmp_path / "out")


def test_other_data(finished: Path, tmp_path: Path):
    """A tokenizer of the same size would go unnoticed, and everything measured with it be nonsense."""
    write_text(tmp_path / "other.txt", 300, seed=9)
    build([tmp_path / "other.txt"], tmp_path / "other", vocab_size=512, workers=1)
    with pytest.raises(UserError, match="another tokenizer than .* was trained with"):
        export_run(finished, tmp_path / "out", data_path=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_data_that_were_moved(finished: Path, data_path: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    state = run / "checkpoints" / "step-00000008" / "state.json"
    state.write_text(state.read_text().replace(str(data_path.resolve()), "/nowhere"))
    with pytest.raises(UserError, match="the data of this run are no longer at /nowhere: say by --data"):
        export_run(run, tmp_path / "out")
    assert export_run(run, tmp_path / "out", data_path=str(data_path))["data"] == str(data_path.resolve())


def test_another_model(finished: Path, tmp_path: Path):
    """Also where its weights would fit; and a training that never was."""
    for setting in (
        "model.mlp_dim=64",
        "model.softcap=10",
        "optim.muon.lr_early=0.5",
        "budget.steps=5",
        "average.decay=0.5",
    ):
        name = setting.partition("=")[0]
        with pytest.raises(UserError, match=rf"an export cannot change how the model was trained \({name}\)"):
            export_run(finished, tmp_path / "out", setting)
    assert not (tmp_path / "out").exists()
