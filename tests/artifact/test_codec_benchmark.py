"""The benchmark of the codecs runs on a file and on synthetic matrices, and its last line is JSON."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from artifact_toy import contents

from epigram import plugin
from epigram.artifact.tensors import save

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "codecs.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("codec_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_synthetic(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--synthetic", "--layers", "2", "--dim", "64", "--by-class"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["codec"] for row in result["codecs"]] == plugin.names("epigram.artifact.codecs")
    sizes = {row["codec"]: row["bytes"] for row in result["codecs"]}
    assert sizes["store"] == result["codes"] == 2 * (3 * 64 * 64 + 2 * 3 * 64 * 64)
    assert sizes["entropy"] < sizes["brotli"] < sizes["store"]
    entropy = next(row for row in result["codecs"] if row["codec"] == "entropy")
    assert sum(entropy["class_bytes"].values()) == entropy["bytes"]
    assert 0 <= entropy["over_model"] < 0.02


def test_on_a_file(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = save(tmp_path / "m", contents())
    benchmark.main([str(tmp_path / "m"), "--codec", "entropy"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["codes"] == report.num_codes
    assert result["codecs"][0]["bytes"] == report.code_bytes


@pytest.mark.parametrize("arguments", [[], ["x.epigram", "--synthetic"]], ids=str)
def test_needs_one_source(benchmark: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
