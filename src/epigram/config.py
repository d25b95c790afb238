"""A recipe: every setting of a run, typed, checked, and composed from the parts that read them.

Defaults <- recipe file <- `--set section.key=value`. Each part's settings live beside its code; here they are put
together, checked across parts, read from TOML and written back. All problems come in one message.
"""

import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from epigram import plugin
from epigram.data.lanes import Lane
from epigram.errors import UserError
from epigram.evaluation.adapt_config import AdaptConfig
from epigram.evaluation.windows import EvalConfig
from epigram.kernels.base import CHOICES as KERNELS
from epigram.model.config import ModelConfig
from epigram.optim.average import AverageConfig
from epigram.optim.gradients import GradientConfig
from epigram.optim.groups import OptimConfig
from epigram.optim.schedule import ScheduleConfig
from epigram.quant.config import QuantConfig
from epigram.typed import typed


@dataclass(frozen=True, kw_only=True)
class LaneGroup:
    """`count` lanes of `num_seqs` sequences of `seq_len` tokens each; a step runs every lane once.

    ms: what forward and backward of one of them take, as `epigram bench lanes` measures it; 0 where that is not known.
    It only decides which process executes which lanes.
    """

    count: int
    seq_len: int
    num_seqs: int
    ms: float = 0.0

    def __post_init__(self) -> None:
        counts = ("count", "seq_len", "num_seqs")
        if bad := [f"{name} = {getattr(self, name)}" for name in counts if getattr(self, name) < 1]:
            raise ValueError(f"a lane group needs positive numbers, not {', '.join(bad)}")
        if not (math.isfinite(self.ms) and self.ms >= 0):
            raise ValueError(f"ms = {self.ms} is no time: give what epigram bench lanes measured, or leave it out")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """mile_floor: smallest weight that the entropy weighting gives a token; its exponent is a schedule."""

    mile_floor: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.mile_floor <= 1:
            raise ValueError(f"mile_floor = {self.mile_floor} must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """The clock. Seconds of wall time; warm-up, validation and writing checkpoints do not count.

    train_s: training, calibration and quantization together. calibrate_s: the part of it kept for the latter two.
    score_s: limit of the final score. clock: "wall" is measured time; "steps" gives each of `steps` steps an equal
    share of the training time, whatever it takes; "replay" reads the times that the run folder `replay` recorded.
    max_steps: stop after so many steps even if time is left; 0: no limit.
    """

    train_s: float
    calibrate_s: float
    score_s: float = 600.0
    clock: str = "wall"
    steps: int = 0
    replay: str = ""
    max_steps: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.calibrate_s < self.train_s:
            limits = f"at least 0 and below train_s = {self.train_s}"
            problems.append(f"calibrate_s = {self.calibrate_s} must be {limits}: change one of both")
        if self.score_s <= 0 or self.max_steps < 0:
            problems.append(f"score_s = {self.score_s} must be positive and max_steps = {self.max_steps} not negative")
        if self.clock not in ("wall", "steps", "replay"):
            problems.append(f"clock = {self.clock!r} must be one of wall, steps, replay")
        if (self.clock == "steps") != (self.steps > 0):
            problems.append(f'steps = {self.steps} goes with clock = "steps" (and needs at least 1 there)')
        if (self.clock == "replay") != bool(self.replay):
            problems.append(f'replay = {self.replay!r} (a run folder) goes with clock = "replay"')
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def optimize_s(self) -> float:
        """Seconds in which steps are taken."""
        return self.train_s - self.calibrate_s


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How text is turned into tokens when `--data` is text; a data folder that is built already decides for itself.

    normalization: "identity" keeps the file's own bytes; "nmt_nfkc" is that of the published FineWeb tokenizers.
    val_frac: share of the documents that is held out.
    """

    normalization: str = "identity"
    val_frac: float = 0.05

    def __post_init__(self) -> None:
        if self.normalization not in ("identity", "nmt_nfkc"):
            raise ValueError(f"normalization = {self.normalization!r} must be identity or nmt_nfkc")
        if not 0 < self.val_frac < 1:
            raise ValueError(f"val_frac = {self.val_frac} must be above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ArtifactConfig:
    """codec: a file of `epigram.artifact.codecs`. cap_bytes: limit of artifact and code together, decimal.

    code_bytes: bytes that a submission's code takes of the cap. tokenizer: carry the tokenizer, so that generation
    needs only this file. over_cap: what becomes of a run that comes out over the cap: "fail", or "shrink", which
    multiplies quant.grid's sigma (or floor) by what makes it fit, in what is left of the training time.
    """

    codec: str = "entropy"
    cap_bytes: int = 16_000_000
    code_bytes: int = 0
    tokenizer: bool = True
    over_cap: str = "fail"

    def __post_init__(self) -> None:
        if reason := plugin.why_unknown("epigram.artifact.codecs", self.codec):
            raise ValueError(f"codec: {reason}")
        if self.over_cap not in ("fail", "shrink"):
            raise ValueError(f"over_cap = {self.over_cap!r} must be fail or shrink")
        if not 0 <= self.code_bytes < self.cap_bytes:
            raise ValueError(
                f"code_bytes = {self.code_bytes} must be at least 0 and below cap_bytes = {self.cap_bytes}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run does besides computing.

    precision: "auto" (bfloat16 where the device has fast products in it, else float32), "bfloat16" or "float32".
    attention: a backend of `epigram.attention`, or "auto". kernels: "fused" (those of `epigram.kernels._triton`),
    "plain" (torch code, which torch.compile can fuse), or "auto": fused where they can serve, unless compile is "on".
    compile: torch.compile for the plain kernels, "auto" (when a compiler is there), "on", "off"; fused ones are never
    compiled. float8: train with the products of the layers in float8 (`epigram.kernels.float8`); takes plain kernels.
    micro_tokens: compute at most so many tokens of a lane at a time and add up the gradients: the same step in less
    memory (0: on a CPU 8,192, else whole lanes).
    cuda_graphs: replay a lane's launches as one, "auto" (with fused kernels on CUDA), "on", "off".
    log_every, val_every: steps between log lines and between validations (0: none; the first ten steps and long silence
    are told where any are, and the finished model is scored in any case). val_tokens: a validation on the way reads so
    many tokens of the split. checkpoint_every_s, checkpoint_keep: seconds of the budget's clock between checkpoints (0:
    only at the end) and how many stay (0: all). check_every: steps between comparisons of all processes' weights (0:
    none); one more comes at the end.
    writers: extra metrics writers (tensorboard, wandb). sample_prompt: text that the finished model continues, by
    sample_tokens tokens (0: no sample). compressors: put general compressors' bits per byte for the validation text
    beside the model's, at the end.
    """

    precision: str = "auto"
    attention: str = "auto"
    kernels: str = "auto"
    compile: str = "auto"
    float8: bool = False
    micro_tokens: int = 0
    cuda_graphs: str = "auto"
    log_every: int = 100
    val_every: int = 0
    val_tokens: int = 1_000_000
    checkpoint_every_s: float = 0.0
    checkpoint_keep: int = 2
    check_every: int = 500
    writers: tuple[str, ...] = ()
    sample_prompt: str = "The"
    sample_tokens: int = 200
    compressors: bool = False

    def __post_init__(self) -> None:
        choices = {
            "precision": ("auto", "bfloat16", "float32"),
            "kernels": KERNELS,
            "compile": ("auto", "on", "off"),
            "cuda_graphs": ("auto", "on", "off"),
        }
        problems = [
            f"{name} = {getattr(self, name)!r} must be one of {', '.join(allowed)}"
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]
        problems += [
            f"{name} = {getattr(self, name)} must not be negative"
            for name in (
                "micro_tokens",
                "log_every",
                "val_every",
                "checkpoint_every_s",
                "checkpoint_keep",
                "check_every",
                "sample_tokens",
            )
            if getattr(self, name) < 0
        ]
        if reason := plugin.why_unknown("epigram.attention", self.attention, "auto"):
            problems.append(f"attention: {reason}")
        if self.kernels == "fused" and self.compile == "on":
            problems.append(
                'kernels = "fused" leaves nothing to compile: with compile = "on" choose kernels = "plain", or set '
                'compile = "auto"'
            )
        if self.float8 and self.kernels == "fused":
            problems.append(
                'float8 = true needs the plain kernels: with it choose kernels = "plain" or "auto", or set '
                "float8 = false"
            )
        if self.val_tokens < 1:
            problems.append(f"val_tokens = {self.val_tokens} must be at least 1")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What becomes of a step whose loss or gradient is not to be trusted; see `epigram.run.guard`.

    max_skips: so many steps of a run may be left out, weights and optimizer untouched, before it stops; 0: the first
    loss or gradient that is not finite stops it. spike_factor: a loss above so many times the running median is a
    spike; 0: none is. spike_window: steps of that median. spike_action: "warn", "skip" (one of max_skips) or "stop".
    """

    max_skips: int = 0
    spike_factor: float = 0.0
    spike_window: int = 100
    spike_action: str = "warn"

    def __post_init__(self) -> None:
        problems = []
        if self.max_skips < 0:
            problems.append(f"max_skips = {self.max_skips} must not be negative")
        if self.spike_factor != 0 and not 1 < self.spike_factor < math.inf:
            problems.append(f"spike_factor = {self.spike_factor} must be above 1, or 0 for none")
        if self.spike_window < 1:
            problems.append(f"spike_window = {self.spike_window} must be at least 1")
        if self.spike_action not in ("warn", "skip", "stop"):
            problems.append(f"spike_action = {self.spike_action!r} must be one of warn, skip, stop")
        if self.spike_factor and self.spike_action == "skip" and not self.max_skips:
            problems.append('spike_action = "skip" needs max_skips of at least 1')
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe. `lanes` are the work of one step; see docs/architecture.md."""

    recipe: str
    summary: str
    seed: int
    lanes: tuple[LaneGroup, ...]
    model: ModelConfig
    gradients: GradientConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    average: AverageConfig
    budget: BudgetConfig
    quant: QuantConfig
    score: EvalConfig
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    artifact: ArtifactConfig = ArtifactConfig()
    guard: GuardConfig = GuardConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        if not self.lanes:
            raise ValueError("lanes is empty: give at least one [[lanes]] with count, seq_len and num_seqs")
        if problems := list(self._cross_problems()):
            raise ValueError("; ".join(problems))

    def _cross_problems(self) -> Iterator[str]:
        """Combinations that no single part can see."""
        if any(group.ms for group in self.lanes) and not all(group.ms for group in self.lanes):
            yield (
                "some [[lanes]] have ms and some have none, which cannot be compared: give all of them the times that "
                "epigram bench lanes measures, or none"
            )
        if not 0 <= self.seed < 2**63:
            yield f"seed = {self.seed} must be in 0..2^63-1"
        if self.quant.calibration.seq_len > self.context_len:
            yield (
                f"quant.calibration.seq_len = {self.quant.calibration.seq_len} is longer than any lane "
                f"({self.context_len}): calibrate at lengths that were trained"
            )
        grid = self.quant.grid
        if self.artifact.over_cap == "shrink" and grid.clip != "sigma" and grid.floor == 0:
            yield (
                f'artifact.over_cap = "shrink" widens steps by their sigma or floor, and clip = "{grid.clip}" with '
                'floor = 0 has neither: set quant.grid.clip = "sigma", a floor, or artifact.over_cap = "fail"'
            )

        if self.score.adapt.sgd.frozen_layers > self.model.num_layers:
            yield (
                f"score.adapt.sgd.frozen_layers = {self.score.adapt.sgd.frozen_layers} is more than the "
                f"{self.model.num_layers} layers of the model"
            )
        limits, layers = self.score.streaming.limits, self.model.num_layers
        if limits and len(limits) != layers:
            yield f"score.streaming.limits has {len(limits)} numbers, the model {layers} layers: give one for each"

    @property
    def flat_lanes(self) -> tuple[Lane, ...]:
        """Every lane of a step, in the order of the recipe."""
        return tuple(Lane(seq_len=g.seq_len, num_seqs=g.num_seqs) for g in self.lanes for _ in range(g.count))

    @property
    def tokens_per_step(self) -> int:
        return sum(group.count * group.seq_len * group.num_seqs for group in self.lanes)

    @property
    def context_len(self) -> int:
        """The longest sequence seen in training: generation and scoring should look no further."""
        return max(self.seq_lens)

    @property
    def seq_lens(self) -> set[int]:
        """The lengths of sequences seen in training."""
        return {group.seq_len for group in self.lanes}


# -- reading ------------------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Recipes that the package ships."""
    folder = resources.files("epigram") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """The recipe called so, or a TOML file (a run's `config.toml`, say), with `section.key=value` overrides.

    Raises UserError with every problem found.
    """
    return parse_config(override(_read_toml(name_or_path), overrides), source=name_or_path)


def _read_toml(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if name_or_path in recipe_names():
        data = (resources.files("epigram") / "recipes" / f"{name_or_path}.toml").read_bytes()
    elif path.suffix == ".toml" and path.is_file():
        data = path.read_bytes()
    else:
        what = "file" if path.suffix == ".toml" else "recipe"
        raise UserError(
            f"there is no {what} {name_or_path!r}: choose one of {', '.join(recipe_names())}, or give a .toml file"
        )
    try:
        return tomllib.loads(data.decode())
    except ValueError as error:  # no TOML, or no UTF-8
        raise UserError(f"{name_or_path} is no valid TOML: {error}") from error


def override(tree: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`tree` with each "a.b=value" put in; values are TOML, or text when they are not valid TOML.

    A number in the path counts into an array: lanes.0.num_seqs=4. The tree itself is not changed.
    """
    result = _copy(tree)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise UserError(f"--set {assignment!r} is not of the form section.key=value")
        _assign(result, path.strip().split("."), _toml_value(text.strip()), assignment)
    return result


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def _toml_value(text: str) -> Any:
    try:
        tree = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    return tree["value"] if len(tree) == 1 else text  # more lines assign more


def _assign(tree: Any, path: list[str], value: Any, assignment: str) -> None:
    *parents, last = path
    for key in parents:
        tree = tree.setdefault(key, {}) if isinstance(tree, dict) else _item(tree, key, assignment)
    if isinstance(tree, list):
        _item(tree, last, assignment)
        tree[int(last)] = value
    elif isinstance(tree, dict):
        tree[last] = value
    else:
        raise UserError(f"--set {assignment!r} goes into something that is no section")


def _item(array: Any, key: str, assignment: str) -> Any:
    if not isinstance(array, list) or key not in map(str, range(len(array))):
        raise UserError(f"--set {assignment!r}: {key!r} is no section and no place in an array")
    return array[int(key)]


def parse_config(tree: dict[str, Any], source: str = "config") -> Config:
    """A checked Config from plain values. Raises UserError that lists every unknown key, wrong type and conflict."""
    return typed(tree, Config, f"{source}: ")


def parse_model(tree: dict[str, Any]) -> ModelConfig:
    """A model's settings from plain values, as an artifact's header holds them; UserError as `parse_config`."""
    return typed(tree, ModelConfig)


@dataclass(frozen=True, kw_only=True)
class _AdaptScore:
    adapt: AdaptConfig = field(default_factory=AdaptConfig)


@dataclass(frozen=True, kw_only=True)
class _AdaptTime:
    score_s: float = math.inf


@dataclass(frozen=True, kw_only=True)
class _AdaptSettings:
    """What of a recipe concerns adaptation alone."""

    score: _AdaptScore = _AdaptScore()
    budget: _AdaptTime = _AdaptTime()


def parse_adapt(kind: str, overrides: Sequence[str]) -> tuple[AdaptConfig, float]:
    """Adaptation of a `kind`, its settings changed as a recipe's would be; and the seconds that scores may take.

    Raises UserError for a change of anything but score.adapt and budget.score_s.
    """
    names = [setting.partition("=")[0].strip() for setting in overrides]
    if others := [name for name in names if name != "budget.score_s" and not name.startswith("score.adapt.")]:
        raise UserError(f"a score can change score.adapt and budget.score_s alone: leave out --set {others[0]}")
    tree = override({"score": {"adapt": {"kind": kind}}}, overrides)
    found = typed(tree, _AdaptSettings, "--adapt: ")
    if overrides and found.score.adapt.kind == "none":
        raise UserError("--set changes settings of --adapt: say --adapt sgd or --adapt lora")
    if found.score.adapt.kind != kind:
        raise UserError(f"--adapt {kind} says how to adapt: leave out --set score.adapt.kind")
    return found.score.adapt, found.budget.score_s


def to_tree(config: Config) -> dict[str, Any]:
    """Plain values (tables, arrays, numbers, text) that `parse_config` turns back into an equal Config."""
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
