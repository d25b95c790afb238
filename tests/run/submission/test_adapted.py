"""A record whose score is that of a model which adapts: both scores are shown, and how it learns is tested."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from record_helpers import ABOUT, CAP
from run_helpers import python_alone, result_of, train_run

from epigram.evaluation.adapt import SgdAdapter
from epigram.run import adapt, weights
from epigram.run.submission import conditions
from epigram.run.submission.check import check
from epigram.run.submission.folder import submit
from epigram.run.submission.logs import read_log
from epigram.run.submission.rules.limits import Limits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_path: Path) -> Path:
    """A run that adapts by SGD; not to be changed."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    train_run(
        data_path, folder, "seed=1", f"artifact.cap_bytes={CAP}", "run.sample_tokens=0", "score.seq_len=64",
        "score.stride=64", "score.methods=['sliding']", "score.adapt.kind=sgd", "score.adapt.sgd.chunk_tokens=512",
        "score.adapt.sgd.epochs=1",
    )  # fmt: skip
    return folder


@pytest.fixture
def record(run: Path, tmp_path: Path) -> Path:
    submit([run], tmp_path / "record", ABOUT)
    return tmp_path / "record"


def findings(folder: Path) -> dict[str, str]:
    return {row["rule"]: row["message"] for row in check(folder, limits=Limits(cap_bytes=CAP))["findings"]}


def test_both_scores_are_shown(run: Path, record: Path) -> None:
    rows = result_of(run)["scores"]["quantized"]
    own, plain = rows["adapted_sgd"]["val_bpb"], rows["sliding"]["val_bpb"]
    found, log = json.loads((record / "submission.json").read_text()), read_log(record / "train_seed1.log")
    assert found["scored"] == "final_quantized_adapted_sgd_exact" and found["val_bpb"] == pytest.approx(own, abs=1e-8)
    assert found["adapted"]["kind"] == "sgd" and found["adapted"]["chunk_tokens"] == 512
    assert found["adapted"]["val_bpb_unadapted"] == pytest.approx(plain, abs=1e-8)
    assert found["adapted"]["gain_bpb"] == pytest.approx(plain - own, abs=1e-7)
    assert (log.adapted, log.unadapted) == ("sgd", pytest.approx((rows["sliding"]["val_nats"], plain), abs=1e-8))
    readme = (record / "README.md").read_text()
    assert "**adapts while it is scored**" in readme and f"**{plain:.6f} bits per byte**" in readme
    assert "the weights do not change" not in readme


def test_check_names_it_and_tests_how_it_learns(record: Path) -> None:
    found = findings(record)
    assert set(found) == {"score.adapted", "run.untested", "significance.seeds"}
    assert "while the model learns (sgd)" in found["score.adapted"]


def test_a_log_that_claims_what_cannot_be_is_found_and_not_a_crash(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(conditions, "load_model", lambda *arguments: replace(load(*arguments), tokenizer=without))
    load = weights.load_model
    without = Mock(wraps=load(run / "model.epigram", "cpu").tokenizer, bos_id=-1)
    (finding,) = conditions.probe(run / "model.epigram", "lora")
    assert finding.rule == "condition.released" and "the tokenizer has none" in finding.message


def test_an_adapted_score_alone_is_warned_about(record: Path, monkeypatch) -> None:
    monkeypatch.setattr("epigram.run.submission.check.probe", lambda path, kind: iter(()))
    log = record / "train_seed1.log"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "final_quantized_sliding" not in line))
    assert "gives the score of an adapted model alone" in findings(record)["score.unadapted"]


@pytest.mark.parametrize("kind", ["sgd", "lora"])
def test_what_learns_too_early_is_found(run: Path, kind: str, monkeypatch) -> None:
    artifact = run / "model.epigram"
    assert list(conditions.probe(artifact, kind)) == []
    if kind == "lora":  # whatever is left of a document teaches the next ones
        monkeypatch.setattr(adapt.LoraAdapter, "begin", begin_once(adapt.LoraAdapter.begin))
    else:
        monkeypatch.setattr(adapt, "SgdAdapter", ahead(monkeypatch))
    found = {(finding.rule, finding.severity) for finding in conditions.probe(artifact, kind)}
    assert found == {("condition.released", "error")}


def begin_once(begin):
    def once(self, num_documents):
        if not self._a or self._a["q"].shape[1] != num_documents:
            begin(self, num_documents)

    return once


def ahead(monkeypatch):
    """An adapter that knows the text and learns its end."""
    text: list[np.ndarray] = []
    honest = adapt.Adaptation.nats

    def nats(self, tokens, method, batch_tokens):
        text[:] = [tokens]
        return honest(self, tokens, method, batch_tokens)

    monkeypatch.setattr(adapt.Adaptation, "nats", nats)

    class Ahead(SgdAdapter):
        def learn(self, tokens, chunk, num_chunks):
            super().learn(text[0][-33:].copy(), chunk, num_chunks)

    return Ahead


def test_a_script_that_adapts_scores_the_artifact_in_the_same_way(run: Path, record: Path, data_path: Path) -> None:
    """What fresh processes compute is what the run did."""
    folder = record.parent / "alone"
    folder.mkdir()
    shutil.copyfile(record / "train_gpt.py", folder / "train_gpt.py")
    done = python_alone(
        "train_gpt.py", "--data", data_path, "--score", run / "model.epigram", "--device", "cpu", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    expected = result_of(run)["scores"]["quantized"]
    assert rows["adapted_sgd"]["val_nats"] == pytest.approx(expected["adapted_sgd"]["val_nats"], rel=1e-5)
