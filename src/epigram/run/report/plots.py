"""The report's curves, as SVG that takes its colours and its typeface from the page around it.

matplotlib is given marker colours, which are replaced by the page's CSS variables, so that one drawing serves
the light and the dark scheme. Nothing in the result refers to anything outside the page.
"""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from epigram.run.report.style import Colours, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_COLOURS = 6  # --run-0 .. --run-5 of the page
_SIZE_INCHES = (4.3, 2.55)  # about as wide as half a page, so that text keeps its size on a phone
_MOST_POINTS = 240  # of one curve; longer ones are drawn as mean and range of their pieces
_SETTLED_FRAC = 0.02  # of the steps; earlier losses do not stretch the axis

_MARKERS = Colours(
    ink="#0a0b01", soft="#0a0b02", rule="#0a0b03", series=tuple(f"#0a0b1{index}" for index in range(NUM_COLOURS))
)
_VARIABLES = {_MARKERS.ink: "var(--ink)", _MARKERS.soft: "var(--soft)", _MARKERS.rule: "var(--rule)"} | {
    marker: f"var(--run-{index})" for index, marker in enumerate(_MARKERS.series)
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve. run: which run it belongs to, which gives its colour. dotted: few points, drawn with marks."""

    label: str
    run: int
    steps: Sequence[float]
    values: Sequence[float]
    dotted: bool = False


@dataclass(frozen=True, kw_only=True)
class Plot:
    """settle: choose the value axis by what comes after the first steps. marks: (step, word) upright."""

    title: str
    series: tuple[Series, ...]
    settle: bool = False
    from_zero: bool = False
    marks: tuple[tuple[float, str], ...] = ()


def draw(plot: Plot, number: int) -> str:
    """The plot as an <svg> element. number: of the plot on the page, which keeps its ids apart."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # A Figure of its own, without pyplot: no global state, no window system.
    with rc_context(style(_MARKERS)):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.subplots()
        for series in plot.series:
            _draw_series(axes, series)
        _draw_axes(axes, plot)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return embed(buffer.getvalue(), f"plot{number}", plot.title)


def _draw_series(axes: "Axes", series: Series) -> None:
    colour = _MARKERS.series[series.run % NUM_COLOURS]
    line = "-" if series.run < NUM_COLOURS else "--"
    if series.dotted:
        axes.plot(series.steps, series.values, "o-", color=colour, ms=2.6, lw=1.0, label=series.label, zorder=3)
        return
    steps, means, lows, highs = thin(series.steps, series.values)
    if len(means) < len(series.values):
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.18, lw=0)
    axes.plot(steps, means, line, color=colour, lw=1.3, label=series.label)


def _draw_axes(axes: "Axes", plot: Plot) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("step")
    if plot.settle and (limits := settled_limits(plot.series)):
        axes.set_ylim(*limits)
    if plot.from_zero:
        axes.set_ylim(bottom=0)
    for step, word in plot.marks:
        axes.axvline(step, color=_MARKERS.soft, lw=0.8, ls=(0, (2, 2)))
        at = axes.get_xaxis_transform()  # steps across, a share of the height up
        offset: dict[str, Any] = {"xytext": (3, -7), "textcoords": "offset points"}
        axes.annotate(word, (step, 1), xycoords=at, color=_MARKERS.soft, size=7.5, **offset)
    if any(series.label for series in plot.series):
        axes.legend(loc="best")


def short(value: float) -> str:
    """A tick's label: 1.5M, 20k, 0.25."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.4g}"


def thin(
    steps: Sequence[float], values: Sequence[float], most: int = _MOST_POINTS
) -> tuple[list[float], list[float], list[float], list[float]]:
    """At most `most` points: (step, mean, least, largest) of equal pieces; short curves stay as they are."""
    import numpy as np

    if len(values) <= most:
        return list(steps), list(values), list(values), list(values)
    cuts = range(-(-len(values) // most), len(values), -(-len(values) // most))
    pieces = np.split(np.array(values), cuts)
    middles = [float(piece.mean()) for piece in np.split(np.array(steps), cuts)]
    means, lows, highs = ([float(f(piece)) for piece in pieces] for f in (np.mean, np.min, np.max))
    return middles, means, lows, highs


def settled_limits(series: Sequence[Series]) -> tuple[float, float] | None:
    """Limits of the value axis from what comes after the first steps; None when that is nothing."""
    last = max((step for s in series for step in s.steps), default=0)
    late = [v for s in series for step, v in zip(s.steps, s.values, strict=True) if step > _SETTLED_FRAC * last]
    if not late or min(late) == max(late):
        return None
    margin = 0.05 * (max(late) - min(late))
    return min(late) - margin, max(late) + margin


def embed(svg: str, prefix: str, label: str) -> str:
    """matplotlib's file as an element of a page: no declarations, ids of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"', "", svg)
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()
