"""Tables, comparisons and plots of all results, written into docs/results.md and README.md between markers.

What has no result says so: the page shows the whole plan at any time. Running it again changes nothing.
"""

import re
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.evidence.cell import EVIDENCE
from benchmarks.evidence.commands import commands_of, sets
from benchmarks.evidence.plan import BASE, PUBLISHED, Claim, Plan, Variant
from benchmarks.evidence.plots import Drawing, Point, save
from benchmarks.evidence.rows import (
    NONE,
    Difference,
    Row,
    difference_of,
    of_whole_text,
    read_json,
    rival_of,
    row_of,
    rows_of,
    times_of,
)
from benchmarks.evidence.runner import found_results
from epigram.config import load_recipe
from epigram.errors import UserError
from epigram.run.record import ENVIRONMENT, RESULT

BEGIN, END = "<!-- evidence: python -m benchmarks.evidence report -->", "<!-- end of evidence -->"
HEAD_BEGIN, HEAD_END = "<!-- headline: python -m benchmarks.evidence report -->", "<!-- end of headline -->"
MISSING = "not measured"


def write_pages(plan: Plan, results: Path, docs: Path, readme: Path) -> list[Path]:
    """Write both pages and the plots. results: holds `evidence/` and folders of earlier runs, and takes `plots/`."""
    found = {
        name: result for name, result in found_results([results / "evidence"]).items() if result["status"] == "finished"
    }
    sections = [_intro(plan), _in_short(plan, found)]
    sections += [_section(plan, claim, found, results) for claim in plan.claims.values()]
    sections.append(_earlier(results))
    page = docs / "results.md"
    _replace(page, BEGIN, END, "\n\n".join(section for section in sections if section))
    _replace(readme, HEAD_BEGIN, HEAD_END, headline(plan, found, results))
    return [page, readme]


def _replace(path: Path, begin: str, end: str, text: str) -> None:
    before = path.read_text("utf-8")
    if before.count(begin) != 1 or before.count(end) != 1:
        raise UserError(f"{path} needs the line {begin} and, below it, {end}")
    head, rest = before.split(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


# -- a claim --------------------------------------------------------------------------------------------------------


def _intro(plan: Plan) -> str:
    return f"""## Claims and questions

Written by `python -m benchmarks.evidence report` from `docs/results/evidence/`, which holds config, log and result of
every run; `python -m benchmarks.evidence run` makes them, and `list` says what each costs. Where a command may take
ten minutes, `run --data two=data/two --data two-8192=data/two-8192 ... --seconds 560 --archive evidence.tgz
--goes-on` does the most important ones first, and the same command, given again on that machine, goes on with what it
had begun. A mean over several seeds stands with its standard deviation. A negative difference is a better score; it
is tested seed by seed as by `epigram compare`, and one seed shows a difference but proves none. Scores are on the
validation file, on which settings were also chosen. Data folder `two-N` is `epigram data build train-00.jsonl.zst
train-01.jsonl.zst --val val.jsonl.zst --tokenizer fineweb_N_bpe.model`, `two` the one of 1,024 pieces, and
`three-8192` has `train-02.jsonl.zst` too. In the commands, SEED is each of the row's, and

```
SHORT=({sets(plan.defaults)})
```"""


def _section(plan: Plan, claim: Claim, found: dict[str, Any], results: Path) -> str:
    lines = [f"### {claim.title}", ""]
    lines += [f"Published: {claim.published}.", ""] if claim.published else []
    lines += [claim.text, ""]
    lines += [f"**Found:** {claim.found}", ""] if claim.found else []
    if claim.plot == "steps":
        table, drawing = _steps(plan, claim, found)
    else:
        rows = rows_of(plan, claim, found)
        table, drawing = _table(plan, claim, rows, found), _drawing(claim, rows)
    lines += [*_machines(plan, claim, found), *table]
    plot = results / "plots" / f"{claim.name}.svg"
    if drawing is not None:
        save(drawing, plot)
        lines += ["", f"![{claim.title}](results/plots/{plot.name})"]
    else:
        plot.unlink(missing_ok=True)
    if commands := commands_of(plan, claim):
        lines += ["", "<details><summary>Commands</summary>", "", "```", *commands, "```", "", "</details>"]
    return "\n".join(lines)


def _in_short(plan: Plan, found: dict[str, Any]) -> str:
    """A line for each claim: how much of it is measured, and its best row; then what was no better than before."""
    head = ["", "published", "rows", "best", "score", "", "bytes", "difference"]
    lead = (
        "Each section in a line: how many of its rows are measured, and which has the lowest score. A file that is",
        "marked *over* is over the cap with its code.",
    )
    lines = [*lead, "", _line(head), _line(["---"] * len(head))]
    for claim in plan.claims.values():
        best = _best_times(plan, claim, found) if claim.plot == "steps" else _best_row(plan, claim, found)
        lines.append(_line([_link(claim), claim.published or NONE, *best]))
    return "\n".join([*lines, *_no_help(plan, found)])


def _best_row(plan: Plan, claim: Claim, found: dict[str, Any]) -> list[str]:
    rows = rows_of(plan, claim, found)
    measured = [row for row in rows if row.values(claim.compare)]
    count = f"{len(measured)} of {len(rows)}"
    if not measured:
        return [count, *[NONE] * 5]
    beside_published = [row for row in measured if rival_of(claim, row) == PUBLISHED]
    best = min(beside_published or measured, key=lambda row: statistics.fmean(row.values(claim.compare).values()))
    score = _mean(best.values(claim.compare), "{:.4f}")
    difference = str(difference_of(plan, claim, best, found))
    return [count, best.label, claim.compare, score, _size(best, "entropy"), difference]


def _best_times(plan: Plan, claim: Claim, found: dict[str, Any]) -> list[str]:
    """What the window named `compare` saves, at every length."""
    times = times_of(plan, claim, found)
    both = {length: t for length, t in times.items() if {claim.compare, "none"} <= t.keys()}
    count = f"{len(both)} of {len(times)}"
    if not both:
        return [count, *[NONE] * 5]
    saved = ", ".join(f"{100 * (t[claim.compare] / t['none'] - 1):+.0f} %" for t in both.values())
    return [count, f"window {claim.compare}", "ms a step", NONE, NONE, f"{saved} at {', '.join(both)}"]


def _no_help(plan: Plan, found: dict[str, Any]) -> list[str]:
    """What was tried for the recipe and has no lower score than what it is compared with."""
    lines = []
    for claim in plan.claims.values():
        rows = [row for row in rows_of(plan, claim, found) if row.variant == BASE] if claim.tried else []
        pairs = [(row, difference_of(plan, claim, row, found)) for row in rows]
        worse = [f"{row.label} ({d})" for row, d in pairs if isinstance(d, Difference) and round(d.bpb, 4) >= 0]
        lines += [f"- {_link(claim)}: {'; '.join(worse)}"] if worse else []
    if not lines:
        return []
    words = "Tried, and no better (mostly one seed each, and seeds of one setting differ by a thousandth or two):"
    return ["", words, "", *lines]


def _link(claim: Claim) -> str:
    """To the section of a claim, by what GitHub makes of its heading."""
    anchor = re.sub(r"[^\w\- ]", "", claim.title.lower()).replace(" ", "-")
    return f"[{claim.title}](#{anchor})"


def _machines(plan: Plan, claim: Claim, found: dict[str, Any]) -> list[str]:
    """The machines of a claim's figures, a sentence each."""
    seen = []
    for cell in plan.cells:
        result = found.get(cell.name)
        if result is None or (cell.experiment.claim != claim.name and cell.experiment.name not in claim.also):
            continue
        machine = read_json(Path(result["folder"]) / ENVIRONMENT)
        versions = machine.get("versions", {})
        known = [f"{name} {versions[name]}" for name in ("torch", "triton", "flash-attn-4") if versions.get(name)]
        if (words := ", ".join([result.get("gpu", "unknown"), *known])) not in seen:
            seen.append(words)
    return [f"Measured on {'; '.join(seen)}.", ""] if seen else []


def _table(plan: Plan, claim: Claim, rows: Sequence[Row], found: dict[str, Any]) -> list[str]:
    codecs = ["entropy", *sorted({c for r in rows for v in r.experiment.variants for c in v.codecs} - {"entropy"})]
    compared = any(rival_of(claim, row) for row in rows)
    head = ["", "seeds", "steps, ms", *claim.columns, *(f"bytes, {codec}" for codec in codecs)]
    head += [f"difference in {claim.compare}"] if compared else []
    lines = [_line(head), _line(["---"] * len(head))]
    for words in claim.reference:
        figures = [words.get(key, NONE) for key in ("steps, ms", *claim.columns, *(f"bytes, {c}" for c in codecs))]
        lines.append(_line([words["label"], NONE, *figures, *([""] if compared else [])]))
    for row in rows:
        cells = [row.label, ", ".join(map(str, row.seeds)) or MISSING, _pace(row)]
        cells += [_mean(row.values(column), "{:.4f}") for column in claim.columns]
        cells += [_size(row, codec) for codec in codecs]
        cells += [str(difference_of(plan, claim, row, found))] if compared else []
        lines.append(_line(cells))
    notes = sorted({f"{row.label}: {note}." for row in rows for note in row.notes})
    return [*lines, *(["", *notes] if notes else [])]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _pace(row: Row) -> str:
    if not row.steps:
        return NONE
    return f"{statistics.fmean(row.steps.values()):,.0f}, {statistics.fmean(row.step_ms.values()):.1f}"


def _mean(values: dict[int, Any], form: str) -> str:
    """Mean, with the standard deviation where there is more than one seed."""
    if not values:
        return NONE
    mean = form.format(statistics.fmean(values.values()))
    return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values.values()))}"


def _size(row: Row, codec: str) -> str:
    """Bytes of the file, and whether it is too large for the cap with the code."""
    sizes = row.sizes.get(codec, {})
    return _mean(sizes, "{:,.0f}") + (", *over*" if max(sizes.values(), default=0) > _most_bytes() else "")


@cache
def _most_bytes() -> int:
    """What the cap leaves for a model file of the recipe h100."""
    artifact = load_recipe("h100").artifact
    return artifact.cap_bytes - artifact.code_bytes


def _steps(plan: Plan, claim: Claim, found: dict[str, Any]) -> tuple[list[str], Drawing | None]:
    """Times by length and window, as of 65,536 tokens, with the share that a window saves."""
    windows = [v.name for v in next(e for e in plan.experiments if e.claim == claim.name).variants]
    head = ["length", *(f"window {window}" for window in windows)]
    lines, series = [_line(head), _line(["---"] * len(head))], {f"window {window}": [] for window in windows}
    for length, times in times_of(plan, claim, found).items():
        cells = []
        for window in windows:
            if window not in times:
                cells.append(MISSING)
                continue
            series[f"window {window}"].append(Point(x=int(length), y=times[window]))
            saved = 100 * (1 - times[window] / times["none"]) if "none" in times and window != "none" else None
            faster = "" if saved is None else f" ({abs(saved):.1f} % {'less' if saved >= 0 else 'more'})"
            cells.append(f"{times[window]:.1f} ms{faster}")
        lines.append(_line([length, *cells]))
    series = {name: points for name, points in series.items() if points}
    drawing = Drawing(
        title=claim.title, x_label="tokens in a sequence", y_label="ms a step of 65,536 tokens", series=series, log_x=2
    )
    return lines, drawing if series else None


def _drawing(claim: Claim, rows: Sequence[Row]) -> Drawing | None:
    measured = [row for row in rows if row.values(claim.compare)]
    if not measured:
        return None
    words = f"bits per byte, {claim.compare}"
    if claim.plot == "curve":
        series: dict[str, list[Point]] = {}
        for column in claim.columns:
            points = [_point(row, column, x=row.experiment.train_s) for row in measured if row.values(column)]
            series[column] = sorted(points, key=lambda point: point.x)
        return Drawing(
            title=claim.title, x_label="seconds of training", y_label="bits per byte", series=series, log_x=10
        )
    if claim.plot == "bytes":
        points = [
            _point(
                row,
                claim.compare,
                x=statistics.fmean(row.sizes["entropy"].values()) / 1e6,
                label="as it is" if row.variant == BASE else row.variant,
            )
            for row in measured
            if "entropy" in row.sizes
        ]
        series = {"": points}
        return Drawing(title=claim.title, x_label="MB, entropy codec", y_label=words, series=series) if points else None
    points = [_point(row, claim.compare, x=0.0, label=row.label) for row in measured]
    return Drawing(title=claim.title, x_label="", y_label=words, series={"": points}, rows=True)


def _point(row: Row, column: str, *, x: float, label: str = "") -> Point:
    values = list(row.values(column).values())
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Point(x=x, y=round(statistics.fmean(values), 6), spread=round(spread, 6), label=label)


# -- other runs, and the headline -----------------------------------------------------------------------------------


def _earlier(results: Path) -> str:
    """A row for each run of before that has a folder of its own."""
    head = [
        "run",
        "recipe, seed",
        "GPU",
        "s",
        "steps, ms",
        "float blocks",
        "quantized blocks",
        "quantized sliding",
        "bytes",
    ]
    lines = ["### Runs of before", "", "With recipes of their time; what each was for stands below.", ""]
    lines += [_line(head), _line(["---"] * len(head))]
    for path in sorted(results.glob(f"*/{RESULT}")):
        result = read_json(path)
        if (path.parent / EVIDENCE).exists() or "scores" not in result:
            continue
        device = result.get("paths", {}).get("device") or "cpu"
        machine = read_json(path.parent / ENVIRONMENT)
        device = next((gpu["name"] for gpu in machine.get("gpus") or []), device)
        cells = [f"`{path.parent.name}`", f"{result['recipe']}, {result['seed']}", device, f"{result['train_s']:.0f}"]
        cells.append(f"{result['steps']:,}, {result['step_ms']:.1f}")
        for model, method in (("float", "blocks"), ("quantized", "blocks"), ("quantized", "sliding")):
            row = result["scores"].get(model, {}).get(method)
            cells.append(f"{row['val_bpb']:.4f} ({row['seq_len']})" if row else NONE)
        lines.append(_line([*cells, f"{result['artifact_bytes']:,}"]))
    return "\n".join(lines)


def _published(claim: Claim, row: Row, column: str) -> str:
    """What the published code reached, per byte of the text that the row's score is over, and on what."""
    (_, share), words = of_whole_text(row.text_bytes, row.counted.get(column, 0), claim.target_bytes)
    return f"the published code on one H100: {claim.target * share:.4f}{words}, and over the cap"


def headline(plan: Plan, found: dict[str, Any], results: Path) -> str:
    """The README's sentence: three and ten minutes of the recipe, or the run of before while they are not measured."""
    column, lines = "quantized sliding@2048/128", []
    for name, words in (("h100-180", "Three minutes"), ("h100-600", "Ten minutes")):
        experiment = next((e for e in plan.experiments if e.name == name), None)
        if experiment is None:
            continue
        row = row_of(plan, experiment, Variant(name=BASE), found)
        if not (values := row.values(column)):
            continue
        seeds = "one seed" if len(values) == 1 else f"{len(values)} seeds"
        beside = f" ({_published(plan.claims['h100'], row, column)})" if name == "h100-180" else ""
        size = f"{'at most ' if len(values) > 1 else ''}{max(row.sizes['entropy'].values()):,}"
        gpu, files = ", ".join(sorted(row.gpus)), experiment.about.split(", ", 1)[1]
        lines += [
            f"{words} with the `h100` recipe on one {gpu} reached **{_mean(values, '{:.4f}')} bits per byte**",
            f"({seeds}, sliding 2048/128, packed into {size} bytes) on a corpus of English prose,",
            f"training {files}{beside}.",
        ]
    if not lines:
        result = read_json(results / "h100-180s" / RESULT)
        bpb = result["scores"]["float"]["blocks"]["val_bpb"]
        steps = f"{result['steps']:,} steps of {result['step_ms']:.1f} ms"
        lines += [
            f"Three minutes with an earlier `h100` recipe took {steps} and reached {bpb:.3f} bits per byte in floating",
            "point on a corpus of English prose.",
        ]
    return "\n".join([*lines, "More, and how each figure came about: [docs/results.md](docs/results.md)."])
