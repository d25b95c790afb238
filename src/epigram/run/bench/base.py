"""What a benchmark is given and what it finds.

A benchmark is one file of this folder with

    REPEATS: int               timed calls, unless the user asks for another number
    OPTIONS: frozenset[str]    fields of `Options` that it honours; others are refused
    run(bench)                 times its parts by `bench.time`, and notes what else there is to say

Files that begin with an underscore are what benchmarks share.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from epigram.compiling import compile_shapes
from epigram.data.lanes import Lane
from epigram.run.bench._ceilings import Ceilings, Work
from epigram.run.bench._kernels import Breakdown
from epigram.run.bench._timing import WARM_UP, Timing, measure
from epigram.run.setup import Engine

PACKAGE = "epigram.run.bench"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Options:
    """What only some benchmarks understand; None and () where the user said nothing.

    profile: folder for a trace and the tables of kernels. methods, seq_len, stride: of scoring. codecs: of packing.
    """

    profile: Path | None = None
    methods: tuple[str, ...] = ()
    seq_len: int | None = None
    stride: int | None = None
    codecs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was timed.

    work: what it cannot do without, as parts that follow each other; () where that is not known. amounts: what one
    call handles, by unit ("tokens"), to be shown as a rate.
    """

    name: str
    timing: Timing
    work: tuple[Work, ...] = ()
    amounts: Mapping[str, float] = field(default_factory=dict)

    def rates(self) -> dict[str, float]:
        """Amounts a second at the median time."""
        return {f"{unit}/s": 1000 * amount / self.timing.median_ms for unit, amount in self.amounts.items()}

    def as_dict(self, ceilings: Ceilings) -> dict[str, Any]:
        """Plain values for JSON; floor_ms and floor_share are None where the work is not known."""
        low_ms, high_ms = self.timing.spread_ms
        floor_ms = ceilings.floor_ms(self.work) if self.work else None
        return {
            "name": self.name,
            "median_ms": self.timing.median_ms,
            "p10_ms": low_ms,
            "p90_ms": high_ms,
            "repeats": self.timing.repeats,
            "first_s": self.timing.first_s,
            "flops": sum(part.flops for part in self.work),
            "traffic_bytes": sum(part.bytes for part in self.work),
            "floor_ms": floor_ms,
            "floor_share": None if floor_ms is None else floor_ms / self.timing.median_ms,
            "amounts": dict(self.amounts),
            "rates": self.rates(),
        }


@dataclass(kw_only=True)
class Bench:
    """A benchmark at work: what it may use, and what it has found so far.

    left_out: what was not timed, and why. figures: numbers about the whole. breakdown: of a profile, if one was asked
    for. to_profile: where a benchmark makes none of its own, what one is made of: all that was timed. paste: lines for
    a recipe that the benchmark proposes.
    """

    engine: Engine
    repeats: int
    options: Options = field(default_factory=Options)
    advance: Callable[[], None] = lambda: None
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    breakdown: Breakdown | None = None
    to_profile: list[tuple[Row, Callable[[], Any]]] = field(default_factory=list)
    paste: str = ""

    def time(
        self,
        name: str,
        work: Callable[[], Any],
        *parts: Work,
        before: Callable[[], Any] | None = None,
        warm_up: int = WARM_UP,
        queued: bool = False,
        amounts: Mapping[str, float] | None = None,
        profiled: bool = True,
    ) -> Row:
        """Time `work` as `measure` does, and keep the row; `parts` is what it cannot do without.

        profiled: whether a profile of all rows is to have this one.
        """
        context = self.engine.context
        timing = measure(work, context, repeats=self.repeats, before=before, warm_up=warm_up, queued=queued)
        row = Row(name=name, timing=timing, work=parts, amounts=amounts or {})
        self.rows.append(row)
        if profiled and self.options.profile:
            self.to_profile.append((row, work if before is None else partial(in_turn, before, work)))
        self.advance()
        return row

    def compile(self, function: F) -> F:
        """`function` as the run would call it: compiled for each shape where the recipe compiles."""
        compiled: F = compile_shapes(function) if self.engine.compiled else function
        return compiled

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal numbers in the compute precision, on the device."""
        generator = torch.Generator(self.engine.context.device).manual_seed(seed)
        device, dtype = self.engine.context.device, self.engine.model.compute_dtype
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def lanes(self) -> list[Lane]:
        """The distinct shapes among the lanes of this process, in the recipe's order."""
        lanes = self.engine.config.flat_lanes
        return list(dict.fromkeys(lanes[i] for i in self.engine.lanes))


def in_turn(*works: Callable[[], Any]) -> None:
    for work in works:
        work()


def lane_name(lane: Lane) -> str:
    return f"{lane.num_seqs} x {lane.seq_len}"


@torch.no_grad()
def fill_zeros(engine: Engine) -> None:
    """Give matrices and tables that begin as zeros the spread of trained ones.

    Zeros draw less power than real weights, so that a GPU would run them faster, and they pack into nothing.
    """
    generator = torch.Generator().manual_seed(engine.config.seed)
    roles = engine.model.roles()
    for name, parameter in engine.model.named_parameters():
        if roles[name].kind != "control" and not parameter.any():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, parameter.shape[-1] ** -0.5, generator=generator))
