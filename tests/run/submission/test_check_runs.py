"""`epigram check`: logs that cannot be of their runs, artifacts of other runs, and bytes that nobody counted."""

import dataclasses
import hashlib
import re
import shutil
from pathlib import Path

import pytest
from check_helpers import change, drop_from_log, found, set_json
from record_helpers import CAP

from epigram.artifact import tensors
from epigram.run.submission.logs import parse_log, read_log
from epigram.run.submission.rules.limits import Limits


@pytest.fixture(autouse=True)
def without_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epigram.run.submission.check.probe", lambda path, kind: iter(()))


def put(folder: Path, name: str, num_bytes: int) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(num_bytes))
    return path


# -- logs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-999", "-0.5", "soon"])
@pytest.mark.parametrize("key", ["train_s", "quantize_s", "score_s"])
def test_a_time_that_cannot_be(record: Path, key: str, value: str):
    """NaN is above no limit, and a negative time makes room for another."""
    log = record / "train_seed1.log"
    log.write_text(re.sub(rf" {key}:\S+", f" {key}:{value}", log.read_text()))
    findings = found(record)
    assert f"{key}:{value}" in findings["log.figure"]
    assert "train_seed1.log" in findings["time.unknown"], "and nothing is computed with it"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (r"final_bytes artifact:\d+", "final_bytes artifact:-99", "artifact:-99"),
        (r"code:\d+ total", "code:1.5 total", "code:1.5"),
        (r"total:\d+ cap", "total:1 cap", "total:1 of artifact:"),
        (r"final_times steps:\d+", "final_times steps:-1", "steps:-1"),
        (r"blocks_exact val_loss:\S+", "blocks_exact val_loss:nan", "final_quantized_blocks_exact val_loss:nan"),
        (r"blocks_exact val_loss:\S+", "blocks_exact val_loss:-1.0", "final_float_blocks_exact val_loss:-1.0"),
        (r"\Z", "\nfinal_quantized_sliding_exact val_loss:1.0 val_bpb:1.0\n", "said before with other figures"),
    ],
)
def test_a_figure_that_cannot_be(record: Path, old: str, new: str, words: str):
    log = record / "train_seed1.log"
    text, count = re.subn(old, new, log.read_text())
    assert count
    log.write_text(text)
    assert words in found(record)["log.figure"]


def test_a_resumed_run_may_say_again_what_does_not_count(record: Path):
    log = record / "train_seed1.log"
    again = "final_float_blocks_exact val_loss:1.0 val_bpb:1.0\n"
    score = next(line for line in log.read_text().splitlines() if line.startswith("final_quantized_sliding"))
    log.write_text(again + log.read_text() + f"\n{score}\n")
    assert found(record) == {}


@pytest.mark.parametrize("words", [("final_quantized",), ("final_quantized", "final_times", "final_bytes")])
def test_a_float_score_does_not_stand_in_for_the_packed_file(record: Path, words: tuple[str, ...]):
    drop_from_log(record, *words)
    assert "final_float_blocks_exact" in read_log(record / "train_seed1.log").scores
    assert "train_seed1.log has no final score" in found(record)["log.score"]


def test_nor_does_another_method_than_the_recipe_s(record: Path):
    drop_from_log(record, "final_quantized_sliding")
    assert "train_seed1.log has no final score" in found(record)["log.score"]


def test_without_a_recipe_the_preferred_score_of_the_packed_model_counts():
    lines = [f"final_{model}_{method}_exact val_loss:2.0 val_bpb:1.0" for model, method in (
        ("quantized", "blocks"), ("quantized", "streaming"), ("float", "sliding"))]  # fmt: skip
    assert parse_log("\n".join(lines), "train.log").label == "final_quantized_streaming_exact"
    assert parse_log(lines[2], "train.log").label is None


@pytest.mark.parametrize(
    ("old", "new"),
    [("\nseed: 1\n", "\nseed: 7\n"), ("\nseed = 1\n", "\nseed = 7\n"), (", seed 1: ", ", seed 7: ")],
)
def test_a_log_of_another_seed_than_its_name_says(record: Path, old: str, new: str):
    change(record / "train_seed1.log", old, new)
    assert "train_seed1.log is of seed 1, 7" in found(record)["log.seed"]


def test_a_run_that_is_there_twice(record: Path):
    shutil.copyfile(record / "train_seed1.log", record / "train.log")
    assert "train.log and train_seed1.log have the same seed" in found(record)["log.copied"]


def test_a_seed_that_is_a_copy_of_another(record: Path):
    """With whatever names a seed put right: the artifact, the losses and the scores tell."""
    text = (record / "train_seed1.log").read_text()
    for old, new in (("seed: 1", "seed: 2"), ("seed = 1", "seed = 2"), (", seed 1:", ", seed 2:")):
        text = text.replace(old, new)
    (record / "train_seed2.log").write_text(text)
    shutil.copyfile(record / "model_seed1.epigram", record / "model_seed2.epigram")
    findings = found(record)
    assert "log.seed" not in findings
    for what in ("artifact by its SHA-256", "training losses", "final scores", "bytes"):
        assert f"have the same {what}" in findings["log.copied"]


def test_logs_of_two_recipes(record: Path):
    change(record / "train_seed2.log", "warmdown_frac = 0.5", "warmdown_frac = 0.9")
    findings = found(record)
    assert "another recipe than train_seed1.log, in schedule.warmdown_frac" in findings["log.recipe"]
    assert "another recipe than train_seed2.log, in schedule.warmdown_frac" in findings["code.recipe"]


def test_a_log_without_its_recipe(record: Path):
    change(record / "train_seed2.log", "recipe as resolved:", "recipe:")
    assert "train_seed2.log says no recipe" in found(record)["log.recipe"]


# -- artifacts ---------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, **provenance) -> None:
    """The first artifact with another origin in its header, and its log with what follows from that."""
    path, log = folder / "model_seed1.epigram", folder / "train_seed1.log"
    old = read_log(log)
    contents = tensors.load(path)
    changed = dataclasses.replace(contents, provenance={**contents.provenance, **provenance})
    tensors.save(path, changed, "entropy")
    digest, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    change(log, f"{old.sha256}", digest)
    change(log, f"artifact:{old.artifact_bytes}", f"artifact:{size}")


@pytest.mark.parametrize(
    "provenance",
    [{"kind": "text", "split": "val"}, {"split": "val"}, {"calibration": {"kind": "text", "split": "val"}}],
)
def test_a_header_that_says_what_cannot_be(record: Path, provenance: dict):
    rewritten(record, **provenance)
    findings = found(record)
    assert "size.artifact" not in findings
    assert "the header of model_seed1.epigram" in findings["calibration.source"]


def test_a_header_that_says_another_calibration_than_the_log(record: Path):
    rewritten(record, kind="self-generated", split="")
    findings = found(record)
    assert "calibration.source" not in findings
    assert "kind is self-generated in model_seed1.epigram and train in train_seed1.log" in findings["calibration.agree"]


def test_an_artifact_of_which_the_log_tells_the_size_alone(record: Path):
    log = record / "train_seed1.log"
    log.write_text(re.sub(r" sha256:\w+", "", log.read_text()))
    assert "does not say which file it scored" in found(record)["size.unknown"]
    with (record / "model_seed1.epigram").open("ab") as file:
        file.write(b"more")
    assert "model_seed1.epigram takes" in found(record)["size.artifact"]


def test_an_artifact_whose_log_tells_another_size(record: Path):
    size = (record / "model_seed1.epigram").stat().st_size
    change(record / "train_seed1.log", f"artifact:{size}", "artifact:10")
    assert f"takes {size:,} bytes, the artifact of train_seed1.log 10" in found(record)["size.artifact"]


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["weights.bin", "tokens.npy", "lib/a.txt", "model_seed9.epigram", "lib/README.md", ".x"]
)
def test_a_file_that_nobody_counted(record: Path, name: str):
    put(record, name, CAP)
    findings = found(record)
    assert findings["size.extra"].startswith(f"{name} is neither") and f"{CAP:,}" in findings["size.extra"]
    assert {"size.cap", "size.counted"} <= set(findings)


def test_what_is_counted_may_lie_there(record: Path):
    """A plot, say: it is told of, and it is no error once the figures are with it."""
    put(record, "plot.png", 100)
    code = (record / "train_gpt.py").stat().st_size + 100
    largest = max(path.stat().st_size for path in record.glob("*.epigram"))
    set_json(record, bytes_code=code, bytes_total=code + largest)
    findings = found(record)
    assert "size.extra" in findings and "size.counted" not in findings
    assert "size.cap" in found(record, limits=Limits(cap_bytes=code + largest - 1))


def test_a_log_by_another_name(record: Path):
    (record / "train_seed3.log").rename(record / "run_seed3.log")
    findings = found(record)
    assert "the logs are of [1, 2]" in findings["log.seeds"]
    assert "run_seed3.log is neither" in findings["size.extra"]


@pytest.mark.parametrize(
    "name",
    ["train_seed4.log", "model_seed4.epigram", "helper.py", "run.sh", "plot.png", "README.md", "train_gpt.py",
     "submission.json", "requirements.txt", "train_seed1.log", "model_seed1.epigram"],
)  # fmt: skip
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_that_leads_nowhere(record: Path, name: str, target: str):
    path = record / name
    path.unlink(missing_ok=True)
    path.symlink_to(path if target == "itself" else record / "nowhere")
    assert found(record)["files.link"] == f"{name} is a link"


@pytest.mark.parametrize("name", ["train_seed4.log", "model_seed4.epigram", "helper.py"])
def test_a_folder_by_the_name_of_a_file(record: Path, name: str):
    (record / name).mkdir()
    assert found(record) == {}


def test_a_link(record: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (record / "data").symlink_to(tmp_path / "elsewhere")
    assert "data is a link" in found(record)["files.link"]
