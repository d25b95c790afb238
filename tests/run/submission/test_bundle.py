"""The single file: what it holds, that reading it back gives the package, and that it trains like the package."""

import ast
import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from record_helpers import CAP
from run_helpers import losses_of, python_alone, result_of, short

import epigram
from epigram.config import load_recipe, parse_config
from epigram.errors import UserError
from epigram.run.submission.bundle import (
    FORMS,
    _latin,
    _raw,
    foreign_statement,
    packed_bytes,
    reachable,
    read_script,
    reserve_warning,
    shipped_sources,
    single_file,
    stripped,
    unpacked,
)

PACKAGE = Path(epigram.__file__).parent


def test_it_holds_the_modules_of_the_package_and_the_recipe():
    config = short()
    readable = unpacked(single_file(config, "readable").decode())
    packed = unpacked(single_file(config, "packed").decode("latin-1"))
    assert readable is not None
    assert packed is not None
    assert readable.keys() == packed.keys()
    for name, text in readable.items():
        if name.endswith(".py"):
            assert text == (PACKAGE.parent / name).read_text("utf-8"), name
            assert ast.dump(ast.parse(packed[name])) == ast.dump(ast.parse(stripped(text))), name
    recipe = tomllib.loads(readable["epigram/recipes/smoke.toml"])
    assert parse_config(recipe) == config


@pytest.mark.parametrize("form", FORMS)
@given(summary=st.text())
@example(summary='""" inside')
@example(summary='ends with ""')
@example(summary="weights \\u of")
@example(summary="C:\\new\\x")
@example(summary="ends with \\")
@example(summary="a → b, ü and 🙂")
@settings(deadline=None)
def test_any_summary_stands_in_the_script_as_it_is(form: str, summary: str):
    with patch("epigram.run.submission.bundle.shipped_sources", return_value={}):
        script = single_file(replace(load_recipe("smoke"), summary=summary), form)
    tree = ast.parse(script)
    assert (ast.get_docstring(tree, clean=False) or "").startswith(f"smoke: {summary}.\n")
    assert foreign_statement(script.decode("latin-1" if form == "packed" else "utf-8")) is None


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


@pytest.mark.parametrize("data", [bytes(range(256)), b"\x00123\\n\r\n\"'"], ids=["every byte", "what is escaped"])
def test_any_bytes_survive_a_source_file(data: bytes, tmp_path: Path):
    """Through the file as Python itself reads it, and as we do."""
    path = tmp_path / "script.py"
    path.write_bytes(f"# coding: latin-1\nX = {_latin(data)}.encode('latin-1')\nprint(X.hex())\n".encode("latin-1"))
    assert python_alone(path, cwd=tmp_path).stdout.strip() == data.hex()
    assert ast.literal_eval(read_script(path).split(" = ")[1].split(".encode")[0]).encode("latin-1") == data


def test_a_script_in_an_encoding_that_it_does_not_keep_to_is_read(tmp_path: Path):
    path = tmp_path / "script.py"
    for text in (b"# coding: nothing\nx = 1\n", b"x = '\xff'\n"):
        path.write_bytes(text)
        assert "x = " in read_script(path)


def test_what_a_recipe_reserves_for_its_code_is_enough():
    """Raise code_bytes of the recipe when the package has outgrown it; lower it when 15,000 bytes are unused."""
    config = load_recipe("h100")
    needed, reserved = packed_bytes(config), config.artifact.code_bytes
    assert reserve_warning(config) is None and reserved - 15_000 < needed <= reserved
    less = replace(config, artifact=replace(config.artifact, code_bytes=needed - 500))
    assert f"artifact.code_bytes = {needed - 500:,} is less than the" in reserve_warning(less)
    assert reserve_warning(replace(config, artifact=replace(config.artifact, code_bytes=0))) is None


def test_stripping_keeps_the_program():
    text = '"""Doc."""\nx = "kept"  # gone\n\n\nclass A:\n    """Only this."""\n\n\ndef f():\n    """Doc."""\n'
    text += '    return """b"""\n'
    assert stripped(text) == "x = 'kept'\n\nclass A:\n    pass\n\ndef f():\n    return 'b'\n"


def test_only_annotations_that_nothing_reads_are_stripped():
    """A decorator may read those of its function, and classes are read for their fields."""
    kept = "class A:\n    x: int = 0\n\n@op\ndef f(x: int) -> int:\n    return x\n\n"
    assert stripped(kept) == kept.rstrip("\n") + "\n"
    text = "def g(a: int, /, b: A = 0, *c: str, d: A, **e: list[A]) -> A:\n    y: int = a\n    return y\n"
    assert stripped(text) == "def g(a, /, b=0, *c, d, **e):\n    y: int = a\n    return y\n"


def test_a_script_of_another_kind_is_none_of_ours():
    assert unpacked("import torch\nprint(1)\n") is None
    with pytest.raises(UserError, match="cannot be read"):
        unpacked('EPIGRAM_SINGLE_FILE = 1\nFILES = json.loads(bz2.decompress("abcde".encode("latin-1")))\n')
    with pytest.raises(UserError, match="must be one of readable, packed"):
        single_file(short(), "other")


def test_the_readable_file_trains_and_packs_like_the_package(runs: list[Path], data_path: Path, tmp_path: Path):
    """In an empty folder: the same losses, the same bytes of the artifact, the same score by another process."""
    (tmp_path / "train_gpt.py").write_bytes(
        single_file(short(f"artifact.cap_bytes={CAP}", "run.sample_tokens=0"), "readable")
    )
    done = python_alone(
        "train_gpt.py", "--data", data_path, "--seed", 2, "--out", "out", "--device", "cpu", cwd=tmp_path
    )
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
    done = python_alone("train_gpt.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "train_gpt.py: say by --data or DATA_PATH where the token shards are\n",
    )
    text = tmp_path / "text.txt"
    text.write_text("no shards")
    done = python_alone("train_gpt.py", "--data", text, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "is no folder of token shards, and this script does not build any" in done.stderr


def test_three_processes_score_together(good: Path, runs: list[Path], data_path: Path, tmp_path: Path):
    """Under torchrun, a lane each: the artifact is scored by three fresh processes that find each other."""
    shutil.copyfile(good / "train_gpt.py", tmp_path / "train_gpt.py")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "train_gpt.py")
    done = python_alone(
        *launch, "--data", data_path, "--out", "out", "--device", "cpu", "--set", "budget.steps=2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "out")
    for method, row in result["scores"]["quantized"].items():
        assert result["separate"][method]["tokens"] == row["tokens"]
    assert json.loads((good / "submission.json").read_text())["bytes_code"] == result["code_bytes"]
