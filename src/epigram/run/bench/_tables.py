"""What a benchmark found, as tables that read the same on a terminal and in a file."""

import sys
from collections.abc import Mapping
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from epigram.run.bench._kernels import KINDS, Breakdown

_WIDTH = 132  # of plain text, where no terminal has one
_LONGEST_NAME = 70

Result = Mapping[str, Any]


def print_result(result: Result) -> None:
    """The result of `epigram.run.benchmark.benchmark`, on standard output."""
    console = _console(None)
    repeats = result["rows"][0]["repeats"]
    _lines(console, *_head(result), f"{result['benchmark']}: {repeats} timed call{'s' if repeats > 1 else ''} each")
    console.print(_rows(result))
    _lines(console, *(_figure(name, value) for name, value in result["figures"].items()))
    _lines(console, *(f"left out: {name}: {reason}" for name, reason in result["left_out"].items()))
    _lines(console, *(["", "for the recipe:", "", result["paste"]] if result["paste"] else []))


def print_breakdown(found: Breakdown, file: IO[str] | None = None) -> None:
    """Time by kind, and the kernels that took longest."""
    console = _console(file)
    unprofiled = "" if found.unprofiled_ms is None else f", {found.unprofiled_ms:.3f} ms without the profiler"
    _lines(console, f"mean of {found.steps} calls, {found.wall_ms:.3f} ms each under the profiler{unprofiled}")
    kinds = _table("kind", "ms a call", "share", "kernels")
    for kind in KINDS:
        share = f"{100 * found.kinds[kind] / found.wall_ms:.1f} %"
        kinds.add_row(kind, f"{found.kinds[kind]:.3f}", share, f"{found.calls[kind]:g}" if found.calls[kind] else "")
    console.print(kinds)
    top = _table("the longest kernels", "kind", "ms a call", "kernels")
    top.columns[1].justify = "left"
    for kernel in found.top:
        top.add_row(_shortened(kernel.name), kernel.kind, f"{kernel.ms:.3f}", f"{kernel.calls:g}")
    console.print(top)


def _console(file: IO[str] | None) -> Console:
    terminal = file is None and sys.stdout.isatty()
    return Console(file=file, width=None if terminal else _WIDTH, markup=False)


def _lines(console: Console, *lines: str) -> None:
    """Text as it is, however wide."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table()
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=bool(place))
    return table


def _head(result: Result) -> list[str]:
    machine, ceilings = result["machine"], result["ceilings"]
    commit = machine["commit"]
    source = f"{commit['hash'][:10]}{' (changed)' if commit['changed'] else ''}" if commit else "installed"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return [
        f"machine: {_hardware(machine)}",
        f"versions: {versions}; {source}",
        f"recipe: {' '.join([result['recipe'], *result['settings']])}",
        *(f"{name}: {choice}" for name, choice in machine["paths"].items() if name != "device"),
        f"ceilings: {ceilings['copy_bytes_per_s'] / 1e9:,.1f} GB/s copied (read + written), "
        f"{ceilings['product_flops_per_s'] / 1e12:,.3g} TFLOP/s in {ceilings['dtype']} products, measured here",
    ]


def _hardware(machine: Mapping[str, Any]) -> str:
    if machine["paths"]["device"] in ("cpu", "mps"):
        return f"{machine['cpu']}, {machine['threads']} threads"
    return f"{machine['paths']['device']}, driver {machine['driver']}"


def _rows(result: Result) -> Table:
    rates = list(dict.fromkeys(unit for row in result["rows"] for unit in row["rates"]))
    table = _table(result["benchmark"], "median ms", "10-90 %", "floor ms", "of ceiling", "first s", *rates)
    for row in result["rows"]:
        floor, share, first = row["floor_ms"], row["floor_share"], row["first_s"]
        table.add_row(
            row["name"],
            _ms(row["median_ms"]),
            f"{_ms(row['p10_ms'])} - {_ms(row['p90_ms'])}",
            "" if floor is None else _ms(floor),
            "" if share is None else f"{100 * share:.0f} %",
            "" if first is None else f"{first:.2f}",
            *(_rate(row["rates"].get(unit)) for unit in rates),
        )
    return table


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _figure(name: str, value: float) -> str:
    """A figure's name ends with its unit."""
    words, _, unit = name.rpartition("_")
    if unit == "bytes":
        return f"{words.replace('_', ' ')}: {value:,.0f} bytes"
    return f"{words.replace('_', ' ')}: {value:,.2f} s" if unit == "s" else f"{name.replace('_', ' ')}: {value:,.0f}"


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
