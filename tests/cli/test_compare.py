"""`epigram compare` on run folders whose results are written by hand."""

import json
from pathlib import Path

import pytest


def write_run(folder: Path, seed: int, nats: float, status: str = "finished", **row: float) -> Path:
    folder.mkdir()
    score = {"val_nats": nats, "val_bpb": nats / 1.7, "tokens": 1000, "bytes": 2400, "seq_len": 64, "stride": 32, **row}
    result = {"status": status, "seed": seed, "scores": {"quantized": {"sliding": score}}}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.toml").write_text(f"seed = {seed}\nrecipe = 'smoke'\n")
    return folder


@pytest.fixture
def sides(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    new = [write_run(tmp_path / f"new-{seed}", seed, 1.8 + 0.01 * seed) for seed in (1, 2, 3)]
    old = [write_run(tmp_path / f"old-{seed}", seed, 1.9 + 0.0101 * seed) for seed in (1, 2, 3)]
    return new, old


def test_a_winner(shell, sides):
    new, old = sides
    found = shell("compare", *new, "--against", *old, "--json")
    assert found.code == 0, found.err
    result = json.loads(found.out.splitlines()[-1])
    assert result["comparison"]["test"] == "paired"
    assert found.out.splitlines()[0] == "scored: quantized, sliding"
    assert result["comparison"]["gain"] == pytest.approx((0.1 + 0.0001 * 2) / 1.7)
    assert [row["seed"] for row in result["sides"]["against"]["runs"]] == [1, 2, 3]
    assert result["sentence"].startswith("RUN is better by 0.05894 bits per byte (p = ")
    assert "RUN is worse by 0.05894" in shell("compare", *old, "--against", *new).out


def test_no_winner_on_one_seed(shell, sides):
    new, old = sides
    found = shell("compare", new[0], "--against", old[0])
    assert found.code == 0
    assert "No winner is called" in found.out
    assert "better" not in found.out


def test_no_difference(shell, sides, tmp_path: Path):
    again = [write_run(tmp_path / f"x-{seed}", seed, 1.81 + 0.01 * (seed % 3)) for seed in (1, 2, 3)]
    assert "No difference is shown" in shell("compare", *sides[0], "--against", *again).out


def test_identical_runs_do_not_differ(shell, sides, tmp_path: Path):
    """Nor do they want more seeds."""
    again = [write_run(tmp_path / f"same-{seed}", seed, 1.8 + 0.01 * seed) for seed in (1, 2, 3)]
    found = shell("compare", *sides[0], "--against", *again, "--json")
    result = json.loads(found.out.splitlines()[-1])
    assert result["sentence"] == "There is no difference: both sides have the same scores, as identical runs have."
    assert (result["comparison"]["gain"], result["comparison"]["test"]) == (0.0, None)


def test_a_difference_that_is_the_same_for_all_seeds(shell, sides, tmp_path: Path):
    shifted = [write_run(tmp_path / f"shifted-{seed}", seed, 1.7 + 0.01 * seed) for seed in (1, 2, 3)]
    said = shell("compare", *sides[0], "--against", *shifted).out
    assert "the mean of RUN is 0.05882 bits per byte higher, but all seeds give the same difference" in said
    assert "at least two seeds" not in said


def test_equal_means_of_unequal_runs(shell, sides, tmp_path: Path):
    """Neither lower nor higher, and not identical either."""
    swapped = [write_run(tmp_path / f"swapped-{seed}", seed, 1.8 + 0.01 * (4 - seed)) for seed in (1, 2, 3)]
    assert (
        "No difference is shown: the means are equal (p = 0.5" in shell("compare", *sides[0], "--against", *swapped).out
    )
    one = shell("compare", sides[0][1], "--against", swapped[1]).out
    assert "the means are equal, but one seed on a side has no spread; train each side with at least two seeds" in one


def test_against_a_record(shell, sides):
    new, _ = sides  # mean 1.82, standard error 0.01 / sqrt(3)
    near, far = (json.loads(shell("compare", *new, "--record", n, "--json").out.splitlines()[-1]) for n in (1.84, 1.9))
    assert near["record"]["is_record"] is False
    assert near["record"]["t"] == pytest.approx(0.015 / (0.01 / 3**0.5))
    assert "is not shown to be better than the record by at least 0.005 nats" in near["sentence"]
    assert far["record"]["is_record"] is True
    assert near["sentence"].startswith("3 seeds: ")
    for number in ("nan", "inf", "-5"):
        found = shell("compare", *new, "--record", number)
        assert (found.code, "must be a positive number" in found.err) == (2, True)


def test_what_cannot_be_compared(shell, sides, tmp_path: Path):
    new, old = sides
    other = write_run(tmp_path / "other", 4, 1.8, tokens=999, bytes=2399)
    assert "differently (tokens 1000 and 999; bytes 2400 and 2399)" in shell("compare", *new, "--against", other).err
    twice = write_run(tmp_path / "twice", 1, 1.8)
    found = shell("compare", *new, twice, "--against", *old)
    assert (found.code, "seed 1 comes twice" in found.err) == (2, True)
    failed = write_run(tmp_path / "failed", 5, 1.8, status="failed")
    assert "is no finished run with a score: train it again, no checkpoint was" in shell("compare", *new, failed).err
    (failed / "checkpoints/step-00000007").mkdir(parents=True)
    assert f"finish it with epigram train --resume {failed}" in shell("compare", *new, failed).err
    assert "requires an argument" in shell("compare", *new, "--against").err


def test_unlike_settings_and_seeds_are_noted(shell, sides):
    new, old = sides
    (new[2] / "config.toml").write_text("seed = 3\nrecipe = 'demo'\n")
    found = shell("compare", *new, "--against", *old[:2])
    assert "new-3 had other settings than new-1" in found.err
    assert "compared as independent samples" in found.err


def test_tokenizers_compare_by_the_bytes_of_one_text(shell, sides, tmp_path: Path):
    """The same 2,400 bytes in fewer tokens; nats a token then say nothing."""
    new, _ = sides
    other = [write_run(tmp_path / f"large-{seed}", seed, 2.0 + 0.0101 * seed, tokens=900) for seed in (1, 2, 3)]
    found = shell("compare", *new, "--against", *other)
    assert found.code == 0, found.err
    assert found.out.splitlines()[-1].startswith(f"RUN is better by {0.2002 / 1.7:.5f} bits per byte")
    assert "(tokens 1000 and 900)" in shell("compare", *new, "--against", *other, "--metric", "nats").err
    assert "(tokens 1000 and 900)" in shell("compare", *new, other[0], "--record", "1.9").err
