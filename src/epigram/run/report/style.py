"""How plots look, on the report's page and in files beside documents: the same typeface, axes and colours."""

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Colours:
    """ink: titles. soft: labels and notes. rule: axes and grid. series: of curves and points, in their order."""

    ink: str
    soft: str
    rule: str
    series: tuple[str, ...]


@cache
def page_colours() -> Colours:
    """The page's on a light background, as page.css has them."""
    css = (resources.files("epigram.run.report") / "page.css").read_text("utf-8")
    light = css[: css.index("@media")]
    found = dict(re.findall(r"--([\w-]+): (#\w{6})", light))
    series = tuple(colour for name, colour in found.items() if name.startswith("run-"))
    return Colours(ink=found["ink"], soft=found["soft"], rule=found["rule"], series=series)


def style(colours: Colours) -> dict[Any, Any]:
    """matplotlib's settings, for `rc_context`. The same drawing gives the same SVG, whose text stays text."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "epigram",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "text.color": colours.ink,
        "axes.edgecolor": colours.rule,
        "axes.labelcolor": colours.soft,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.formatter.useoffset": False,
        "grid.color": colours.rule,
        "grid.linewidth": 0.6,
        "xtick.color": colours.rule,
        "ytick.color": colours.rule,
        "xtick.labelcolor": colours.soft,
        "ytick.labelcolor": colours.soft,
        "ytick.left": False,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "legend.handlelength": 1.4,
    }
