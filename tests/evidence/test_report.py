"""The page: what it says is what the results hold, and what is committed is what the results in docs/ give."""

import json
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import loss_curves
from benchmarks.evidence import plots
from benchmarks.evidence.cell import EVIDENCE, describe
from benchmarks.evidence.commands import command_of
from benchmarks.evidence.plan import BASE, Cell, load_plan
from benchmarks.evidence.report import BEGIN, END, HEAD_BEGIN, HEAD_END, write_pages
from benchmarks.evidence.rows import Row
from epigram.config import load_recipe
from epigram.errors import UserError
from epigram.run.statistics import compare

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parent / "toy.toml"
PLAN = load_plan(TOY)
CELLS = {cell.name: cell for cell in PLAN.cells}
EARLIER = {
    "recipe": "h100",
    "seed": 3,
    "train_s": 172.0,
    "steps": 2681,
    "step_ms": 64.2,
    "artifact_bytes": 15_614_392,
    "scores": {"float": {"blocks": {"val_bpb": 1.16793, "seq_len": 2048}}},
}


class Pages:
    """An empty page and README, and results as a runner would leave them."""

    def __init__(self, tmp_path: Path) -> None:
        self.docs, self.readme = tmp_path, tmp_path / "README.md"
        self.results = tmp_path / "results"
        (tmp_path / "results.md").write_text(f"Before.\n{BEGIN}\nold\n{END}\nAfter.\n")
        self.readme.write_text(f"# x\n{HEAD_BEGIN}\n{HEAD_END}\nrest\n")
        self.write("h100-180s/result.json", EARLIER)

    def write(self, name: str, content: dict[str, Any]) -> None:
        path = self.results / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def add(self, cell: Cell, bpb: float, gpu: str = "H100", variants: tuple[str, ...] = (BASE,), **more: Any) -> None:
        """A finished cell whose every score of 64 tokens is `bpb`, less 0.1 for each variant."""
        rows = [
            {"variant": v, "model": model, "score": "blocks@64", "val_bpb": bpb - 0.1 * i}
            for i, v in enumerate(variants)
            for model in ("float", "quantized")
        ]
        found = {**describe(cell), "status": "finished", "gpu": gpu, "rows": rows, **more}
        self.write(f"evidence/{cell.name}/{EVIDENCE}", found)
        for v in variants:
            folder = f"evidence/{cell.name}" + ("" if v == BASE else f"/{v}")
            exported = {"steps": 900, "step_ms": 61.26, "codecs": {"entropy": {"artifact_bytes": 15_000_000}}}
            self.write(f"{folder}/result.json", exported)

    def page(self) -> str:
        write_pages(PLAN, self.results, self.docs, self.readme)
        return (self.docs / "results.md").read_text()

    def row(self, label: str) -> list[str]:
        (line,) = [line for line in self.page().splitlines() if line.startswith(f"| {label} |")]
        return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    return Pages(tmp_path)


def test_nothing_measured(pages: Pages):
    page = pages.page()
    assert page.startswith("Before.\n")
    assert page.endswith("\nAfter.\n")
    assert "\nold\n" not in page
    assert pages.row("as it is")[1] == "not measured"
    assert "| 64 | not measured | not measured |" in page
    assert "1.168 bits per byte" in pages.readme.read_text()
    assert "![" not in page


def test_mean_spread_and_difference(pages: Pages):
    ours, theirs = {1: 1.30, 2: 1.33}, {1: 1.35, 2: 1.40}
    for seed in (1, 2):
        pages.add(CELLS[f"plain-s{seed}"], theirs[seed])
    pages.add(CELLS["again-s1"], ours[1])
    row = pages.row("as it is")
    mean, sd = statistics.fmean(theirs.values()), statistics.stdev(theirs.values())
    assert row[1:4] == ["1, 2", "900, 61.3", f"{mean:.4f} ± {sd:.4f}"]
    assert row[6].startswith("15,000,000")
    # One seed in common: compared with that one alone, and nothing is claimed.
    assert pages.row("the first again")[-1] == f'{ours[1] - theirs[1]:+.4f} to "as it is"'


def test_a_difference_is_tested_seed_by_seed(pages: Pages):
    base, other = {1: 1.35, 2: 1.40}, {1: 1.25, 2: 1.31}
    for seed in (1, 2):
        rows = [
            {"variant": v, "model": "quantized", "score": "blocks@64", "val_bpb": values[seed]}
            for v, values in ((BASE, base), ("nearest", other))
        ]
        pages.add(CELLS[f"plain-s{seed}"], 0.0, variants=(BASE, "nearest"), rows=rows)
    p = compare(other, base).p
    assert p is not None
    assert pages.row("to nearest")[-1] == f'{-0.095:+.4f} to "as it is" (p = {p:.2g})'


def test_the_lower_of_two_scores_counts_where_each_reads_best_at_its_own():
    """By seed: 1.3 and 1.5 of one row, 1.2 and 1.6 of the other, whichever column they stand in."""
    row = Row("x", PLAN.experiments[0], BASE, scores={"a": {1: 1.3, 2: 1.6, 3: 1.4}, "b": {1: 1.4, 2: 1.5}})
    assert row.values("a or b") == row.values("b or a") == {1: 1.3, 2: 1.5, 3: 1.4}
    assert row.values("a") == {1: 1.3, 2: 1.6, 3: 1.4}
    assert row.values("c or d") == {}
    row.counted = {"b": 7}
    assert (row.counted_in("a or b"), row.counted_in("b"), row.counted_in("a")) == (7, 7, 0)


def test_scores_over_different_bytes_are_compared_over_the_whole_text(pages: Pages):
    """One tokenizer leaves out a tenth of the 1,000 bytes: 1.6 of what it counts is 1.44 of all."""
    for name, bpb, counted in (("plain-s1", 1.6, 900), ("again-s1", 1.3, 1_000)):
        rows = [{"variant": BASE, "model": "quantized", "score": "blocks@64", "val_bpb": bpb, "bytes": counted}]
        pages.add(CELLS[name], 0.0, rows=rows, text_bytes=1_000)
    assert pages.row("the first again")[-1] == '-0.1400 to "as it is", per byte of the whole text'
    assert pages.row("as it is")[4] == "1.6000"


@pytest.mark.parametrize(("counted", "gain", "words"), [(900, 0.0, ""), (1_000, 0.13, ", per byte of the whole text")])
def test_the_published_score_is_over_its_own_bytes(pages: Pages, counted: int, gain: float, words: str):
    """A published 1.3 over 900 of 1,000 bytes is 1.17 of the whole text."""
    claim = replace(PLAN.claims["training"], target=1.3, target_bytes=900)
    experiment = replace(CELLS["plain-s1"].experiment, against="published")
    cell = replace(CELLS["plain-s1"], experiment=experiment)
    rows = [{"variant": BASE, "model": "quantized", "score": "blocks@64", "val_bpb": 1.3, "bytes": counted}]
    pages.add(cell, 0.0, rows=rows, text_bytes=1_000)
    plan = replace(PLAN, claims={"training": claim}, experiments=(experiment,), cells=(cell,))
    write_pages(plan, pages.results, pages.docs, pages.readme)
    (line,) = [line for line in (pages.docs / "results.md").read_text().splitlines() if line.startswith("| as it is |")]
    assert line.endswith(f"{gain:+.4f} to the published 1.3{words} |")


def test_another_gpu_is_named(pages: Pages):
    pages.add(CELLS["plain-s1"], 1.3)
    pages.add(CELLS["again-s1"], 1.3, gpu="H200")
    assert pages.row("the first again")[-1].endswith(", on another GPU")
    assert "Measured on H100; H200." in pages.page()


def test_settings_of_before_are_named(pages: Pages):
    pages.add(CELLS["plain-s1"], 1.3, fingerprint="other")
    assert "as it is: measured with settings of before." in pages.page()


def test_unfinished_cells_do_not_count(pages: Pages):
    pages.add(CELLS["plain-s1"], 1.3, status="cut")
    assert pages.row("as it is")[1] == "not measured"


def timed(tokens: int) -> list[dict[str, Any]]:
    """80 ms a step without windows, 60 with."""
    return [
        {"variant": window, "step": [{"name": "whole step", "median_ms": ms, "tokens": tokens}]}
        for window, ms in (("none", 80.0), ("16", 60.0))
    ]


def test_the_best_of_each_claim_comes_first(pages: Pages):
    def lines() -> list[str]:
        return [line for line in pages.page().splitlines() if line.startswith("| [")]

    training, steps = lines()
    rows = len([v for e in PLAN.experiments if e.claim == "training" for v in (BASE, *e.variants)])
    assert training == f"| [Training](#training) | it helps | 0 of {rows} | - | - | - | - | - |"
    assert steps == "| [Steps](#steps) | - | 0 of 1 | - | - | - | - | - |"
    pages.add(CELLS["plain-s1"], 1.35, variants=(BASE, "nearest"))
    pages.add(CELLS["again-s1"], 1.2)
    pages.add(CELLS["steps-64"], 0.0, rows=timed(65_536))
    training, steps = lines()
    best = 'the first again | quantized blocks@64 | 1.2000 | 15,000,000 | -0.1500 to "as it is"'
    assert training.endswith(f"| 3 of {rows} | {best} |")
    assert steps.endswith("| 1 of 1 | window 16 | ms a step | - | - | -25 % at 64 |")


def test_what_stands_beside_the_published_score_is_the_best(pages: Pages):
    """Whatever had more time, or other text, is lower without being better."""
    plain, again = (CELLS[name].experiment for name in ("plain-s1", "again-s1"))
    beside = replace(plain, against="published")
    claim = replace(PLAN.claims["training"], target=1.4, baseline="")
    plan = replace(
        PLAN,
        claims={"training": claim},
        experiments=(beside, again),
        cells=(replace(CELLS["plain-s1"], experiment=beside), CELLS["again-s1"]),
    )
    pages.add(CELLS["plain-s1"], 1.3)
    pages.add(CELLS["again-s1"], 1.1)
    write_pages(plan, pages.results, pages.docs, pages.readme)
    (line,) = [line for line in (pages.docs / "results.md").read_text().splitlines() if line.startswith("| [")]
    assert "| as it is | quantized blocks@64 | 1.3000 |" in line
    assert line.endswith("| -0.1000 to the published 1.4 |")


@pytest.mark.parametrize(("bpb", "listed"), [(1.3498, False), (1.34996, True), (1.36, True)])
def test_what_did_not_help_is_listed(pages: Pages, bpb: float, listed: bool):
    """What is lower by half a ten-thousandth is not lower."""
    pages.add(CELLS["plain-s1"], 1.35, variants=(BASE, "nearest"))
    pages.add(CELLS["again-s1"], bpb)
    plan = replace(PLAN, claims={**PLAN.claims, "training": replace(PLAN.claims["training"], tried=True)})
    assert "Tried, and no better" not in pages.page()
    write_pages(plan, pages.results, pages.docs, pages.readme)
    words = f'- [Training](#training): the first again ({max(bpb - 1.35, 0):+.4f} to "as it is")'
    assert (words in (pages.docs / "results.md").read_text().splitlines()) == listed


def test_links_lead_to_headings():
    """As GitHub names them: small letters, hyphens for spaces, and nothing of commas and colons."""
    page = (ROOT / "docs" / "results.md").read_text()
    links = set(re.findall(r"\]\(#([^)]*)\)", page))
    headings = [line.lstrip("# ").lower() for line in page.splitlines() if line.startswith("#")]
    assert "window-attention-step-times" in links
    assert links <= {"".join(c for c in h if c.isalnum() or c in " -_").replace(" ", "-") for h in headings}


def test_files_over_the_cap_are_marked(pages: Pages):
    artifact = load_recipe("h100").artifact
    room = artifact.cap_bytes - artifact.code_bytes
    for name, size in (("plain-s1", room), ("again-s1", room + 1)):
        pages.add(CELLS[name], 1.3)
        pages.write(f"evidence/{name}/result.json", {"codecs": {"entropy": {"artifact_bytes": size}}})
    assert pages.row("as it is")[6] == f"{room:,}"
    assert pages.row("the first again")[6] == f"{room + 1:,}, *over*"


def test_step_times_at_equal_tokens(pages: Pages):
    """80 ms of 32,768 tokens are 160 ms of 65,536; the window saves a quarter."""
    pages.add(CELLS["steps-64"], 0.0, rows=timed(32_768))
    assert pages.row("64") == ["64", "160.0 ms", "120.0 ms (25.0 % less)"]
    assert (pages.results / "plots" / "steps.svg").exists()


def test_again_changes_nothing(pages: Pages, monkeypatch):
    pages.add(CELLS["plain-s1"], 1.3, variants=(BASE, "nearest"))
    first = pages.page()
    plot = pages.results / "plots" / "training.svg"
    drawn = plot.read_text()
    plot.touch()
    assert pages.page() == first
    assert plot.read_text() == drawn
    pages.add(CELLS["plain-s1"], 1.2, variants=(BASE, "nearest"))
    pages.page()
    assert (redrawn := plot.read_text()) != drawn  # other data, another drawing
    other = replace(plots.page_colours(), ink="#123456")
    monkeypatch.setattr(plots, "page_colours", lambda: other)
    pages.page()
    assert plot.read_text() != redrawn  # and so with another style


def test_markers_are_needed(pages: Pages):
    pages.readme.write_text("no markers")
    with pytest.raises(UserError, match="headline"):
        pages.page()


def test_what_is_committed_is_up_to_date(tmp_path: Path):
    """`python -m benchmarks.evidence report` would change nothing in docs/ and README.md."""
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    for path in (ROOT / "docs" / "results.md", ROOT / "README.md"):
        shutil.copy(path, tmp_path)
    write_pages(load_plan(), tmp_path / "results", tmp_path, tmp_path / "README.md")
    hint = "run python -m benchmarks.evidence report"
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text(), hint
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), hint
    drawn = {path.name: path.read_text() for path in (tmp_path / "results").glob("plots/*")}
    assert drawn == {path.name: path.read_text() for path in (ROOT / "docs" / "results").glob("plots/*")}, hint


def test_the_committed_loss_curves_are_up_to_date(tmp_path: Path):
    """`python -m benchmarks.loss_curves draw` would change nothing."""
    committed = ROOT / "docs" / "results" / "loss-curves"
    shutil.copytree(committed, tmp_path, dirs_exist_ok=True)
    loss_curves.draw(tmp_path)
    assert (tmp_path / "loss-curves.svg").read_text() == (committed / "loss-curves.svg").read_text()


def test_every_claim_has_seeds_spread_and_command():
    plan, page = load_plan(), (ROOT / "docs" / "results.md").read_text()
    for claim in plan.claims.values():
        section = page.split(f"### {claim.title}\n")[1].split("\n### ")[0]
        table = [line for line in section.splitlines() if line.startswith("|")]
        experiments = [e for e in plan.experiments if e.claim == claim.name]
        if claim.plot != "steps":
            assert "| seeds |" in table[0]
            for line in table[2 + len(claim.reference) :]:
                cells = [cell.strip() for cell in line.strip("|").split("|")]
                measured = re.fullmatch(r"\d+(, \d+)*", cells[1])
                assert measured or cells[1] == "not measured", line
                if measured and "," in cells[1]:
                    assert "±" in line
        for experiment in experiments:
            for command in command_of(plan, experiment):
                assert command in section


def test_commands_say_what_was_run():
    """The settings in a command and those of its cell resolve to the same config."""
    plan = load_plan()
    for cell in plan.cells:
        if cell.experiment.kind == "bench" or cell.experiment.repeats:
            continue
        train = command_of(plan, cell.experiment)[0]
        settings = re.findall(r"--set (?:'([^']*)'|(\S+))", train)
        typed = [one or other for one, other in settings]
        typed += plan.defaults if "SHORT" in train else []
        assert load_recipe(cell.recipe, typed) == load_recipe(cell.recipe, cell.settings), cell.name
