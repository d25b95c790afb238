"""Every command: help, exit codes, one sentence for a user's mistake, one JSON document for a program."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli_helpers import Outcome, Shell
from run_helpers import SHORT, result_of, write_text

from epigram.cli.main import command, share_processors
from epigram.config import load_recipe, recipe_names
from epigram.run.api import load
from epigram.run.doctor import Finding

PUBLISHED = {"pr1212": 29_751_910, "pr1130": 27_605_108, "pr1019": 27_067_484, "pr549": 26_928_220}
SETTINGS = [argument for setting in SHORT for argument in ("--set", setting)]


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it."""
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name, child in group.commands.items():
        found.append(((*path, name), child))
        if isinstance(child, click.Group):
            found += commands(child, (*path, name))
    return found


COMMANDS = commands(command)


def document(outcome: Outcome) -> dict:
    """The last line of standard output, which must be all of the JSON there is."""
    *before, last = outcome.out.rstrip("\n").split("\n")
    assert not any(line.startswith(("{", "[")) for line in before)
    return json.loads(last)


def assert_one_sentence(outcome: Outcome, *parts: str) -> None:
    """Exit code 2, nothing but one line on standard error, and that says what is wrong."""
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.err.splitlines() if not line.startswith(("Usage:", "Try ")) and line]
    assert len(lines) == 1, outcome.err
    for part in parts:
        assert part in lines[0]


# -- help -------------------------------------------------------------------------------------------------------------


def test_these_are_the_commands():
    assert {" ".join(words) for words, _ in COMMANDS} == {
        "train", "export", "score", "generate", "data", "data build", "data check", "data fetch", "describe", "compare",
        "report", "submit", "check", "bench", "doctor",
    }  # fmt: skip


@pytest.mark.parametrize(("words", "wanted"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_help(shell: Shell, words: tuple[str, ...], wanted: click.Command):
    found = shell(*words, "--help")
    assert (found.code, found.err) == (0, "")
    assert found.out.startswith(f"Usage: epigram {' '.join(words)}")
    for parameter in wanted.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in found.out
            assert parameter.help or parameter.show_default, f"{words}: {parameter.opts} explains nothing"
    assert shell(*words, "-h") == found


def test_the_program_itself(shell: Shell):
    assert shell("--help").code == 0
    assert "epigram train demo" in shell("-h").out
    assert shell("--version").out.startswith("epigram, version 0.")
    assert shell().code == 2
    assert_one_sentence(shell("tran"), "No such command 'tran'")
    assert_one_sentence(shell("train", "smoke", "--nonsense"), "No such option")


def test_as_a_module_and_as_a_script():
    done = subprocess.run([sys.executable, "-m", "epigram", "--help"], capture_output=True, text=True, check=True)
    assert "Train the best language model" in done.stdout


def test_an_output_without_the_letters_of_tables(shell: Shell, tmp_path: Path):
    """As on Windows, where the output goes to a file."""
    recipe = shell("describe", "smoke", "--toml").out
    (tmp_path / "mine.toml").write_text(re.sub('summary = "[^"]*"', 'summary = "┌──┐"', recipe), "utf-8")
    words = [sys.executable, "-m", "epigram", "describe", str(tmp_path / "mine.toml")]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b": ????\n" in done.stdout


def test_waiting_threads_leave_the_processors_to_others(shell: Shell, monkeypatch):
    """torch reads it when it is first imported, which no command line does before."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what main sets goes when the test ends
        monkeypatch.delenv(name)
    shell("--version")
    assert 0 < int(os.environ["GOMP_SPINCOUNT"]) < 100_000
    chosen = {"OMP_WAIT_POLICY": "active"}
    share_processors(chosen)
    assert chosen == {"OMP_WAIT_POLICY": "active"}
    code = "import sys, epigram.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- exit codes -------------------------------------------------------------------------------------------------------


def raising(error: BaseException):
    def callback(**options: object) -> None:
        raise error

    return callback


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "epigram: interrupted"),
        (click.exceptions.Exit(1), 1, ""),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/x"), 2, "epigram: runs/a/x: No space left on device"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "epigram: a file: No space left on device"),
    ],
)
def test_how_a_command_ends(shell: Shell, monkeypatch, error: BaseException, code: int, said: str):
    monkeypatch.setattr(command.commands["describe"], "callback", raising(error))
    found = shell("describe")
    assert (found.code, found.err.strip()) == (code, said)


def test_an_error_of_ours_is_not_hidden(shell: Shell, monkeypatch):
    monkeypatch.setattr(command.commands["describe"], "callback", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        shell("describe")


def test_a_machine_with_a_problem(shell: Shell, monkeypatch):
    bad = Finding(part="storage", name="disk", status="problem", value="full", advice="make room")
    monkeypatch.setattr("epigram.run.doctor.examine", lambda out: [bad])
    found = shell("doctor", "--json")
    assert (found.code, document(found)["problems"]) == (1, 1)
    monkeypatch.setattr("epigram.run.doctor.examine", lambda out: [])
    assert shell("doctor").code == 0


# -- what a user gets wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "smokee"], ["no recipe 'smokee'", "choose one of", "smoke"]),
        (["train", "nowhere.toml"], ["no file 'nowhere.toml'", "or give a .toml file"]),
        (["train", "smoke", "--set", "artifact.codec=zip"], ["there is no 'zip' in codecs", "brotli, entropy, store"]),
        (["train", "smoke", "--set", "run.attention=f9"], ["there is no 'f9' in attention: choose one of auto, "]),
        (["train", "smoke", "--set", "model.layers=3"], ["unknown key model.layers"]),
        (["train", "smoke", "--set", "model"], ["not of the form section.key=value"]),
        (["train", "smoke", "--set", "model.xsa_layers=[9]", "--set", "seed=-1"], ["xsa_layers = [9]"]),
        (["train", "smoke", "--seed", "-1"], ["seed = -1"]),
        (["train", "smoke", "--device", "tpu"], ["there is no device 'tpu'"]),
        (["train", "smoke", "--data", "nowhere"], ["nowhere"]),
        (["train", "smoke", "--until", "lunch"], ["--until"]),
        (["train", "smoke", "--gpus", "0"], ["--gpus"]),
        (["train", "smoke", "--resume", "x"], ["--resume goes on with a run's own recipe"]),
        (["train", "--out", "y", "--resume", "x"], ["--resume goes on with a run's own recipe"]),
        (["train", "--resume", "nowhere"], ["nowhere is no run folder"]),
        (["train", "smoke", "--set", "budget.clock=replay", "--set", "budget.steps=0"], ["replay = ''"]),
        (["export", "nowhere"], ["nowhere is no run folder"]),
        (["score", "nowhere", "--data", "x"], ["there is no model at nowhere"]),
        (["score", "nowhere"], ["--data"]),
        (["score", "nowhere", "--data", "x", "--seq-len", "0"], ["--seq-len"]),
        (["describe", "--list", "--json"], ["--json goes with neither --list nor --toml"]),
        (["check", ".", "--train-limit", "nan"], ["--train-limit", "nan is no number of seconds"]),
        (["check", ".", "--score-limit", "-1"], ["--score-limit"]),
        (["check", "."], ["is no record folder: it has no train_gpt.py, no submission.json and no log"]),
        (["score", "nowhere", "--data", "x", "--stride", "0"], ["--stride"]),
        (["score", "nowhere", "--data", "x", "--method", "blocks", "--stride", "7"], ["--stride", "--method sliding"]),
        (["score", "nowhere", "--data", "x", "--method", "sliding", "--overlap", "1"], ["--method streaming"]),
        (["score", "nowhere", "--data", "x", "--adapt", "sgd", "--segment-tokens", "9"], ["--method streaming"]),
        (["score", "nowhere", "--data", "x", "--set", "score.adapt.sgd.lr=1"], ["say --adapt sgd or --adapt lora"]),
        (["score", "nowhere", "--data", "x", "--adapt", "sgd", "--set", "score.adapt.kind=lora"], ["--adapt sgd says"]),
        (["generate", "nowhere"], ["there is no model at nowhere"]),
        (["generate", "nowhere", "--tokens", "0"], ["--tokens"]),
        (["describe", "pr1212", "--gpus", "9"], ["use 1 to 8 processes"]),
        (["describe", "nonsense"], ["no recipe 'nonsense'"]),
        (["describe", "smoke", "--set", "model.mlp_dim=99999999999999999999"], ["model.mlp_dim: 9", "is out of range"]),
        (["describe", "smoke", "--set", "model.mlp_dim=9223372036854775807"], ["weights: at most 2^40"]),
        (["train", "smoke", "--set", "budget.train_s=inf"], ["budget.train_s: inf is out of range"]),
        (["report", "nowhere"], ["there is no folder nowhere"]),
        (["data", "build", "nowhere", "--out", "d"], ["nowhere"]),
        (["data", "check", "nowhere"], ["nowhere"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(shell: Shell, tmp_path: Path, monkeypatch, arguments: list[str], parts: list[str]):
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(shell(*arguments), *parts)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".cache"] == [], "nothing is left behind"


def test_a_vocabulary_that_does_not_fit(shell: Shell, data_path: Path, tmp_path: Path):
    found = shell("train", "demo", "--data", data_path, "--out", tmp_path / "run")
    wanted = load_recipe("demo").model.vocab_size
    assert_one_sentence(found, f"vocabulary of 512, the recipe {wanted}", "set model.vocab_size=512")


def test_sampling_that_cannot_be(shell: Shell, finished: Path):
    found = shell("generate", finished, "--seed", "99999999999999999999", "--temperature", "-1")
    assert_one_sentence(found, "temperature = -1.0 must be", "seed = 99999999999999999999 must be below 2^63")
    for settings in (["--temperature", "1e-40"], ["--top-p", "1e-50"]):
        assert shell("generate", finished, "--tokens", "3", *settings).code == 0


def test_a_folder_in_use(shell: Shell, data_path: Path, finished: Path):
    found = shell("train", "smoke", "--data", data_path, "--out", finished)
    assert_one_sentence(found, f"{finished} is not empty")


def test_a_run_ends_with_what_can_be_done_next(shell: Shell, data_path: Path, finished: Path, tmp_path: Path):
    """Each command that it names is one that works on the run."""
    run = tmp_path / "a run"
    trained = shell("train", "smoke", "--data", data_path, "--out", run, "--until", "train", *SETTINGS)
    assert f"The run is in '{run}'." in trained.out
    (line,) = [line for line in trained.out.splitlines() if line.startswith("  epigram")]
    exported = shell(*shlex.split(line.split("  ")[1])[1:])
    assert exported.code == 0
    assert f"The run is in '{run / 'export-1'}'." in exported.out
    lines = [line.split("  ")[1] for line in exported.out.splitlines() if line.startswith("  epigram")]
    assert [shlex.split(line)[1] for line in lines] == ["generate", "report"]
    for line in lines:
        assert shell(*shlex.split(line)[1:]).code == 0


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_printed_is_a_recipe(shell: Shell, tmp_path: Path, name: str):
    (tmp_path / "mine.toml").write_text(shell("describe", name, "--set", "seed=9", "--toml").out)
    assert load_recipe(str(tmp_path / "mine.toml")) == load_recipe(name, ["seed=9"])


def test_the_summary_of_the_demo_says_its_time(shell: Shell):
    minutes = load_recipe("demo").budget.train_s / 60
    words = {2.0: "two", 2.5: "two and a half", 3.0: "three"}[minutes]
    assert f"laptop's CPU in {words} minutes\n" in shell("describe", "--list").out


def test_over_a_limit(shell: Shell, finished: Path, tmp_path: Path):
    found = shell("export", finished, "--out", tmp_path / "out", "--set", "artifact.cap_bytes=20000", "--json")
    assert_one_sentence(found, "too many bytes", "artifact.over_cap", str(tmp_path / "out"))
    assert result_of(tmp_path / "out")["status"] == "finished"
    assert (tmp_path / "out" / "model.epigram").exists()


def test_over_time(shell: Shell, data_path: Path, tmp_path: Path):
    """A second of training, of which nothing is kept for calibration."""
    wall = ("budget.clock=wall", "budget.steps=0", "budget.train_s=0.3", "budget.calibrate_s=0")
    settings = [argument for setting in wall for argument in ("--set", setting)]
    found = shell("train", "smoke", "--data", data_path, "--out", tmp_path / "run", *SETTINGS, *settings)
    assert_one_sentence(found, "training, calibration and quantization took", "s of 0.3 s: raise budget.calibrate_s")
    assert result_of(tmp_path / "run")["status"] == "finished"


# -- results for programs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_describe(shell: Shell, name: str):
    found = document(shell("describe", name, "--json"))
    assert found["recipe"] == name
    assert found["parameters"] == PUBLISHED.get(name, found["parameters"]) == sum(found["parameters_by_part"].values())


def test_describe_with_changes(shell: Shell):
    small = document(shell("describe", "smoke", "--set", "model.bigram_buckets=0", "--json"))
    assert small["parameters"] == document(shell("describe", "smoke", "--json"))["parameters"] - 251 * 16 - 64 * 16 - 1
    listed = shell("describe", "--list").out.splitlines()
    assert [line.split()[0] for line in listed] == recipe_names()


def test_train_score_generate_report(shell: Shell, data_path: Path, tmp_path: Path):
    """The whole way, each step as a user takes it."""
    run = tmp_path / "run"
    trained = shell("train", "smoke", "--data", data_path, "--out", run, "--seed", "5", "--json", *SETTINGS)
    result = document(trained)
    stored = result_of(run)
    assert {**result, "run": None} == {
        "run": None,
        **{k: v for k, v in stored.items() if k not in ("status", "wall_s")},
    }
    assert (result["run"], result["seed"]) == (str(run), 5)
    assert "final_quantized_sliding_exact" in trained.out

    scored = shell("score", run, "--data", data_path, "--stride", 64, "--json")
    for method in ("blocks", "sliding"):
        row, line = document(scored)["scores"][method], result["scores"]["quantized"][method]
        assert row["val_bpb"] == pytest.approx(line["val_bpb"], rel=1e-6)
        assert f"final_{method}_exact val_loss:{row['val_nats']:.8f} val_bpb:{row['val_bpb']:.8f}" in scored.out
    only = document(shell("score", run / "model.epigram", "--data", data_path, "--method", "blocks", "--json"))
    assert list(only["scores"]) == ["blocks"]

    text = shell("generate", run, "--prompt", "A dog", "--tokens", 5, "--seed", 7).out
    assert text == "A dog" + load(run).generate("A dog", 5, seed=7) + "\n"
    assert shell("generate", run, "--tokens", 3, "--temperature", 0).out == shell("generate", run, "--tokens", 3,
                                                                                  "--top-k", 1).out  # fmt: skip
    assert_one_sentence(shell("generate", run, "--temperature", -1), "temperature = -1.0 must be 0")

    assert document(shell("report", run, "--json"))["runs"] == ["run"]
    assert (run / "report.html").exists()
    exported = document(shell("export", run, "--set", "quant.method=rtn", "--set", "artifact.codec=brotli", "--json"))
    assert exported["run"] == str(run / "export-1")


def test_the_last_checkpoint_can_be_scored(shell: Shell, data_path: Path, finished: Path):
    found = document(
        shell("score", finished / "checkpoints" / "step-00000008", "--data", data_path, "--stride", 64, "--json")
    )
    expected = result_of(finished)["scores"]["float"]["blocks"]["val_nats"]
    assert found["scores"]["blocks"]["val_nats"] == pytest.approx(expected, rel=1e-6)


def test_text_is_scored_with_the_tokenizer_of_the_model(shell: Shell, finished: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "new.txt", 300, seed=4)
    found = document(shell("score", finished, "--data", "new.txt", "--method", "blocks", "--json"))
    text, row = (tmp_path / "new.txt").read_text(), found["scores"]["blocks"]
    assert row["bytes"] == len(text.encode())
    assert row["val_bpb"] == pytest.approx(load(finished).score(text[:2000]).bpb, rel=0.2)
    scored = shell("score", finished, "--data", "new.txt", "--method", "blocks").out
    assert f"blocks: {row['tokens']:,} tokens, {row['bytes']:,} bytes of text were scored" in scored
    assert_one_sentence(
        shell("score", finished, "--data", "new.txt", "--split", "train"), "new.txt is text, all of which is scored"
    )


def test_scoring_with_data_of_another_tokenizer(shell: Shell, finished: Path, tmp_path: Path):
    from epigram.data.build import build

    write_text(tmp_path / "other.txt", 300, seed=9)
    build([tmp_path / "other.txt"], tmp_path / "other", vocab_size=512, workers=1)
    assert_one_sentence(
        shell("score", finished, "--data", tmp_path / "other"), "another tokenizer than the model's: build it again"
    )


def test_going_on(shell: Shell, data_path: Path, finished: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    found = shell("train", "--resume", run, "--set", "budget.steps=9", "--until", "train", "--json", "--device", "cpu")
    assert document(found)["steps"] == 9
    (run / "result.json").unlink()
    assert shell("train", "--resume", run, "--until", "train").code == 0


def test_a_model_that_rounding_destroys_is_mended_by_the_command_that_the_run_names(
    shell: Shell, data_path: Path, tmp_path: Path
):
    """A floor far above all weights leaves codes of zero."""
    run = tmp_path / "a run"
    floor = ("--set", "quant.grid.clip=search", "--set", "quant.grid.floor=40.0")
    trained = shell("train", "smoke", "--data", data_path, "--out", run, "--device", "cpu", *SETTINGS, *floor)
    assert trained.code == 0, trained.err
    (warning,) = (line for line in trained.out.splitlines() if "rounding the weights cost" in line)
    assert warning.startswith("warning: ")
    assert warning in (run / "log.txt").read_text().splitlines()
    assert "in 100 % of its rows quant.grid.floor sets the step" in warning
    epigram, *arguments = shlex.split(warning[warning.rindex("epigram export") :])
    assert (epigram, arguments[:2]) == ("epigram", ["export", str(run)])
    exported = shell(*arguments)
    assert exported.code == 0, exported.err
    assert "rounding the weights cost" not in exported.out
    before, after = result_of(run)["scores"], result_of(run / "export-1")["scores"]
    assert after["float"]["blocks"]["val_nats"] == before["float"]["blocks"]["val_nats"], "the same weights"
    assert before["quantized"]["blocks"]["val_bpb"] > before["float"]["blocks"]["val_bpb"] + 0.5
    assert after["quantized"]["blocks"]["val_bpb"] < after["float"]["blocks"]["val_bpb"] + 0.01
