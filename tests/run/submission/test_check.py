"""`epigram check`: nothing is found in what submit made, and each broken folder gives the finding that it should."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from check_helpers import LIMITS, another_script, change, drop_from_log, drop_json, found, set_json

from epigram.errors import UserError
from epigram.model import gpt
from epigram.model.gpt import GPT
from epigram.run import probe
from epigram.run.setup import Losses
from epigram.run.submission import conditions
from epigram.run.submission.check import check
from epigram.run.submission.findings import RULES
from epigram.run.submission.logs import parse_log
from epigram.run.submission.rules import code as code_rules
from epigram.run.submission.rules.limits import Limits
from epigram.run.weights import load_model


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def logged_bpb(folder: Path) -> str:
    row = json.loads((folder / "submission.json").read_text())["seed_results"]["1"]
    return f"{row['val_bpb']:.8f}"


def set_nats(folder: Path, seed: int, loss: str) -> None:
    """Of the score that counts."""
    log = folder / f"train_seed{seed}.log"
    text, count = re.subn(r"(final_quantized_sliding_exact val_loss:)\S+", rf"\g<1>{loss}", log.read_text())
    assert count
    log.write_text(text)


def changed_row(folder: Path) -> None:
    rows = json.loads((folder / "submission.json").read_text())["seed_results"]
    rows["1"]["val_bpb"] -= 0.01
    set_json(folder, seed_results=rows)


BROKEN: dict[str, Callable[[Path], None]] = {
    "files.missing": lambda f: remove(f, "requirements.txt"),
    "json.unreadable": lambda f: (f / "submission.json").write_text("{"),
    "json.fields": lambda f: drop_json(f, "github_id"),
    "json.mean": lambda f: set_json(f, val_bpb=1.0),
    "log.missing": lambda f: [path.unlink() for path in f.glob("*.log")],
    "log.score": lambda f: drop_from_log(f, "_exact"),
    "log.seeds": lambda f: set_json(f, seeds=[1, 2]),
    "log.json": changed_row,
    "log.readme": lambda f: change(f / "README.md", logged_bpb(f), "1.00000000"),
    "size.counted": lambda f: set_json(f, bytes_code=34_101),
    "size.artifact": lambda f: shutil.copyfile(f / "model_seed2.epigram", f / "model_seed1.epigram"),
    "time.train": lambda f: change(f / "train_seed2.log", " train_s:", " train_s:60"),
    "time.score": lambda f: change(f / "train_seed2.log", " score_s:", " score_s:60"),
    "time.unknown": lambda f: drop_from_log(f, "final_times"),
    "calibration.source": lambda f: change(f / "train_seed3.log", "kind:train split:train", "kind:text split:val"),
    "calibration.unknown": lambda f: drop_from_log(f, "final_calibration"),
    "code.syntax": lambda f: another_script(f, "def f(:\n"),
    "code.requirements": lambda f: change(f / "requirements.txt", "sentencepiece", "something-else"),
    "code.network": lambda f: another_script(f, "import urllib.request\n"),
    "code.pickle": lambda f: another_script(f, "import torch\nw = torch.load('m')\n"),
    "significance.seeds": lambda f: [p.unlink() for p in f.glob("*seed3*")],
}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("key", ["val_bpb", "val_loss", "bytes_total"])
def test_what_is_no_number_is_no_json(record: Path, key: str, value: str):
    set_json(record, **{key: float(value.replace("Infinity", "inf"))})
    assert value in (record / "submission.json").read_text()
    assert f"{value} is no number of JSON" in found(record)["json.unreadable"]


@pytest.mark.parametrize(
    ("key", "rule"), [("val_bpb", "json.fields"), ("bytes_code", "size.counted"), ("bytes_total", "size.counted")]
)
def test_an_infinite_figure_agrees_with_nothing(record: Path, key: str, rule: str):
    """1e999 is JSON, and no finite number; text is none either."""
    for text in ("1e999", '"1.0"'):
        values = json.loads((record / "submission.json").read_text())
        values[key] = "HERE"
        (record / "submission.json").write_text(json.dumps(values).replace('"HERE"', text))
        assert rule in found(record), text


def test_an_infinite_row_agrees_with_no_log(record: Path):
    rows = json.loads((record / "submission.json").read_text())["seed_results"]
    rows["1"]["val_bpb"] = "HERE"
    set_json(record, seed_results=rows)
    change(record / "submission.json", '"HERE"', "1e999")
    assert "seed 1: val_bpb is inf" in found(record)["log.json"]


def test_what_submit_made_is_valid(good: Path):
    """With its script trained and scored in a tiny setting, without a network."""
    result = check(good, limits=LIMITS, run_script=True)
    assert result["findings"] == []
    assert (result["valid"], result["executed"]) == (True, True)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_folder_has_its_finding(record: Path, rule: str, monkeypatch):
    monkeypatch.setattr("epigram.run.submission.check.probe", lambda path, kind: iter(()))  # tested below
    BROKEN[rule](record)
    assert rule in found(record)


def test_every_rule_is_tested():
    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [rule for rule in RULES if f'"{rule}"' not in here] == []


def test_the_cap_holds_for_each_seed(record: Path):
    """One seed of three is too large; and every file with code counts."""
    code = (record / "train_gpt.py").stat().st_size
    sizes = sorted((record / f"model_seed{seed}.epigram").stat().st_size for seed in (1, 2, 3))
    assert "size.cap" not in found(record, limits=Limits(cap_bytes=code + sizes[-1]))
    assert "1 over the cap" in found(record, limits=Limits(cap_bytes=code + sizes[-1] - 1))["size.cap"]
    (record / "helper.py").write_text("x = 1\n")
    assert "size.cap" in found(record, limits=Limits(cap_bytes=code + sizes[-1]))
    (record / "model_seed2.epigram").unlink()
    rows = check(record, limits=LIMITS)["findings"]
    assert any(row["rule"] == "condition.untested" and "of seed 2 " in row["message"] for row in rows)
    for number in ("nan", "inf", "-5"):
        with pytest.raises(UserError, match="must be a positive number"):
            check(record, limits=LIMITS, against=number)
    for path in record.glob("*.epigram"):
        path.unlink()
    drop_from_log(record, "final_bytes")
    assert "does not say" in found(record)["size.unknown"]
    assert any(row["rule"] == "condition.untested" for row in check(record, limits=LIMITS)["findings"])


def test_another_package_in_the_script_is_noted(record: Path, monkeypatch):
    monkeypatch.setattr(code_rules, "shipped_sources", lambda: {"epigram/loss.py": "x = 1"})
    notes = [row for row in check(record, limits=LIMITS)["findings"] if row["rule"] == "code.package"]
    assert "another package" in notes[0]["message"]


def test_a_record_to_beat(good: Path, record: Path):
    mean = json.loads((good / "submission.json").read_text())["val_loss"]
    assert "significance.record" not in found(good, against=str(mean + 2))
    assert "p = " in found(good, against=str(mean + 0.001))["significance.record"]
    assert "by welch" in found(good, against=str(record))["significance.record"]
    with pytest.raises(UserError, match="there is no record folder"):
        check(good, against="nowhere")


@pytest.mark.parametrize("loss", ["null", '"n/a"', "true", "1e999", "1e308", "0", "-2.0", "1e-200", "1" + 400 * "0"])
def test_a_record_to_beat_whose_figures_no_score_can_be(good: Path, record: Path, loss: str):
    """A second seed, which would be tested against alone or with it, is as it should be."""
    for path in record.glob("*.log"):
        path.unlink()
    set_json(record, seed_results={"1": {"val_loss": "HERE"}, "2": {"val_loss": 5.0}})
    change(record / "submission.json", '"HERE"', loss)
    with pytest.raises(UserError, match="as the val_loss of seed 1, which cannot be: give the record's mean"):
        check(good, limits=LIMITS, against=str(record))


@pytest.mark.parametrize("loss", ["1e999", "1e308", "-5.0"])
def test_a_record_to_beat_whose_logs_say_what_no_score_can_be(good: Path, record: Path, loss: str):
    set_nats(record, 2, loss)
    with pytest.raises(
        UserError, match=r"train_seed2.log has val_loss \S+ and val_bpb \S+ in the end, which cannot be"
    ):
        check(good, limits=LIMITS, against=str(record))


@pytest.mark.parametrize("loss", ["1e999", "1e308", "-5.0", "1e-200"])
def test_our_own_figures_that_no_score_can_be(good: Path, record: Path, loss: str):
    """They are told of, and the test is made of the other seeds."""
    set_nats(record, 2, loss)
    for against in ("1.0", str(good)):
        findings = found(record, against=against)
        assert f"val_loss:{loss}" in findings["log.figure"]
        assert "train_seed2.log has no final score" in findings["log.score"]
        assert findings["significance.seeds"] == "2 seed(s) have a score"
        assert "p = " in findings["significance.record"]


def test_an_unadapted_score_that_cannot_be(good: Path):
    text = (good / "train_seed1.log").read_text()
    assert parse_log(text, "train.log").unadapted is not None
    assert parse_log(re.sub(r"(quantized_sliding_exact val_loss:)\S+", r"\g<1>1e999", text), "x.log").unadapted is None


# -- conditions --------------------------------------------------------------------------------------------------------


def probe_with(good: Path, monkeypatch, loss) -> set[str]:
    """Findings of the probes with another loss in place of the model's."""

    def losses(model, *_):
        windows = lambda tokens, targets, *, rope_len, last: loss(model, tokens, targets, last)  # noqa: E731
        return Losses(windows=windows, stream=lambda method: model.nll)

    monkeypatch.setattr(conditions, "scoring_losses", losses)
    return {finding.rule for finding in conditions.probe(good / "model_seed1.epigram")}


def honest(model, tokens, targets, last):
    return model.nll(tokens, targets, last=last)


def test_an_honest_loss_passes(good: Path, monkeypatch):
    assert probe_with(good, monkeypatch, honest) == set()


def test_a_loss_that_looks_ahead(good: Path, monkeypatch):
    def leaky(model, tokens, targets, last):
        nll = model.nll(tokens, targets)
        nll = nll + 0.01 * torch.roll(targets, -1, dims=1) % 7
        return nll if last is None else nll[:, -last:]

    assert "condition.prefix" in probe_with(good, monkeypatch, leaky)


def test_a_loss_that_sees_just_the_token_it_foretells(good: Path, monkeypatch):
    """In the text that is read, one position ahead: no later token changes an earlier score."""

    def leaky(model, tokens, targets, last):
        ahead = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
        nll = model.nll(tokens, targets) + 0.01 * (ahead % 7)
        return nll if last is None else nll[:, -last:]

    assert probe_with(good, monkeypatch, leaky) == {"condition.prefix"}


def test_a_loss_that_is_no_distribution(good: Path, monkeypatch):
    assert "condition.normalised" in probe_with(good, monkeypatch, lambda *a: 0.9 * honest(*a))


def test_a_loss_that_is_no_number_is_found_and_not_a_crash(good: Path, monkeypatch):
    assert probe_with(good, monkeypatch, lambda *a: torch.nan * honest(*a)) == {"condition.normalised"}


def test_a_scorer_that_counts_twice(good: Path, monkeypatch):
    real = probe.score

    def twice(nll, tokens, *rest, **options):
        import numpy as np

        return real(nll, np.concatenate([tokens, tokens[-3:]]), *rest, **options)

    monkeypatch.setattr(probe, "score", twice)
    assert {f.rule for f in conditions.probe(good / "model_seed1.epigram")} == {"condition.once"}


@pytest.mark.parametrize("leaks", [False, True])
def test_documents_that_are_not_apart_as_the_file_promises(good: Path, monkeypatch, leaks: bool):
    def isolated(path: Path, device: str):
        model = load_model(path, device)
        apart = GPT(dataclasses.replace(model.gpt.config, documents="isolated"))
        apart.load_state_dict(model.gpt.state_dict())
        return dataclasses.replace(model, gpt=apart.requires_grad_(False))

    monkeypatch.setattr(conditions, "load_model", isolated)
    if leaks:
        monkeypatch.setattr(gpt, "within", lambda attend, reach: attend)
    found = [(f.rule, f.severity) for f in conditions.probe(good / "model_seed1.epigram")]
    assert found == ([("condition.isolated", "error")] if leaks else [])


def test_a_damaged_artifact(record: Path):
    path = record / "model_seed1.epigram"
    path.write_bytes(path.read_bytes()[:-1])
    assert "cannot be read" in found(record)["size.artifact"]
