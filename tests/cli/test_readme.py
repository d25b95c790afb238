"""What README.md tells a user to type is what the program takes."""

import json
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

import epigram
from epigram.cli.main import command
from epigram.config import load_recipe, recipe_names

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", README, re.DOTALL))
LINES = sorted(
    {*re.findall(r"^(?:torchrun .*-m )?(epigram [^#\n]+)", BLOCKS, re.MULTILINE)}
    | {*re.findall(r"`(epigram [^`\n]+)`", README)}
)


def test_there_are_such_lines():
    assert len(LINES) > 10
    assert any("--gpus 8" in line for line in LINES)


@pytest.mark.parametrize("line", LINES)
def test_each_is_accepted(line: str, monkeypatch):
    """Up to the work itself: names, options and values are known."""
    typed = line.replace("...", "").partition(" > ")[0]  # the rest is the shell's
    words = shlex.split(typed)[1:]
    called: list[dict] = []
    group = command
    names = []
    while isinstance(group, click.Group):
        names.append(words[len(names)])
        group = group.commands[names[-1]]  # type: ignore[assignment]
    monkeypatch.setattr(group, "callback", lambda **options: called.append(options))
    command.main(words, standalone_mode=False)
    (options,) = called
    for name in [options["recipe"]] if options.get("recipe") not in (None, "RECIPE") else []:
        load_recipe(name, options.get("overrides", ()))


def test_every_setting_it_names_exists():
    settings = re.findall(r"--set '?([\w.]+=[^\s'`]+)", README)
    assert len(settings) >= 4
    for setting in settings:
        load_recipe("demo", [setting])


def test_a_gpu_with_less_memory_computes_a_lane_in_parts():
    (text,) = re.findall(r"A GPU with less memory .*?\n\n", README, re.DOTALL)
    config = load_recipe("h100", re.findall(r"--set\s(\S+?)[`\s]", text))
    assert config.flat_lanes[0].parts(config.run.micro_tokens) == 3


def test_every_recipe_is_in_its_table():
    for name in recipe_names():
        assert f"`{name}`" in README, name


def test_every_command_is_in_its_table():
    for name, child in command.commands.items():
        for inner in getattr(child, "commands", {"": None}):
            assert f"`epigram {name} {inner}".rstrip() in README, name


def test_the_python_example_runs(finished: Path, tmp_path: Path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    older, newest = (tmp_path / "runs" / f"demo-20260101-00000{second}" for second in (1, 2))
    older.mkdir(parents=True)
    shutil.copytree(finished, newest)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    model = epigram.load(finished)
    assert str(model.score("Return a copy of the object.").bpb) in printed
    assert f"torch.Size([{len(model.tokenizer.encode('def')) + 1}, 512])" in printed


def test_its_figures_of_the_demo_are_those_of_the_committed_run():
    result = json.loads((Path(__file__).parents[2] / "docs" / "results" / "demo" / "result.json").read_text("utf-8"))
    packed, whole = result["scores"]["quantized"], result["scores"]["float"]
    compressed = {row["label"]: row["bpb"] for row in result["compressors"]}
    expected = {
        f"packed model of {result['artifact_bytes']:,} bytes, sliding window": [packed["sliding"]["val_bpb"]],
        "epigram, packed model, blocks": [packed["blocks"]["val_bpb"]],
        "epigram, float model, blocks": [whole["blocks"]["val_bpb"]],
    }
    for name in ("brotli 11", "xz -9e", "zstd -19"):
        expected[f"{name}, alone"] = [compressed[f"{name}, alone"], compressed[f"{name}, primed"]]
    for label, scores in expected.items():
        (line,) = [line for line in README.splitlines() if line.startswith("|") and label in line]
        assert re.findall(r"\b\d\.\d{3}\b", line) == [f"{score:.3f}" for score in scores], label
    assert f"{result['train_s']:.0f} s of it training" in README


def test_the_files_it_points_to_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (Path(__file__).parents[2] / link).exists(), link
