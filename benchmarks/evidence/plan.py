"""The plan of experiments: typed, checked, and what each will cost.

An experiment is a recipe with settings, trained with each of its seeds; one seed of it is a cell, the unit that is run.
Whatever follows training (other quantization, other scores) shares the training of its cell as a variant.
"""

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from epigram.config import load_recipe
from epigram.errors import UserError
from epigram.evaluation.adapt_config import KINDS as ADAPTED
from epigram.evaluation.adapt_config import AdaptConfig, LoraConfig
from epigram.evaluation.windows import Method, stride_of

ROOT = Path(__file__).parents[2]
PLAN = Path(__file__).parent / "plan.toml"
PUBLISHED = "published"
"""Instead of an experiment to compare with: the number that the claim names."""

KINDS = ("train", "whole", "bench")
BASE = "base"
"""The variant that every trained cell has: exported as configured."""

_PLAIN = {'run.kernels="plain"', 'run.compile="off"', 'run.attention="sdpa"'}

_SPEC = re.compile(r"(blocks|sliding|streaming|sgd|lora)@(\d+)(?:/(\d+))?(?::(\d+))?$")


@dataclass(frozen=True)
class Spec:
    """A way to score, written METHOD@SEQ_LEN[/STRIDE][:MAX_TOKENS], such as sliding@6144/128:1000000.

    Of method sgd and lora the model learns meanwhile: over sliding windows of this stride, or from as many tokens of
    each document at a time.
    """

    method: str
    seq_len: int
    stride: int
    max_tokens: int = 0

    @classmethod
    def parse(cls, text: str) -> "Spec":
        found = _SPEC.match(text)
        if found is None:
            raise UserError(f"{text!r} is no way to score: write METHOD@SEQ_LEN[/STRIDE][:MAX_TOKENS]")
        method, seq_len = found[1], int(found[2])
        if method in ("sliding", *ADAPTED) and not found[3]:
            raise UserError(f"{text!r} needs a stride: write {method}@{seq_len}/128")
        stride = int(found[3]) if found[3] else 1
        windows = "sliding" if method in ADAPTED else method
        return cls(method, seq_len, stride_of(windows, seq_len, stride), int(found[4] or 0))

    @property
    def windows(self) -> Method:
        """What is scored by what; of a score that learns, where its windows lie."""
        name = "sliding" if self.adapt else self.method
        return Method(name=name, seq_len=self.seq_len, stride=self.stride)

    @property
    def adapt(self) -> AdaptConfig | None:
        """How the model learns meanwhile, if it does."""
        if self.method not in ADAPTED:
            return None
        return AdaptConfig(kind=self.method, lora=LoraConfig(chunk_tokens=self.stride))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An export of a trained cell with other settings, or one timing of a bench. codecs: sizes to find afterwards."""

    name: str
    about: str = ""
    set: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """kind: "train" (short of a file under the cap: many can be compared), "whole" (the recipe's whole job), "bench".

    priority: of each seed, small ones first. train_s: budget.train_s. data: name of a data folder. scores,
    float_scores: of the packed and the float model, besides those that the export itself makes. repeats: a cell whose
    config.toml is the recipe. group: cells that are compared with each other, and so belong on one kind of GPU.
    against: the experiment that it is compared with, if not the baseline of its claim, or "published". wall_s: what its
    training and compilation are expected to take, where that is not train_s; a guess for the order, no limit.
    """

    name: str
    claim: str
    about: str
    kind: str = "train"
    recipe: str = "h100"
    set: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1337,)
    priority: tuple[float, ...] = (100,)
    train_s: float = 60
    data: str = "two"
    group: str = ""
    scores: tuple[str, ...] = ()
    float_scores: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    repeats: str = ""
    against: str = ""
    wall_s: float = 0
    variants: tuple[Variant, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in KINDS:
            problems.append(f"kind = {self.kind!r} must be one of {', '.join(KINDS)}")
        if len(self.priority) not in (1, len(self.seeds)):
            problems.append(f"priority has {len(self.priority)} numbers for {len(self.seeds)} seeds")
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names) or BASE in names:
            problems.append(f"variants {names} need names of their own, none of them {BASE}")
        if problems:
            raise UserError(f"experiment {self.name}: {'; '.join(problems)}")
        for spec in (*self.scores, *self.float_scores, *(s for v in self.variants for s in v.scores)):
            Spec.parse(spec)


@dataclass(frozen=True)
class Cell:
    """One experiment with one seed. settings: all overrides, in order."""

    experiment: Experiment
    seed: int
    priority: float
    settings: tuple[str, ...]
    cost_s: float

    @property
    def name(self) -> str:
        return self.experiment.name if self.experiment.kind == "bench" else f"{self.experiment.name}-s{self.seed}"

    @property
    def recipe(self) -> str:
        """The recipe's name, or its file from anywhere."""
        name = self.experiment.recipe
        return str(ROOT / name) if name.endswith(".toml") else name

    @property
    def can_pause(self) -> bool:
        """Whether it can be stopped in training and go on later, in another process on the same machine."""
        return self.experiment.kind != "bench"

    @property
    def is_plain(self) -> bool:
        """Whether torch's own operators do all of it, so that it needs nothing that is compiled for all cells."""
        own = self.experiment
        scores = [*own.scores, *own.float_scores, *(spec for variant in own.variants for spec in variant.scores)]
        return own.kind != "bench" and not scores and set(self.settings) >= _PLAIN

    @property
    def exports(self) -> tuple[Variant, ...]:
        """What follows training, the export as configured first."""
        own = self.experiment
        base = Variant(name=BASE, about=own.about, scores=own.scores, codecs=own.codecs)
        return (base, *own.variants)

    @property
    def fingerprint(self) -> str:
        """Changes when anything changes that a result depends on; words and priorities do not count."""
        own = self.experiment
        what: list[Any] = [
            own.kind,
            {} if own.repeats else _content(self.recipe),
            own.repeats,
            self.seed,
            self.settings,
            own.data,
            own.float_scores,
        ]
        what += [[v.name, v.set, v.scores, v.codecs] for v in self.exports]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Claim:
    """A claim of the published text, or a question: what the page says before the figures.

    columns: scores in its table, as "float SPEC" or "quantized SPEC". also: experiments of other claims that belong
    into it, by what they are called there. reference: published rows, by column. baseline: the experiment that others
    are compared with, by the score `compare`, or the lower of "one or another" (of kind bench the variant that the page
    begins with); target: the published one, over target_bytes of text. plot: one of "bars", "bytes" (against bits per
    byte), "curve" (over the time), "steps" (of kind bench). tried: its rows were tried for the recipe, so those that
    are no better are listed. found: what the figures say, in words; the numbers stand in the table.
    """

    name: str
    title: str
    published: str
    plot: str
    text: str = ""
    found: str = ""
    baseline: str = ""
    compare: str = ""
    target: float = 0.0
    target_bytes: int = 0
    columns: tuple[str, ...] = ()
    also: dict[str, str] = field(default_factory=dict)
    reference: tuple[dict[str, str], ...] = ()
    tried: bool = False


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds, measured: start_s to the first step with warm caches and to the end after the last, resume_s what a run
    that goes on in another call takes longer, export_s an export, pack_s a whole job's packing and own scores, bench_s
    a timing, score_s by way to score."""

    start_s: float
    resume_s: float
    export_s: float
    pack_s: float
    bench_s: float
    score_s: dict[str, float] = field(default_factory=dict)

    def of_score(self, text: str) -> float:
        """For the same tokens at another stride or number of them in proportion."""
        spec, rate = Spec.parse(text), self.score_s
        known = rate.get(text.split(":")[0], rate.get(spec.method, 2.0))
        return known if not spec.max_tokens else 1 + known * min(spec.max_tokens / 3_034_561, 1)


@dataclass(frozen=True)
class Plan:
    """claims by name, and the cells in the order in which they are run."""

    claims: dict[str, Claim]
    experiments: tuple[Experiment, ...]
    cells: tuple[Cell, ...]
    costs: Costs
    defaults: tuple[str, ...]
    path: Path = PLAN


def load_plan(path: Path = PLAN) -> Plan:
    """The plan in a TOML file. Raises UserError for what cannot be run: unknown keys, recipes or settings included."""
    tree = tomllib.loads(path.read_text("utf-8"))
    claims = {name: Claim(name=name, **_tuples(table)) for name, table in tree["claim"].items()}
    experiments = tuple(_experiment(table) for table in tree["experiment"])
    names = [experiment.name for experiment in experiments]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: these names come twice: {', '.join(twice)}")
    if lost := sorted({e.claim for e in experiments} - claims.keys()):
        raise UserError(f"{path}: there is no [claim.{lost[0]}]")
    wanted = {c.baseline for c in claims.values()} | {e.against for e in experiments}
    wanted |= {name for claim in claims.values() for name in claim.also}
    if lost := sorted(wanted - {"", PUBLISHED, *names}):
        raise UserError(f"{path}: there is no experiment {lost[0]}")
    costs, defaults = Costs(**tree["cost"]), tuple(tree["defaults"]["set"])
    cells = [cell for experiment in experiments for cell in _cells(experiment, costs, defaults)]
    cells.sort(key=lambda cell: cell.priority)
    return Plan(claims, experiments, tuple(cells), costs, defaults, path)


def check(plan: Plan) -> None:
    """Resolve every recipe with its settings, so that a typing error does not cost a machine's time."""
    for cell in plan.cells:
        if cell.experiment.repeats:
            continue
        for settings in [cell.settings, *((*cell.settings, *v.set) for v in cell.experiment.variants)]:
            try:
                load_recipe(cell.recipe, settings)
            except UserError as error:
                raise UserError(f"{cell.name}: {error}") from error


@cache
def _content(recipe: str) -> dict[str, Any]:
    """What a recipe says, without its words. Defaults are not in it: a new setting makes no result an old one."""
    path = Path(recipe) if recipe.endswith(".toml") else resources.files("epigram") / "recipes" / f"{recipe}.toml"
    tree = tomllib.loads(path.read_text("utf-8"))
    return {key: value for key, value in tree.items() if key not in ("recipe", "summary", "seed")}


def _experiment(table: dict[str, Any]) -> Experiment:
    table = dict(table)
    variants = tuple(Variant(**_tuples(variant)) for variant in table.pop("variant", []))
    priority = table.pop("priority", 100)
    table["priority"] = priority if isinstance(priority, list) else [priority]
    try:
        return Experiment(**_tuples(table), variants=variants)
    except TypeError as error:
        raise UserError(f"experiment {table.get('name')}: {error}") from error


def _tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def _cells(experiment: Experiment, costs: Costs, defaults: Sequence[str]) -> list[Cell]:
    seeds = experiment.seeds if experiment.kind != "bench" else experiment.seeds[:1]
    settings = list(experiment.set)
    if experiment.kind == "train":
        settings = [*defaults, *settings]
    if experiment.kind != "bench" and not experiment.repeats:
        settings = [f"budget.train_s={experiment.train_s:g}", *settings]
    priorities = experiment.priority * len(seeds) if len(experiment.priority) == 1 else experiment.priority
    cost = _cost(experiment, costs)
    return [
        Cell(experiment, seed, priority, tuple(settings), cost)
        for seed, priority in zip(seeds, priorities, strict=True)
    ]


def _cost(experiment: Experiment, costs: Costs) -> float:
    """Seconds of a GPU for a cell, caches being warm."""
    if experiment.kind == "bench":
        return math.ceil(costs.start_s / 2 + costs.bench_s * len(experiment.variants))
    exports = [experiment.scores, *(variant.scores for variant in experiment.variants)]
    scores = [*experiment.float_scores, *(spec for specs in exports for spec in specs)]
    total = costs.start_s + (experiment.wall_s or experiment.train_s) + sum(costs.of_score(spec) for spec in scores)
    total += costs.export_s * len(exports) + (costs.pack_s if experiment.kind == "whole" else 0)
    return math.ceil(total)
