"""The single file: what it holds, that reading it back gives the package, and that it trains like the package."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_helpers import CAP
from run_helpers import losses_of, result_of, short

import epigram
from epigram.config import parse_config
from epigram.errors import UserError
from epigram.run.submission.bundle import (
    FORMS,
    _raw,
    reachable,
    shipped_sources,
    single_file,
    stripped,
    unpacked,
)

PACKAGE = Path(epigram.__file__).parent


def python(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Another Python that does not find this package by a path of ours, on one thread as the tests are: the order of
    sums decides the last bits."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)


def test_it_holds_the_modules_of_the_package_and_the_recipe():
    config = short()
    readable = unpacked(single_file(config, "readable").decode())
    packed = unpacked(single_file(config, "packed").decode())
    assert readable is not None
    assert packed is not None
    assert readable.keys() == packed.keys()
    for name, text in readable.items():
        if name.endswith(".py"):
            assert text == (PACKAGE.parent / name).read_text("utf-8"), name
            assert ast.dump(ast.parse(packed[name])) == ast.dump(ast.parse(stripped(text))), name
    recipe = tomllib.loads(readable["epigram/recipes/smoke.toml"])
    assert parse_config(recipe) == config


def test_it_leaves_out_what_training_and_scoring_do_not_need():
    names = set(shipped_sources())
    assert {"epigram/run/job.py", "epigram/attention/flash4.py", "epigram/kernels/_triton/trunk.py"} <= names
    assert {"epigram/artifact/codecs/brotli.py", "epigram/quant/methods/rtn.py", "epigram/run/__init__.py"} <= names
    assert not [name for name in names if "/cli/" in name or "/bench/" in name or "/report/" in name]
    assert "epigram/data/build.py" not in names


def test_what_can_be_reached():
    texts = {
        "epigram": "",
        "epigram.a": "def f():\n    from epigram.b import g\n",
        "epigram.b": "import torch\nFOLDER = 'epigram.plugins'\n",
        "epigram.c": "import epigram.a",
        "epigram.plugins": "",
        "epigram.plugins.one": "from epigram import d",
        "epigram.d": "",
    }
    found = reachable(["epigram.a"], texts, ["epigram", "epigram.plugins"])
    assert found == set(texts) - {"epigram.c"}


@given(st.text())
def test_any_text_survives_its_literal(text: str):
    assert ast.literal_eval(_raw(text)) == text


def test_stripping_keeps_the_program():
    text = '"""Doc."""\nx = "kept"  # gone\n\n\nclass A:\n    """Only this."""\n\n\ndef f():\n    """Doc."""\n'
    text += '    return """b"""\n'
    assert stripped(text) == "x = 'kept'\n\nclass A:\n    pass\n\ndef f():\n    return 'b'\n"


def test_a_script_of_another_kind_is_none_of_ours():
    assert unpacked("import torch\nprint(1)\n") is None
    with pytest.raises(UserError, match="cannot be read"):
        unpacked('EPIGRAM_SINGLE_FILE = 1\nFILES = json.loads(lzma.decompress(base64.b85decode("abcde")))\n')
    with pytest.raises(UserError, match="must be one of readable, packed"):
        single_file(short(), "other")


def test_the_readable_file_trains_and_packs_like_the_package(runs: list[Path], data_path: Path, tmp_path: Path):
    """In an empty folder: the same losses, the same bytes of the artifact, the same score by another process."""
    (tmp_path / "train_gpt.py").write_bytes(
        single_file(short(f"artifact.cap_bytes={CAP}", "run.sample_tokens=0"), "readable")
    )
    done = python("train_gpt.py", "--data", data_path, "--seed", 2, "--out", "out", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = tmp_path / "out", runs[1]
    assert losses_of(ours) == losses_of(theirs)
    assert (ours / "model.epigram").read_bytes() == (theirs / "model.epigram").read_bytes()
    result, other = result_of(ours), result_of(theirs)
    assert result["code_bytes"] == (tmp_path / "train_gpt.py").stat().st_size
    for method, row in other["scores"]["quantized"].items():
        assert result["separate"][method]["val_nats"] == pytest.approx(row["val_nats"], rel=1e-6)
        assert f"final_separate_{method}_exact" in (ours / "log.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train_gpt.py"], "nothing is left behind"


@pytest.mark.parametrize("form", FORMS)
def test_mistakes_cost_a_sentence(form: str, tmp_path: Path):
    (tmp_path / "train_gpt.py").write_bytes(single_file(short(f"artifact.cap_bytes={CAP}"), form))
    done = python("train_gpt.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "train_gpt.py: say by --data or DATA_PATH where the token shards are\n",
    )
    text = tmp_path / "text.txt"
    text.write_text("no shards")
    done = python("train_gpt.py", "--data", text, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "is no folder of token shards, and this script does not build any" in done.stderr


def test_three_processes_score_together(good: Path, runs: list[Path], data_path: Path, tmp_path: Path):
    """Under torchrun, a lane each: the artifact is scored by three fresh processes that find each other."""
    shutil.copyfile(good / "train_gpt.py", tmp_path / "train_gpt.py")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "train_gpt.py")
    done = python(
        *launch, "--data", data_path, "--out", "out", "--device", "cpu", "--set", "budget.steps=2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "out")
    for method, row in result["scores"]["quantized"].items():
        assert result["separate"][method]["tokens"] == row["tokens"]
    assert json.loads((good / "submission.json").read_text())["bytes_code"] == result["code_bytes"]
