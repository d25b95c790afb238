"""The report of one or several runs: one HTML page that needs nothing but itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from epigram.errors import UserError
from epigram.run.record import write_atomic
from epigram.run.report import tables
from epigram.run.report.curves import curves
from epigram.run.report.plots import NUM_COLOURS, draw
from epigram.run.report.reader import Run, is_number, read_run
from epigram.run.report.summary import (
    TIMES,
    Bar,
    best_score,
    compare,
    overview,
    samples,
    score_rows,
    size_and_cap,
    time_and_budget,
    verdict,
)

# Of the result, what stands in one line under the verdict.
_FACTS = (
    "recipe",
    "seed",
    "parameters",
    "steps",
    "tokens",
    "step_ms",
    "peak_memory_bytes",
    "code_bytes",
    "pack_s",
)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One large number. share: 0.. of a budget, drawn as a bar; None where there is none."""

    value: str
    unit: str
    note: str
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run as the page shows it, without what is empty. log_tail: only of a run that did not finish."""

    run: Run
    colour: int
    mood: Literal["good", "bad", "open"]
    verdict: str
    tiles: list[Tile]
    facts: list[tuple[str, str]]
    scores: tables.Grid
    sizes: tables.Grid
    quantization: tables.Grid
    baselines: list[Bar]
    baseline_note: str
    samples: list[tuple[str, str, str]]
    log_tail: tuple[str, ...]
    calibration: list[tuple[str, str]]
    config: list[tuple[str, str]]
    environment: list[tuple[str, str]]


def build(folders: Sequence[Path], out: Path) -> list[Run]:
    """Write the page about the runs in `folders` to `out`; returns what was read.

    A run may be of any state. Raises UserError when a folder is no run, the page cannot be written, or `out` holds
    something else.
    """
    if out.exists() and not _is_report(out):
        raise UserError(f"{out} is no report, and would be lost: name another file with --out")
    places = [folder.resolve() for folder in folders]
    if twice := [folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"{twice[0]} comes twice: name each run once")
    runs = [read_run(folder) for folder in folders]
    page = render(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, page)
    except OSError as error:
        raise UserError(f"the report {out} cannot be written: {error.strerror}") from error
    return runs


def _is_report(path: Path) -> bool:
    """Whether a file begins as this page does, or did."""
    try:
        with path.open("rb") as file:
            beginning = file.read(1 << 12)
    except OSError as error:
        raise UserError(f"the report {path} cannot be written: {error.strerror}") from error
    return not beginning or (b"<html" in beginning and b"epigram" in beginning)


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = resources.files("epigram.run.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "page.html").read_text("utf-8"))
    plots = [(plot.title, Markup(draw(plot, number))) for number, plot in enumerate(curves(runs))]
    return template.render(
        title=", ".join(run.name for run in runs),
        style=Markup((folder / "page.css").read_text("utf-8")),
        views=[view(run, index) for index, run in enumerate(runs)],
        overview=overview(runs) if len(runs) > 1 else None,
        plots=plots,
    )


def view(run: Run, index: int = 0) -> RunView:
    """Everything that the page says about one run."""
    mood, sentence = verdict(run)
    baselines, note = compare(run)
    sizes = run.list_of_rows("sizes")
    bar = next((key for key in ("bytes", "stored_bytes") if any(key in row for row in sizes)), "")
    return RunView(
        run=run,
        colour=index % NUM_COLOURS,
        mood=mood,
        verdict=sentence,
        tiles=[tile for tile in (_score_tile(run), _bytes_tile(run), _time_tile(run)) if tile],
        facts=[(tables.heading(key), tables.text(key, run.result[key])) for key in _FACTS if key in run.result],
        scores=tables.grid(score_rows(run)),
        sizes=tables.grid(sizes, bar=bar),
        quantization=tables.grid(run.list_of_rows("quantization")),
        baselines=baselines,
        baseline_note=note,
        samples=samples(run),
        log_tail=() if run.result.get("status") == "finished" else run.log_tail,
        calibration=tables.pairs(run.part("calibration")),
        config=tables.pairs(run.config),
        environment=tables.pairs(run.environment),
    )


def _score_tile(run: Run) -> Tile | None:
    if best := best_score(run):
        model, method, row = best
        sizes = [("seq_len", "window"), ("stride", "stride")]
        words = [f"{word} {row[key]:,}" for key, word in sizes if is_number(row.get(key))]
        value = f"{row['val_bpb']:.4f}"
        return Tile(value=value, unit="bits per byte", note=", ".join([model, method, *words]))
    steps, values = run.curve("val_bpb")
    if values:
        note = f"last validation, step {steps[-1]:,.0f}"
        return Tile(value=f"{values[-1]:.4f}", unit="bits per byte", note=note)
    return None


def _bytes_tile(run: Run) -> Tile | None:
    size, cap = size_and_cap(run)
    if size is None:
        return None
    note = f"{100 * size / cap:.1f} % of the cap of {cap:,.0f}" if cap else "no cap is known"
    return Tile(value=f"{size:,.0f}", unit="bytes", note=note, share=size / cap if cap else None)


def _time_tile(run: Run) -> Tile | None:
    seconds, budget_s = time_and_budget(run)
    if seconds is None:
        return None
    parts = [f"{word} {run.result[key]:.1f} s" for key, word in TIMES if is_number(run.result.get(key))]
    share = seconds / budget_s if budget_s else None
    note = (f"{100 * share:.1f} % of {tables.duration(budget_s or 0)}: " if share else "") + ", ".join(parts)
    return Tile(value=tables.duration(seconds), unit="", note=note, share=share)
