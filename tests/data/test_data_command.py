"""`epigram data build` and `epigram data check` as a user calls them."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import py3langid
import pytest
from click.testing import CliRunner
from data_helpers import listing

from epigram.cli.main import command
from epigram.data import build, clean
from epigram.data.tokenizer import Tokenizer
from epigram.errors import UserError


@pytest.fixture
def book(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(texts))
    return path


def call(*arguments: object):
    """By the whole program: click keeps the help options of a command as they were where it was first called."""
    return CliRunner().invoke(command, ["data", *map(str, arguments)])


def test_build_then_check(tmp_path: Path, book: Path) -> None:
    result = call("build", book, "--out", tmp_path / "out", "--vocab-size", 400, "--json")
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout.splitlines()[-1])
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "tokenizer of 400 pieces, identity" in result.stdout
    assert manifest["splits"]["val"]["documents"] >= 1
    result = call("check", tmp_path / "out", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout.splitlines()[-1]) == {"errors": 0, "findings": []}


def test_options_reach_the_build(tmp_path: Path, book: Path, texts: list[str]) -> None:
    (tmp_path / "val.jsonl").write_text(json.dumps({"body": texts[0]}) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": one}) + "\n" for one in texts))
    result = call(
        *("build", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--val", tmp_path / "val.jsonl"),
        *("--normalization", "nmt_nfkc", "--vocab-size", 400, "--field", "body", "--shard-tokens", 900, "--seed", 3),
    )
    assert result.exit_code == 0, result.output
    assert "train: 1 documents were left out, as val has the same text" in result.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    asked = {"field": "body", "seed": 3, "val_fraction": 0.0, "shard_tokens": 900}
    assert {key: manifest["settings"][key] for key in asked} == asked
    assert manifest["tokenizer"]["normalization"] == "nmt_nfkc"
    assert isinstance(call("build", book, "--out", tmp_path / "out").exception, UserError)  # of other text
    assert call("build", book, "--out", tmp_path / "out", "--vocab-size", 400, "--replace").exit_code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    result = call("build", book, "--out", tmp_path / "two", "--tokenizer", tmp_path / "out" / "tokenizer.model")
    assert result.exit_code == 0
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["tokenizer"] == manifest["tokenizer"]


def test_cleaning_and_transforms_reach_the_build(tmp_path: Path, texts: list[str]) -> None:
    documents = [*texts, texts[3], "too short"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    language, _ = Counter(py3langid.classify(one)[0] for one in texts).most_common(1)[0]  # of made-up words
    result = call(
        *("build", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--vocab-size", 420, "--transform", "caseops"),
        *("--dedup", "near", "--near-threshold", 0.9, "--min-chars", 10, "--language", language),
    )
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    asked = {"transform": "caseops", "dedup": "near", "near_threshold": 0.9, "min_chars": 10, "language": language}
    assert {key: manifest["settings"][key] for key in asked} == asked
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    left_out = sum(split[why] for split in (train, val) for why in ("short_documents", "other_language", "repeated"))
    assert train["documents"] + val["documents"] == len(documents) - left_out
    assert train["short_documents"] + val["short_documents"] == 1
    assert "documents were left out, as they are shorter than 10 characters" in result.stdout
    assert call("check", tmp_path / "out").exit_code == 0


def test_options_that_nothing_would_read_are_refused(tmp_path: Path, book: Path, tokenizer: Tokenizer) -> None:
    """Even with the value that they have by default: whoever gives one believes that it does something."""
    model, val, named = tmp_path / "given.model", tmp_path / "val.txt", tmp_path / "named"
    model.write_bytes(tokenizer.proto)
    val.write_text("kalo mi te ru sa no")
    named.mkdir()
    for name in ("train.txt", "val.txt"):
        (named / name).write_text(book.read_text())
    before = listing(tmp_path)
    for source, options, message in (
        (book, ("--tokenizer", model, "--vocab-size", 1024), "vocab_size = 1024 is for a tokenizer that is trained"),
        (book, ("--tokenizer", model, "--normalization", "identity"), "normalization = identity is for a tokenizer"),
        (book, ("--near-threshold", 0.7), "near_threshold = 0.7 is for dedup = 'near', and dedup = 'none'"),
        (book, ("--dedup", "exact", "--near-threshold", 0.8), "near_threshold = 0.8 is for dedup = 'near'"),
        (book, ("--val", val, "--val-fraction", 0.05), "val_fraction = 0.05 is of documents that have no split"),
        (named, ("--val-fraction", 0.1), "val_fraction = 0.1 is of documents that have no split"),
    ):
        error = call("build", source, "--out", tmp_path / "out", *options).exception
        assert isinstance(error, UserError)
        assert message in str(error)
    assert listing(tmp_path) == before


def test_the_help_states_the_defaults() -> None:
    output = " ".join(call("build", "--help").stdout.split())
    for default in (build.VOCAB_SIZE, build.NORMALIZATION, build.VAL_FRACTION, clean.NEAR_THRESHOLD):
        assert f"by default {default}" in output


def test_a_damaged_folder_is_no_success(tmp_path: Path, book: Path) -> None:
    call("build", book, "--out", tmp_path / "out", "--vocab-size", 400)
    (tmp_path / "out" / "fineweb_val_000000.bin").unlink()
    result = call("check", tmp_path / "out", "--json")
    assert result.exit_code == 1
    assert "error: fineweb_val_000000.bin is missing" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["errors"] == 1


def test_mistakes_are_user_errors_and_leave_nothing(tmp_path: Path, book: Path) -> None:
    before = listing(tmp_path)
    for arguments in (
        ("build", tmp_path / "gone.txt", "--out", tmp_path / "out"),
        ("build", book, "--out", tmp_path / "out", "--vocab-size", 70_000),
        ("build", book, "--out", book),
        ("check", tmp_path / "gone"),
    ):
        assert isinstance(call(*arguments).exception, UserError)
    assert call("build", book).exit_code == 2  # no --out
    assert listing(tmp_path) == before


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from epigram.cli.data import command; command(['build', '--help'], standalone_mode=False);"
        "print(sorted({'torch', 'numpy', 'sentencepiece', 'pyarrow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "--normalization" in result.stdout


def test_exit_codes_of_the_real_command(tmp_path: Path, book: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        words = [sys.executable, "-m", "epigram", "data", *map(str, arguments)]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        return result.returncode, result.stderr

    code, errors = run("build", tmp_path / "gone.txt", "--out", tmp_path / "out")
    assert (code, errors) == (2, f"epigram: there is no file or folder {tmp_path / 'gone.txt'}: check the path\n")
    assert run("build", book, "--out", tmp_path / "out", "--vocab-size", 400) == (0, "")
    assert run("check", tmp_path / "out") == (0, "")
    (tmp_path / "out" / "documents_val.bin").unlink()
    assert run("check", tmp_path / "out") == (1, "")
