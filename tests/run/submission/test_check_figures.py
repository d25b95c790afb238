"""`epigram check`: figures of submission.json and README.md that are not those of the logs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from check_helpers import change, found, set_json
from record_helpers import ABOUT

from epigram.run.submission.check import check
from epigram.run.submission.folder import submit
from epigram.run.submission.rules.limits import Limits


@pytest.fixture(autouse=True)
def without_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epigram.run.submission.check.probe", lambda path, kind: iter(()))


def set_row(folder: Path, **values) -> None:
    rows = json.loads((folder / "submission.json").read_text())["seed_results"]
    rows["1"].update(values)
    set_json(folder, seed_results=rows)


def in_readme(folder: Path, old: str, new: str) -> None:
    change(folder / "README.md", old, new)


def no_row(folder: Path) -> None:
    rows = json.loads((folder / "submission.json").read_text())["seed_results"]
    set_json(folder, seed_results={key: row for key, row in rows.items() if key != "2"})


def of_row(folder: Path, key: str) -> float:
    return json.loads((folder / "submission.json").read_text())["seed_results"]["1"][key]


Break = Callable[[Path], object]
JSON: dict[str, tuple[Break, str, str]] = {
    "val_loss": (lambda f: set_json(f, val_loss=1.0), "json.mean", "val_loss is 1.0"),
    "spread": (lambda f: set_json(f, val_bpb_std=0.0001), "json.spread", "val_bpb_std is 0.0001"),
    "spread of losses": (lambda f: set_json(f, val_loss_std=2), "json.spread", "val_loss_std is 2 "),
    "no seeds": (lambda f: set_json(f, seeds=None), "log.seeds", "seeds is null"),
    "empty seeds": (lambda f: set_json(f, seeds=[]), "log.seeds", "seeds is []"),
    "seed twice": (lambda f: set_json(f, seeds=[1, 2, 3, 3]), "log.seeds", "[1, 2, 3, 3]"),
    "no rows": (lambda f: set_json(f, seed_results={}), "log.seeds", "seed_results is {}"),
    "a row less": (no_row, "log.seeds", "rows of seeds [1, 3]"),
    "steps": (lambda f: set_row(f, steps=9999), "log.json", "steps is 9999"),
    "training": (lambda f: set_row(f, train_s=0.001), "log.json", "train_s is 0.001"),
    "calibration time": (lambda f: set_row(f, calibrate_s=-1), "log.json", "calibrate_s is -1"),
    "quantization time": (lambda f: set_row(f, quantize_s="0"), "log.json", "quantize_s is 0"),
    "scoring": (lambda f: set_row(f, score_s=0.001), "log.json", "score_s is 0.001"),
    "artifact": (lambda f: set_row(f, bytes_model=10), "log.json", "bytes_model is 10"),
    "total of a row": (lambda f: set_row(f, bytes_total=20), "log.json", "bytes_total is 20"),
    "file": (lambda f: set_row(f, model_sha256="0" * 64), "log.json", "model_sha256 is 000"),
    "limits": (lambda f: set_json(f, limits={"train_s": 1}), "log.json", "limits.train_s is 1"),
    "cap": (lambda f: set_json(f, bytes_cap=1), "log.json", "bytes_cap is 1"),
    "label": (lambda f: set_json(f, scored="final_float_blocks_exact"), "log.json", "scored is"),
    "torch": (lambda f: set_json(f, pytorch_version="1.0"), "log.json", "pytorch_version is"),
    "hardware": (lambda f: set_json(f, hardware="8 x H100"), "log.json", "hardware is H100"),
    "total above": (lambda f: set_json(f, bytes_total=1e12), "size.counted", "1,000,000,000,000"),
    "largest": (lambda f: set_json(f, bytes_model=5), "size.counted", "counts 5 bytes of the largest artifact"),
    "calibration": (lambda f: set_json(f, calibration={"kind": "val"}), "calibration.agree", "kind is val"),
    "no day": (lambda f: set_json(f, date="2026-02-30"), "json.date", "is no day"),
    "no text": (lambda f: set_json(f, date=["x"]), "json.date", "is no day"),
    "future": (lambda f: set_json(f, date="9999-01-01"), "json.date", "has not come yet"),
    "hash of the code": (lambda f: set_json(f, code_sha256="0" * 64), "code.hash", "is not that of train_gpt.py"),
}


@pytest.mark.parametrize("name", JSON)
def test_a_figure_of_submission_json(record: Path, name: str):
    action, rule, words = JSON[name]
    action(record)
    assert words in found(record)[rule]


README: dict[str, tuple[str, str, str]] = {  # what it is changed to, and what is said of it
    "headline": ("**val_bpb: {val_bpb:.6f}**", "**val_bpb: 1.000000**", "the headline of README.md"),
    "spread": ("(standard deviation {val_bpb_std:.6f})", "(standard deviation 0.000001)", "the headline of README.md"),
    "no headline": ("**val_bpb: {val_bpb:.6f}**", "val_bpb: 1.0", "README.md has no headline"),
    "largest total": ("largest total {bytes_total:,}", "largest total 1", "the headline of README.md"),
    "steps": ("| 8 | {row[train_s]:.3f} |", "| 9 | {row[train_s]:.3f} |", "the table of seeds of README.md"),
    "time": ("| {row[train_s]:.3f} |", "| 0.001 |", "the table of seeds of README.md"),
    "artifact": ("| {row[bytes_model]:,} |", "| 1 |", "the table of seeds of README.md"),
    "a row more": ("\n\nThe score is", "\n| 4 | 1.0 | 1.0 |\n\nThe score is", "the table of seeds of README.md"),
    "bytes": ("lies here takes {bytes_code:,}", "lies here takes 1", "the bytes of README.md"),
    "calibration": ("Calibration: kind train", "Calibration: kind none", "the conditions of README.md"),
    "limit": ("quantization share 60 s", "quantization share 6 s", "the time of README.md"),
    "record": ("\n\n## Bytes", "\n\nBeats the record of 9.0 nats.\n\n## Bytes", "the test against a record"),
}  # fmt: skip


@pytest.mark.parametrize("name", README)
def test_a_figure_of_our_readme(record: Path, name: str):
    figures = json.loads((record / "submission.json").read_text())
    old, new, words = README[name]
    row = figures["seed_results"]["1"]
    in_readme(record, old.format(**figures, row=row), new.format(**figures, row=row))
    findings = found(record)
    assert set(findings) == {"log.readme"} and words in findings["log.readme"]


def test_words_may_be_added_to_our_readme(record: Path):
    in_readme(record, "\n\n## Results", " With thanks.\n\n## What is new\n\nA figure of 0.5.\n\n## Results")
    assert found(record) == {}


def test_another_readme_gives_the_score_of_each_seed_and_no_more_is_asked(record: Path):
    rows = json.loads((record / "submission.json").read_text())["seed_results"]
    text = "**val_bpb: about four** (3 seeds)\n\n| seed | bits |\n" + "".join(
        f"| {seed} | {row['val_bpb']:.4f} |\n" for seed, row in rows.items()
    )
    (record / "README.md").write_text(text)
    assert found(record) == {}


def test_a_claim_to_beat_a_record(runs: list[Path], tmp_path: Path):
    """By the logs, the mean of the three runs is far below 9 nats and not below 1."""
    folder = tmp_path / "claims"
    submit(runs, folder, replace(ABOUT, record_nats=9.0), form="readable", artifacts=False)
    assert found(folder) == {}
    test = json.loads((folder / "submission.json").read_text())["record"]
    for key, value in (("gain", 8.0), ("p", 1e-12), ("t", -1.0), ("margin", 0.0), ("val_loss", 1.0)):
        set_json(folder, record={**test, key: value})
        assert "json.record" in found(folder), key
    set_json(folder, record=test)
    in_readme(folder, "mean gain ", "mean gain 1")
    assert "the test against a record" in found(folder)["log.readme"]


@pytest.mark.parametrize("key", ["author", "hardware", "code_form", "bytes_cap", "calibration", "limits"])
def test_our_readme_without_what_it_is_made_from_is_found_and_no_crash(record: Path, key: str):
    set_json(record, **{key: None})
    assert "log.readme" in found(record)


@pytest.mark.parametrize(
    ("key", "rule"), [("val_bpb", "json.fields"), ("bytes_total", "size.counted"), ("val_loss_std", "json.spread")]
)
def test_an_integer_beyond_any_float_is_no_figure(record: Path, key: str, rule: str):
    set_json(record, **{key: 10**400})
    assert rule in found(record)


def test_a_row_or_a_seed_that_is_no_number(record: Path):
    """Digits that Python calls so and does not read, and more of them than it reads."""
    set_json(record, seeds=None, seed_results={"²": {}})
    change(record / "train_seed1.log", "\nseed: 1\n", f"\nseed: {'9' * 5000}\n")
    change(record / "train_seed1.log", "artifact:", f"artifact:{'9' * 5000}")
    findings = found(record)
    assert "seeds is null" in findings["log.seeds"] and "artifact:999" in findings["log.figure"]


@pytest.mark.parametrize("day", ["2026-04-01", "2026-04-01T23:59:59Z", "April 1, 2026", "1 Apr 2026", "2026/04/01"])
def test_a_day_as_others_write_it(record: Path, day: str):
    set_json(record, date=day)
    assert "json.date" not in found(record)


# -- folders of others -------------------------------------------------------------------------------------------------

FOREIGN_LOG = (
    "seed:{seed}\n"
    "step:9000/20000 val_loss:2.0500 val_bpb:1.2150 train_time:599950ms step_avg:66.66ms\n"
    "Serialized model int8+zlib: {model} bytes (payload:1 raw_torch:2)\n"
    "Code size: {code} bytes\n"
    "Total submission size int8+zlib: {total} bytes\n"
    "final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:1395ms\n"
    "final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}\n"
)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder in the published form that epigram did not make: three seeds, and an artifact of another name."""
    folder, code = tmp_path / "foreign", "import torch\n"
    folder.mkdir()
    (folder / "train_gpt.py").write_text(code)
    (folder / "requirements.txt").write_text("torch\n")
    (folder / "final_model.int8.ptz").write_bytes(bytes(5_001))
    rows = {}
    for seed, loss, bpb in ((1, 2.06001234, 1.2200), (2, 2.07, 1.2300), (3, 2.07998766, 1.2400)):
        size = {"model": 5_000 + seed, "code": len(code), "total": 5_000 + seed + len(code)}
        (folder / f"train_seed{seed}.log").write_text(FOREIGN_LOG.format(seed=seed, loss=loss, bpb=bpb, **size))
        rows[str(seed)] = {"val_loss": loss, "val_bpb": bpb, "steps": 9000, "train_s": 600}
    (folder / "README.md").write_text(
        "**val_bpb: 1.23**\n\n" + " ".join(f"{row['val_bpb']:.4f}" for row in rows.values())
    )
    about = {"author": "A", "github_id": "a", "name": "n", "date": "2026-04-01T12:00:00Z", "val_bpb": 1.23}
    sizes = {"bytes_code": len(code), "bytes_total": 5_003 + len(code)}
    results = {"seeds": [1, 2, 3], "seed_results": rows, "val_loss": 2.07, "val_bpb_std": 0.00816, "record": "none"}
    (folder / "submission.json").write_text(json.dumps({**about, **sizes, **results, "calibration": "training text"}))
    return folder


def test_a_folder_of_others_is_asked_for_what_it_claims(foreign: Path):
    assert set(found(foreign)) == {"calibration.unknown"}
    for key in (
        "seeds",
        "seed_results",
        "val_loss",
        "val_bpb_std",
        "record",
        "calibration",
        "bytes_code",
        "bytes_total",
    ):
        values = json.loads((foreign / "submission.json").read_text())
        del values[key]
        (foreign / "submission.json").write_text(json.dumps(values))
    assert set(found(foreign)) == {"calibration.unknown"}, "what is optional may be missing"
    assert check(foreign, limits=Limits())["valid"]


def test_a_folder_of_others_that_claims_other_figures(foreign: Path):
    set_json(foreign, val_bpb_std=0.001, val_loss=2.0, bytes_total=6_000)
    set_row(foreign, steps=8999, train_s=500)
    change(foreign / "train_seed2.log", "599950ms", "nanms")
    findings = found(foreign)
    assert {"json.spread", "json.mean", "size.counted", "log.json", "log.figure"} <= set(findings)
    assert "train_time:nan" in findings["log.figure"]
    shutil.copyfile(foreign / "train_seed1.log", foreign / "train_seed3.log")
    findings = found(foreign)
    assert "is of seed 1 by what it says" in findings["log.seed"]
    assert "train_seed1.log and train_seed3.log have the same final scores" in findings["log.copied"]
