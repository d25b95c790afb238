"""`epigram bench` as a shell sees it: each benchmark of recipe smoke, on the CPU."""

import json
from pathlib import Path

import pytest
from cli_helpers import Shell

from epigram import plugin
from epigram.run.bench.base import PACKAGE

QUICK = ("--device", "cpu", "--recipe", "smoke", "--repeats", "2")
ROWS = {
    "step": ["whole step", "forward + backward, 4 x 64", "forward + backward, 2 x 128", "clip: lane, 3 lanes",
             "optimizer", "EMA"],
    "lanes": ["5 x 64", "4 x 64", "2 x 128", "3 x 64", "2 x 64", "1 x 128"],
    "attention": [f"{name}, {kind}, {lane}, {passes}"
                  for kind in ("full", "window 16") for name in ("reference", "sdpa") for lane in ("4 x 64", "2 x 128")
                  for passes in ("forward", "forward + backward")],
    "mlp": [f"{name}, {lane}, {passes}"
            for lane in ("4 x 64", "2 x 128") for name in ("products alone", "eager")
            for passes in ("forward", "forward + backward")],
    "optimizer": ["Muon", "AdamW", "optimizer", "EMA", "clip: lane, 3 lanes", "whole update"],
    "score": ["blocks, windows of 128 every 128", "sliding, windows of 128 every 64"],
    "pack": ["calibrate on made-up tokens", "quantize, gptq",
             *(f"{way}, {codec}" for codec in ("brotli", "entropy", "store") for way in ("pack", "unpack"))],
}  # fmt: skip


def test_no_benchmark_is_forgotten_here():
    assert set(ROWS) == set(plugin.names(PACKAGE))


@pytest.mark.parametrize("name", ROWS)
def test_each(shell: Shell, name: str):
    small = () if name != "score" else ("--set", "score.batch_tokens=512")
    found = shell("bench", name, *QUICK, *small)
    assert found.code == 0, found.err
    *table, last = found.out.splitlines()
    result = json.loads(last)
    timed = [row["name"] for row in result["rows"]]
    assert [row for row in timed if row in ROWS[name]] == ROWS[name]
    for row in result["rows"]:
        assert row["repeats"] == 2
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert (row["floor_ms"] is None) == row["name"].startswith(("pack, ", "unpack, ")), "codecs are the host's"
    assert (result["benchmark"], result["recipe"]) == (name, "smoke")
    assert result["machine"]["versions"]["torch"]
    assert result["ceilings"]["copy_bytes_per_s"] > 0 < result["ceilings"]["product_flops_per_s"]
    text = "\n".join(table)
    assert table[0].startswith("machine: ")
    assert all(word in text for word in ("versions: python", "median ms", "10-90 %", "floor ms", "of ceiling"))
    assert all(row in text for row in timed)


def test_a_program_gets_one_line(shell: Shell):
    found = shell("bench", "optimizer", *QUICK, "--json")
    assert (found.code, found.out.count("\n")) == (0, 1)
    assert json.loads(found.out)["benchmark"] == "optimizer"


def test_proposed_lanes_are_a_recipe(shell: Shell, tmp_path: Path):
    """What is printed for pasting parses, and the plan goes by its times."""
    import tomllib

    found = shell("bench", "lanes", *QUICK)
    assert found.code == 0, found.err
    paste = json.loads(found.out.splitlines()[-1])["paste"]
    assert paste in found.out
    lanes = tomllib.loads(paste)["lanes"]
    assert [(lane["count"], lane["seq_len"]) for lane in lanes] == [(2, 64), (1, 128)]
    tables = ", ".join("{" + ", ".join(f"{key}={value}" for key, value in lane.items()) + "}" for lane in lanes)
    described = shell("describe", "smoke", "--gpus", "3", "--json", "--set", f"lanes=[{tables}]")
    assert described.code == 0, described.err
    assert json.loads(described.out.splitlines()[-1])["lane_times"] == "measured, ms"


def test_a_backend_that_is_left_out_says_why(shell: Shell):
    found = shell("bench", "attention", *QUICK, "--set", "model.window_layers=[]")
    result = json.loads(found.out.splitlines()[-1])
    assert "flex attention is for CUDA devices" in result["left_out"]["flex, full"]
    assert "left out: flex, full: flex attention is for CUDA devices" in found.out
    assert not any("window" in row["name"] for row in result["rows"])


def test_quantization_without_calibration(shell: Shell):
    found = shell("bench", "pack", *QUICK, "--set", "quant.method=rtn", "--json")
    result = json.loads(found.out)
    assert result["left_out"] == {"calibrate": 'quant.method = "rtn" needs no calibration'}
    assert result["rows"][0]["name"] == "quantize, rtn"
    assert 0 < result["figures"]["entropy_bytes"] < result["figures"]["store_bytes"]


def test_one_codec_of_all(shell: Shell):
    found = shell("bench", "pack", *QUICK, "--codec", "store", "--json")
    names = [row["name"] for row in json.loads(found.out)["rows"]]
    assert names == ["calibrate on made-up tokens", "quantize, gptq", "pack, store", "unpack, store"]
    found = shell("bench", "pack", *QUICK, "--codec", "stroe")
    assert found.code == 2 and "there is no 'stroe'" in found.err and "store" in found.err


@pytest.mark.parametrize("name", ["step", "score", "attention", "mlp", "optimizer", "pack"])
def test_a_profile(shell: Shell, tmp_path: Path, name: str):
    folder = tmp_path / "profile"
    settings = ("--set", "score.batch_tokens=256", "--set", "lanes.0.count=1")
    found = shell("bench", name, *QUICK, *settings, "--profile", folder)
    assert found.code == 0, found.err
    kernels = json.loads((folder / "kernels.json").read_text())
    assert json.loads(found.out.splitlines()[-1])["kernels"] == kernels
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    spent = kernels["kinds"]
    with_attention = ["attention"] if name in ("step", "score", "attention", "pack") else []
    assert min(spent[kind] for kind in ("products", *with_attention, "elementwise and reductions", "idle")) > 0
    assert (spent["optimizer"] > 0) == (name == "step")
    assert sum(spent.values()) == pytest.approx(kernels["wall_ms"], rel=1e-6)  # one thread: nothing overlaps
    text = (folder / "kernels.txt").read_text()
    assert "elementwise and reductions" in text and any(f"aten::{word}" in text for word in ("mm", "bmm", "baddbmm"))
    assert text in found.out, "what is printed is what is written"
    assert str(folder) in found.out
    again = shell("bench", name, *QUICK, "--profile", folder)
    assert (again.code, "choose another folder" in again.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (
            ["nonsense"],
            "there is no 'nonsense' in bench: choose one of attention, lanes, mlp, optimizer, pack, score, step",
        ),
        (["mlp", "--stride", "8"], "bench mlp has no --stride: it belongs to score"),
        (["step", "--recipe", "nonsense"], "no recipe 'nonsense'"),
        (["step", "--repeats", "0"], "--repeats"),
        (["score", *QUICK, "--method", "all"], "there is no method 'all'"),
        (["score", *QUICK, "--stride", "1000"], "stride = 1000 is over seq_len = 128"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(shell: Shell, tmp_path: Path, monkeypatch, arguments: list[str], part: str):
    monkeypatch.chdir(tmp_path)
    found = shell("bench", *arguments)
    assert (found.code, found.out) == (2, "")
    assert part in found.err
    assert list(tmp_path.iterdir()) == []
