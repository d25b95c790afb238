"""Runs one of the benchmarks of `epigram.run.bench` on a recipe and this machine."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from epigram import plugin
from epigram.config import load_recipe
from epigram.dist.context import open_context
from epigram.errors import UserError
from epigram.progress import Progress
from epigram.run.bench._ceilings import Ceilings, measure_ceilings
from epigram.run.bench._kernels import Breakdown
from epigram.run.bench._profile import NUMBERS, TABLE, prepare_folder, profile_rows
from epigram.run.bench._tables import print_breakdown, print_result
from epigram.run.bench.base import PACKAGE, Bench, Options, fill_zeros
from epigram.run.machine import environment
from epigram.run.setup import build_engine

_RECIPES = {"cuda": "h100", "cpu": "smoke", "mps": "smoke"}
"""Without a word of the user: what is meant for the device, and where none is, what takes seconds."""


def benchmark(
    name: str,
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    repeats: int | None = None,
    device: str = "auto",
    options: Options | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Time what the file `name` of `epigram.run.bench` times, and return plain values for JSON.

    recipe: by default h100 on CUDA, smoke elsewhere. repeats: timed calls, by default the benchmark's own number.
    show: print the tables. Raises UserError for an unknown benchmark, and for an option that it does not have.
    """
    module, options = plugin.load(PACKAGE, name), options or Options()
    _check_options(name, options)
    with open_context(device) as context:
        if context.world_size > 1:
            raise UserError("bench times one process: start it without torchrun")
        recipe = recipe or _RECIPES[context.device.type]
        config = load_recipe(recipe, overrides)
        if options.profile:
            prepare_folder(options.profile)
        engine = build_engine(config, context)
        fill_zeros(engine)
        ceilings = measure_ceilings(context, engine.model.compute_dtype)
        with Progress(f"bench {name}", unit="timings") as bar:
            bench = Bench(engine=engine, repeats=repeats or module.REPEATS, options=options, advance=bar.advance)
            module.run(bench)
            if options.profile and bench.breakdown is None:
                bench.breakdown = profile_rows(bench, options.profile)
        result = {
            "benchmark": name,
            "recipe": recipe,
            "settings": list(overrides),
            "machine": environment(engine.paths),
            "ceilings": ceilings.as_dict(),
            **_found(bench, ceilings),
        }
    if show:
        print_result(result)
    if bench.breakdown:
        _write_breakdown(bench.breakdown, options, show)
    return result


def _found(bench: Bench, ceilings: Ceilings) -> dict[str, Any]:
    return {
        "rows": [row.as_dict(ceilings) for row in bench.rows],
        "figures": bench.figures,
        "left_out": bench.left_out,
        "paste": bench.paste,
        "kernels": bench.breakdown.as_dict() if bench.breakdown else None,
    }


def _check_options(name: str, options: Options) -> None:
    """Raises UserError for an option that the benchmark does not honour: nothing is ignored."""
    given = [field.name for field in fields(Options) if getattr(options, field.name)]
    for wrong in [option for option in given if option not in plugin.load(PACKAGE, name).OPTIONS]:
        having = [other for other in plugin.names(PACKAGE) if wrong in plugin.load(PACKAGE, other).OPTIONS]
        flag = "--" + wrong.replace("_", "-").removesuffix("s")
        raise UserError(f"bench {name} has no {flag}: it belongs to {', '.join(having)}")


def _write_breakdown(breakdown: Breakdown, options: Options, show: bool) -> None:
    assert options.profile is not None
    with (options.profile / TABLE).open("w", encoding="utf-8") as file:
        print_breakdown(breakdown, file)
    (options.profile / NUMBERS).write_text(json.dumps(breakdown.as_dict(), indent=1) + "\n", encoding="utf-8")
    if show:
        print_breakdown(breakdown)
        print(f"profile: {options.profile} (trace.json opens in Perfetto or chrome://tracing)")
