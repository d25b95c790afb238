"""Every benchmark on a CUDA device, and a profile whose kinds are told apart there."""

import json
from pathlib import Path

import pytest

from epigram import plugin
from epigram.run.bench.base import PACKAGE, Options
from epigram.run.benchmark import benchmark

pytestmark = pytest.mark.gpu

HEADS = ["model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=64"]
"""Recipe smoke with the heads of the real ones, which every backend knows."""


@pytest.mark.parametrize("name", plugin.names(PACKAGE))
def test_each_on_a_device(name: str):
    found = benchmark(name, recipe="smoke", overrides=HEADS, repeats=3, device="cuda")
    for row in found["rows"]:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"], row["name"]
    # The slowest GPU that this runs on copies faster than any CPU, and the fastest is not that fast.
    assert 1e11 < found["ceilings"]["copy_bytes_per_s"] < 2e13
    assert 1e12 < found["ceilings"]["product_flops_per_s"] < 1e16


def test_attention_backends_that_need_the_compiler():
    found = benchmark("attention", recipe="smoke", overrides=[*HEADS, "run.compile=on"], repeats=3, device="cuda")
    timed = {row["name"].split(",")[0] for row in found["rows"]}
    assert {"flex", "sdpa", "reference"} <= timed, found["left_out"]


def test_a_profile_of_a_device(tmp_path: Path):
    options = Options(profile=tmp_path / "profile")
    found = benchmark("step", recipe="smoke", overrides=HEADS, repeats=3, device="cuda", options=options)["kernels"]
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert sum(found["calls"].values()) * found["steps"] >= len(kernels) > 0
    spent = found["kinds"]
    assert all(spent[kind] > 0 for kind in ("products", "attention", "elementwise and reductions", "optimizer"))
    assert spent["memory copies"] > 0, "tokens come from the host"
    assert any("multi_tensor_apply" in kernel["name"] for kernel in found["top"] if kernel["kind"] == "optimizer")
