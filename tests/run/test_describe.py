"""What a recipe is, against the published numbers and against a run."""

import json
import math
from pathlib import Path

import pytest
import torch
from run_helpers import result_of, rows_of, short

from epigram.config import load_recipe, recipe_names
from epigram.errors import UserError
from epigram.model.gpt import GPT
from epigram.optim.schedule import shortfalls
from epigram.run.describe import describe, print_description
from epigram.run.size import forecast_bytes

PUBLISHED = {"pr1212": 29_751_910, "pr1130": 27_605_108, "pr1019": 27_067_484, "pr549": 26_928_220}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe(name: str, capsys):
    config = load_recipe(name)
    found = describe(config)
    assert json.loads(json.dumps(found)) == found, "plain values"
    assert found["parameters"] == PUBLISHED.get(name, found["parameters"]) == sum(found["parameters_by_part"].values())
    assert [row["seq_len"] for row in found["lanes"]] == [lane.seq_len for lane in config.flat_lanes]
    assert {row["rank"] for row in found["lanes"]} == {0}
    assert found["tokens_per_step"] == sum(row["seq_len"] * row["num_seqs"] for row in found["lanes"])
    assert found["forecast_bytes"] < found["cap_bytes"], "a shipped recipe fits"
    assert found["cap_bytes"] == config.artifact.cap_bytes
    curve = found["schedule"]
    assert [point["progress"] for point in curve] == pytest.approx([i / 10 for i in range(11)])
    assert curve[-1]["lr"] == pytest.approx(config.schedule.min_lr)
    assert max(point["lr"] for point in curve) <= 1
    print_description(found)
    printed = capsys.readouterr().out
    assert f"{found['parameters']:,} parameters" in printed
    assert f"{found['tokens_per_step']:,} tokens" in printed
    assert "NVLink" not in printed, "one process sends nothing"


def test_what_looks_like_markup_is_text(capsys):
    found = describe(short("recipe=[red]", "summary=uses [attn] and [/b] tricks"))
    print_description(found)
    assert capsys.readouterr().out.startswith("[red]: uses [attn] and [/b] tricks\n")


def ranks_of(*overrides: str, gpus: int) -> list[int]:
    return [row["rank"] for row in describe(load_recipe("pr1212", overrides), gpus)["lanes"]]


def test_lanes_of_pr1212_on_other_machines():
    config = load_recipe("pr1212")
    found = describe(config)
    assert [row["processes"] for row in found["world_sizes"]] == list(range(1, 9))
    assert found["world_sizes"][0] == {"processes": 1, "balance": 1, "speedup": 1}
    assert found["lane_times"] == "modelled, operations"
    assert ranks_of(gpus=8) == list(range(8))
    assert sorted(ranks_of(gpus=4)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(map(ranks_of(gpus=3).count, range(3))) == [2, 3, 3], "as even as eight lanes allow"
    with pytest.raises(UserError, match="8 lanes cannot be shared by 9 processes, each needs one: use 1 to 8"):
        describe(config, 9)


def test_measured_times_decide_over_modelled_ones(capsys):
    """A short lane that takes as long as five others gets a process of its own."""
    slow = ("lanes=[{count=1, seq_len=2048, num_seqs=36, ms=50}, {count=5, seq_len=6144, num_seqs=10, ms=10}]",)
    assert ranks_of(*slow, gpus=2) == [0, 1, 1, 1, 1, 1]
    found = describe(load_recipe("pr1212", slow), 2)
    assert (found["balance"], found["lane_times"]) == (1, "measured, ms")
    assert [row["share"] for row in found["lanes"]] == [1, 0.2, 0.2, 0.2, 0.2, 0.2]
    print_description(found)
    assert "predicted balance 100.0 %" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r"some \[\[lanes\]\] have ms and some have none"):
        load_recipe("pr1212", ["lanes.0.ms=50.0"])
    with pytest.raises(UserError, match="ms = -1.0 is no time"):
        load_recipe("smoke", ["lanes.0.ms=-1.0", "lanes.1.ms=1.0"])


def test_what_eight_processes_of_pr1212_send(capsys):
    """By hand: 28,311,552 weights in banks of 12 layers, sent as 16; 1,440,358 others and two numbers for each lane."""
    measured = ["lanes.0.ms=50.2", "lanes.1.ms=54.6"]
    found = describe(load_recipe("pr1212", measured), 8)
    banks = 28_311_552 * 16 // 12
    expected = [round(2 * 7 / 8 * 4 * (1_440_358 + 16)), 7 * 4 * banks // 8, 7 * 2 * banks // 8]
    assert [row["sent_bytes"] for row in found["wire"]] == expected
    assert found["wire"][1]["ms"] == pytest.approx(132.120576 / 450, rel=1e-9)
    assert found["step_ms"] == pytest.approx(54.6 + sum(expected) / 450e6)
    print_description(found)
    assert "55.06 ms a step, without the update" in " ".join(capsys.readouterr().out.split())
    alone = describe(load_recipe("pr1212", measured))
    assert [row["sent_bytes"] for row in alone["wire"]] == [0, 0, 0]
    assert alone["step_ms"] == pytest.approx(5 * 50.2 + 3 * 54.6)
    assert describe(load_recipe("pr1212"), 8)["step_ms"] is None, "operations are no milliseconds"
    clipped = describe(load_recipe("pr1212", ["gradients.clip=global"]), 4)["wire"]
    assert [row["sent_bytes"] for row in clipped][1:3] == [3 * 28_311_552, 6], "12 layers divide by 4; one number"
    assert "nothing" in clipped[1]["behind"]
    wide = describe(load_recipe("pr1212", ["optim.muon.dtype=float32"]), 8)["wire"]
    assert wide[2]["sent_bytes"] == 7 * 4 * banks // 8, "updates travel as they are computed"


def test_steps_that_lane_times_leave_room_for(capsys):
    """By hand: each of two processes has at least half of 5 x 46.7 + 3 x 51.5 ms of lanes; 226 s of steps."""
    measured = ["lanes.0.ms=46.7", "lanes.1.ms=51.5"]
    assert describe(load_recipe("pr1212"))["steps"] is None, "operations are no milliseconds"
    assert describe(load_recipe("pr1212"))["warnings"] == []
    found = describe(load_recipe("pr1212", measured), 8)
    assert found["steps"] == pytest.approx(586_000 / 51.5, rel=0.02)
    assert found["warnings"] == []
    found = describe(load_recipe("pr1212", [*measured, "budget.train_s=240"]), 2)
    assert found["steps"] == pytest.approx(226_000 / 196.4, rel=0.02)
    assert len(found["warnings"]) == 2
    assert found["schedule"][1]["lr"] == pytest.approx(0.9 * found["steps"] / 4000, abs=1e-3), "and so the curve says"
    print_description(found)
    out = capsys.readouterr().out
    assert "--set schedule.warmdown_steps=0 --set schedule.warmdown_frac=0.47" in out, "in one line, to be copied"
    assert "--set schedule.momentum_warmup_steps=" in out


@pytest.mark.parametrize(
    ("name", "steps"), [("smoke", 20), ("demo", 789), ("h100", 5340), ("h100", 18200), ("pr1212", 8400)]
)
def test_recipes_fit_the_runs_that_they_are_made_for(name: str, steps: int):
    """Steps as measured (docs/results; h100 at 32.8 ms, for 180 and 600 s) or published."""
    config = load_recipe(name)
    assert list(shortfalls(config.schedule, steps)) == []
    assert describe(config)["warnings"] == []


def test_operations_of_a_token_are_those_that_torch_counts():
    """Three forwards' worth; torch's counter knows nothing of windows and causality, so attention is left out."""
    from torch.utils.flop_counter import FlopCounterMode

    config = short("model.window_layers=[]")
    model = GPT(config.model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros((1, 64), dtype=torch.int64)))
    products = counter.get_flop_counts()["Global"]
    counted = sum(flops for op, flops in products.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    (row,) = (row for row in describe(config)["flops_per_token"] if row["seq_len"] == 64)
    linear = row["matrices"] + row["head"] + row["projections"]
    assert linear == pytest.approx(3 * counted / 64, rel=1e-9)
    assert row["total"] == pytest.approx(linear + row["attention"])


def test_the_curve_is_what_a_run_does(finished: Path):
    """Each logged step of a run of 8 lies on the curve of a description of it."""
    curve = {round(8 * point["progress"]): point for point in describe(short())["schedule"]}
    rows = [row for row in rows_of(finished) if "train_loss" in row]
    matched = 0
    for row in rows:
        point = curve.get(row["step"] - 1)
        if point and math.isclose((row["step"] - 1) / 8, point["progress"]):
            assert (row["lr"], row["momentum"], row["gamma"]) == pytest.approx(
                (point["lr"], point["momentum"], point["mile_gamma"])
            )
            matched += 1
    assert matched == 2  # the beginning and the middle


@pytest.mark.parametrize(
    "changes", [(), ("artifact.codec=brotli",), ("model.vocab_size=512", "artifact.tokenizer=false")]
)
def test_the_forecast_is_near_the_file(finished: Path, tmp_path: Path, changes: tuple[str, ...]):
    from epigram.run.job import export_job

    config = short(*changes)
    with torch.device("meta"):
        expected = forecast_bytes(config, GPT(config.model))
    found = (result_of(finished) if not changes else export_job(finished, out=tmp_path / "out", overrides=changes))[
        "artifact_bytes"
    ]
    assert expected == pytest.approx(found, rel=0.15)


def test_the_forecast_follows_grid_codec_and_code():
    def forecast(*changes: str) -> int:
        return describe(short(*changes))["forecast_bytes"]

    plain = forecast()
    assert forecast("artifact.code_bytes=1000") == plain + 1000
    assert forecast("quant.grid.matrix_bits=4") < 0.8 * plain
    assert forecast("quant.grid.sigma.mlp=14") < plain, "coarser steps"
    assert forecast("quant.grid.sigma.attention=14") != forecast("quant.grid.sigma.mlp=14"), "each class has its own"
    assert forecast("artifact.codec=store") > plain


RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(("name", "changes", "rel"), [
    ("h100-180s", ["quant.grid.sigma.head=20"], 0.003),  # it ran before the head had a clip of its own
    ("demo", [], 0.025),  # small tables and few rows: above what it came to
])  # fmt: skip
def test_the_forecast_of_past_runs(name: str, changes: list[str], rel: float):
    config = load_recipe(str(RESULTS / name / "config.toml"), changes)
    with torch.device("meta"):
        model = GPT(config.model)
    assert forecast_bytes(config, model) == pytest.approx(result_of(RESULTS / name)["artifact_bytes"], rel=rel)


def test_past_runs_correct_the_forecast(finished: Path, tmp_path: Path):
    """The forecast of the run's own config, corrected by the run, is what the run came to."""
    config = load_recipe(str(finished / "config.toml"))
    found = describe(config, past=[finished, finished])
    assert found["forecast_bytes"] == pytest.approx(result_of(finished)["artifact_bytes"], abs=1)
    assert found["past"]["low"] == pytest.approx(found["past"]["high"])
    assert found["past"]["runs"] == 2
    with pytest.raises(UserError, match="is no run folder"):
        describe(config, past=[tmp_path])
    (tmp_path / "config.toml").write_text((finished / "config.toml").read_text())
    with pytest.raises(UserError, match="holds no finished run"):
        describe(config, past=[tmp_path])
    (tmp_path / "result.json").write_text(json.dumps({**result_of(finished), "shrink_factor": 1.2}))
    with pytest.raises(UserError, match="was shrunk to its cap"):
        describe(config, past=[tmp_path])
