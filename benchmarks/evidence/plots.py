"""The plots of docs/results.md, one for each claim, as SVG files that stay the same while their data do."""

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from epigram.run.report.style import page_colours, style

_LABEL_CHARS = 46  # of a line beside a row


@dataclass(frozen=True, kw_only=True)
class Point:
    """x, y with its spread (standard deviation over seeds, 0 for one seed), and a word beside it."""

    x: float
    y: float
    spread: float = 0.0
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """series by name. rows: the points stand one below the other, named by their labels, y across. log_x: base of a
    logarithmic axis, 0 for a plain one."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[Point]]
    rows: bool = False
    log_x: int = 0

    @property
    def fingerprint(self) -> str:
        """Of all that is drawn, and how; it stands in the file, which depends on the version of matplotlib too."""
        whole = [asdict(self), style(page_colours())]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def save(drawing: Drawing, path: Path) -> None:
    """Draw into an SVG file; one that shows the same already is left alone."""
    if path.exists() and drawing.fingerprint in path.read_text("utf-8"):
        return
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(style(page_colours())):
        most = max(map(len, drawing.series.values()))
        figure = Figure(figsize=(7.2, 1.1 + 0.26 * most if drawing.rows else 3.4), layout="constrained")
        axes = figure.subplots()
        (_rows if drawing.rows else _lines)(axes, drawing)
        figure.suptitle(drawing.title, x=0.01, ha="left", size=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Creator": None, "Description": f"data {drawing.fingerprint}"}
        figure.savefig(path, format="svg", metadata=about)
    path.write_text("\n".join(line.rstrip() for line in path.read_text("utf-8").splitlines()) + "\n", "utf-8")


def _rows(axes: Any, drawing: Drawing) -> None:
    (points,) = drawing.series.values()
    colours = page_colours()
    at = range(len(points), 0, -1)
    spreads = [point.spread for point in points]
    axes.errorbar([p.y for p in points], at, xerr=spreads, fmt="o", color=colours.series[0], ms=5, lw=1.2, capsize=2)
    axes.set_yticks(list(at), [textwrap.fill(point.label, _LABEL_CHARS) for point in points])
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylim(0.4, len(points) + 0.6)
    for point, height in zip(points, at, strict=True):
        offset: dict[str, Any] = {"xytext": (7, 4), "textcoords": "offset points"}
        axes.annotate(f"{point.y:.4f}", (point.y, height), color=colours.soft, size=7.5, **offset)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlabel(drawing.y_label)


def _lines(axes: Any, drawing: Drawing) -> None:
    colours = page_colours()
    for colour, (name, points) in zip(cycle(colours.series), drawing.series.items(), strict=False):
        x, y, spread = ([getattr(p, key) for p in points] for key in ("x", "y", "spread"))
        marks = "o" if any(point.label for point in points) else "o-"
        axes.errorbar(x, y, yerr=spread, fmt=marks, color=colour, ms=4, lw=1.2, capsize=2, label=name)
        for point in points:
            if point.label:
                offset: dict[str, Any] = {"xytext": (5, 4), "textcoords": "offset points"}
                axes.annotate(point.label, (point.x, point.y), color=colours.soft, size=7, **offset)
    if drawing.log_x:
        axes.set_xscale("log", base=drawing.log_x)
        ticks = sorted({point.x for points in drawing.series.values() for point in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    axes.set_xlabel(drawing.x_label)
    axes.set_ylabel(drawing.y_label)
    if len(drawing.series) > 1:
        axes.legend()
