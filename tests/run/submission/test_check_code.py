"""`epigram check`: what is found in scripts without running them."""

from pathlib import Path

import pytest
from check_helpers import another_script, change, count_script, found

from epigram.config import load_recipe
from epigram.run.submission.bundle import foreign_statement, single_file
from epigram.run.submission.rules import code as code_rules
from epigram.run.submission.rules.code import dangers

ENTRY = "    main(__file__)\n"


@pytest.fixture(autouse=True)
def without_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epigram.run.submission.check.probe", lambda path, kind: iter(()))


def in_script(folder: Path, old: str, new: str) -> None:
    change(folder / "train_gpt.py", old, new)
    count_script(folder)


@pytest.mark.parametrize("form", ["readable", "packed"])
def test_our_script_is_ours_in_both_forms(form: str):
    """Whatever letters the summary has, and whatever is written at the top."""
    config = load_recipe("smoke", ['summary="a → b and ü"'])
    script = single_file(config, form).decode("latin-1" if form == "packed" else "utf-8")
    assert foreign_statement(script) is None
    assert foreign_statement(script.replace('"""smoke: ', '"""another: ', 1)) is None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (ENTRY, "    import urllib.request\n" + ENTRY, "if __name__ == '__main__':"),
        (ENTRY, "", "if __name__ == '__main__':"),
        (ENTRY, ENTRY + "print(1)\n", "print(1)"),
        ("EPIGRAM_SINGLE_FILE = 1\n", "EPIGRAM_SINGLE_FILE = 1\nFILES = {}\n", "FILES = json.loads"),
        ('.encode("latin-1")))\n', '.encode("latin-1"))) or {}\n', "FILES = json.loads"),
        ("json.loads(bz2", "(lambda text: json.loads(text))(bz2", "FILES = (lambda text"),
        ('prefix="train_gpt-"', 'prefix="other-"', "def unpack():"),
    ],
)
def test_a_script_of_ours_with_another_head(record: Path, old: str, new: str, words: str):
    in_script(record, old, new)
    assert words in found(record)["code.head"]


def test_a_script_of_ours_with_another_recipe(record: Path):
    config = load_recipe("smoke", ["schedule.warmdown_frac=0.9", "optim.muon.lr_early=0.5"])
    (record / "train_gpt.py").write_bytes(single_file(config, "packed"))
    count_script(record)
    findings = found(record)
    assert "another recipe than train_seed1.log" in findings["code.recipe"]
    assert "optim.muon.lr_early" in findings["code.recipe"] and "schedule.warmdown_frac" in findings["code.recipe"]
    assert "code.head" not in findings


@pytest.mark.parametrize("recipes", [{}, {"a": "seed = 1\n", "b": "seed = 1\n"}, {"a": "seed =\n"}])
def test_a_script_of_ours_without_a_recipe_of_its_own(record: Path, recipes: dict[str, str]):
    files = {f"epigram/recipes/{name}.toml": text for name, text in recipes.items()}
    another_script(record, f"EPIGRAM_SINGLE_FILE = 1\nFILES = {files!r}\n")
    assert "holds no single recipe" in found(record)["code.recipe"]


def test_what_differs_in_the_package_is_read(record: Path, monkeypatch):
    """What this release does itself, in the same place, is not told of."""
    ours = {"epigram/a.py": "import subprocess\n", "epigram/b.py": "x = 1\n"}
    theirs = {"epigram/a.py": "import subprocess\ny = 2\n", "epigram/b.py": "import os\nos.system('curl x')\n"}
    monkeypatch.setattr(code_rules, "shipped_sources", lambda: ours)
    another_script(record, f"EPIGRAM_SINGLE_FILE = 1\nFILES = {theirs!r}\n")
    assert found(record)["code.process"] == "epigram/b.py in train_gpt.py uses os.system"


@pytest.mark.parametrize(
    ("text", "rule", "words"),
    [
        ("import subprocess", "code.process", "imports subprocess"),
        ("import os\nos.system('ls')", "code.process", "uses os.system"),
        ("import os as o\no.popen('ls')", "code.process", "uses os.popen"),
        ("from os import execvp as run\nrun('ls', [])", "code.process", "uses os.execvp"),
        ("import ctypes", "code.process", "imports ctypes"),
        ("def f():\n    from socket import socket", "code.network", "imports socket"),
        ("import urllib.request", "code.network", "imports urllib"),
        ("import torch as t\nt.load('m')", "code.pickle", "calls torch.load"),
        ("from pickle import loads\nloads(b'')", "code.pickle", "calls pickle.loads"),
        ("exec(text)", "code.hidden", "uses exec"),
        ("import importlib\nimportlib.import_module('so' + 'cket')", "code.hidden", "uses importlib.import_module"),
    ],
)
def test_what_a_script_reaches_for(text: str, rule: str, words: str):
    assert list(dangers(text)) == [(rule, words)]


def test_what_is_harmless_is_not_told_of():
    text = (
        "import os, re\nfrom os import path\nre.compile('x')\nmodel.eval()\nos.path.join('a', 'b')\ntorch.compile(f)\n"
    )
    assert list(dangers(text)) == []


@pytest.mark.parametrize("code", ["x = " + "(" * 300, "x = a" + ".b" * 9_000, "x = 1\0", "x = " + "-" * 90_000 + "1"])
def test_a_script_that_no_parser_takes_is_found_and_no_crash(record: Path, code: str):
    another_script(record, code)
    assert "cannot be parsed" in found(record)["code.syntax"]


def test_code_beside_the_script_is_read_too(record: Path):
    (record / "helper.py").write_text("import subprocess\n")
    (record / "run.sh").write_text("curl x\n")
    findings = found(record)
    assert findings["code.process"] == "helper.py imports subprocess"
    assert "run.sh is code that was not read" in findings["code.hidden"]


def test_a_script_of_others_beside_our_logs(record: Path):
    another_script(record, "import torch\n")
    assert "is no script of epigram's" in found(record)["code.foreign"]
