"""Builds everything a run needs, says which paths it takes, and does nothing else."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epigram.artifact.tokenizer_section import compact
from epigram.compiling import compile_shapes
from epigram.config import Config
from epigram.data.dataset import DataFolder
from epigram.data.loader import Loader
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.evaluation.passes import OpenStream, StreamLoss, TokenLoss
from epigram.evaluation.windows import Method
from epigram.kernels.base import FLOAT8, PLAIN
from epigram.model.cache import Cache
from epigram.model.config import ModelConfig
from epigram.model.gpt import GPT, BankTransform
from epigram.optim.average import Average, average_of
from epigram.optim.gradients import LaneGradients, lane_weights
from epigram.optim.optimizer import Optimizer
from epigram.quant.qat import fake_quantize
from epigram.run.budget import Clock, make_clock
from epigram.run.checkpoint import Saver
from epigram.run.choices import (
    attach_attention,
    attach_kernels,
    explain_float8,
    pick_precision,
    should_capture,
    stream_attention,
    tokens_at_a_time,
)
from epigram.run.graphs import Capture, CudaCapture, Key, LaneGraph
from epigram.run.guard import Guard
from epigram.run.lanes import lane_plan
from epigram.run.precompile import precompile
from epigram.run.size import require_carried
from epigram.run.speed import Work, training_work

CACHE = Path(".cache/epigram/data")
"""Where text given as --data is built, below the current folder."""

LaneLoss = Callable[[Tensor, Tensor, Tensor | None, float, BankTransform | None], Tensor]


@dataclass(kw_only=True)
class Engine:
    """All that computes a step, wherever its tokens come from.

    lanes: the lanes that this process executes. lane_loss: the (compiled) training loss. most_tokens: of a lane that
    are computed at a time, None for whole lanes. losses: those of scoring. quantized: the bank transform of
    quantization-aware training. paths: what was chosen where the recipe left a choice, for the log. compiled: whether
    torch.compile is used. capture: records lanes in the warm-up, None where they are launched kernel by kernel.
    graphs: what it has recorded.
    """

    config: Config
    context: Context
    model: GPT
    optimizer: Optimizer
    average: Average
    gradients: LaneGradients
    lanes: tuple[int, ...]
    lane_loss: LaneLoss
    most_tokens: int | None
    losses: "Losses"
    quantized: BankTransform
    paths: dict[str, str]
    compiled: bool
    capture: Capture | None = None
    graphs: dict[Key, LaneGraph] = field(default_factory=dict)

    @property
    def lends_gradients(self) -> bool:
        """Whether a lane's gradients are overwritten by the next lane of the step."""
        return bool(self.graphs) and len(self.lanes) > 1


@dataclass(kw_only=True)
class Session(Engine):
    """A run in progress: what computes, its data, and how far it is.

    times_s: the schedules' clock at the start of each step. trained_s: what steps really took. guard: keeps what is not
    finite from the weights. saver: writes checkpoints.
    """

    data: DataFolder
    loader: Loader
    clock: Clock
    guard: Guard
    saver: Saver
    step: int = 0
    times_s: list[float] = field(default_factory=list)
    trained_s: float = 0.0

    def close(self) -> None:
        """End the threads, after a checkpoint that is being written."""
        self.loader.close()
        self.saver.close()


def build_session(config: Config, data: DataFolder, context: Context) -> Session:
    """Everything on the device, initial weights drawn. Raises UserError when recipe, data and machine do not fit."""
    check_fit(config, data)
    torch.manual_seed(config.seed)  # nothing in a step draws of these numbers; whatever does is repeatable too
    engine = build_engine(config, context)
    return Session(
        **vars(engine),
        data=data,
        loader=Loader(
            data.split("train"),
            config.flat_lanes,
            seed=config.seed,
            lane_indices=engine.lanes,
            pin=context.device.type == "cuda",
            vocab_size=config.model.vocab_size,
        ),
        clock=make_clock(config.budget),
        guard=Guard(config.guard, config.flat_lanes, isolated=config.model.isolated),
        saver=Saver(context),
    )


def build_engine(config: Config, context: Context) -> Engine:
    """A session's parts that need no data. Raises UserError when recipe and machine do not fit."""
    most_tokens = tokens_at_a_time(config.run.micro_tokens, context.device.type)
    model, compiled, paths = build_model(config, context, training_work(config, most_tokens))
    if "streaming" in config.score.methods:
        paths["attention of streaming scores"] = stream_attention(model, config.run.attention, context)[1]
    capture = CudaCapture(context.device) if should_capture(config.run.cuda_graphs, model, context) else None
    if capture is not None:
        paths["CUDA graphs"] = "on"
    model.initialize(config.seed)
    named, roles = dict(model.named_parameters()), model.roles()
    plan = lane_plan(config, context.world_size)
    paths["lanes"] = f"{len(plan.times)} a step, {config.tokens_per_step:,} tokens, {context.world_size} process(es)"
    parts = {f"{lane.num_seqs} x {lane.seq_len}": lane.parts(most_tokens) for lane in config.flat_lanes}
    if max(parts.values()) > 1:
        paths["lanes are computed in parts"] = ", ".join(f"{words} in {count}" for words, count in parts.items())
    if context.world_size > 1:
        paths["lanes of each process"] = f"{_words(plan.ranks)}; predicted balance {100 * plan.balance:.1f} %"
    lane_loss: Any = compile_shapes(model.loss) if compiled else model.loss
    weights = lane_weights([lane.num_tokens for lane in config.flat_lanes], config.gradients.lane_weight)
    return Engine(
        config=config,
        context=context,
        model=model,
        optimizer=Optimizer(named, roles, config.optim, kernels=config.run.kernels, context=context),
        average=average_of(named, config.average),
        gradients=LaneGradients(
            named,
            clip=config.gradients.clip,
            max_norm=config.gradients.max_norm,
            lane_weights=weights,
            banks=[name for name, role in roles.items() if role.kind == "matrix"],
            context=context,
        ),
        lanes=plan.ranks[context.rank],
        lane_loss=partial(lane_loss, kernels=FLOAT8) if config.run.float8 else lane_loss,
        most_tokens=most_tokens,
        losses=scoring_losses(model, compiled, config.run.attention, context),
        quantized=bank_transform(model, config),
        paths=paths,
        compiled=compiled,
        capture=capture,
    )


def _words(ranks: Iterable[Iterable[int]]) -> str:
    return " | ".join(" ".join(map(str, lanes)) for lanes in ranks)


def build_model(config: Config, context: Context, work: Work) -> tuple[GPT, bool, dict[str, str]]:
    """The model on its device, weights not yet set; whether it is to be compiled; and what was chosen, in words.

    Precision, kernels and attention are set. work: what attention will have to do, by which "auto" measures it on CUDA.
    Raises UserError when a choice cannot be honoured here.
    """
    if context.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what stays float32 (Hessians aside) may use TF32
    model = GPT(config.model).to(context.device)
    model.compute_dtype, paths = pick_precision(config.run.precision, context)
    kernels = config.run.kernels
    if config.run.float8 and work.backward:  # what only scores computes as ever
        paths |= explain_float8(model, context)
        kernels = "plain"
    compiled, chosen = attach_kernels(model, kernels, config.run.compile, context)
    replayed = work.backward and should_capture(config.run.cuda_graphs, model, context)
    work = replace(work, fused=model.kernels is not PLAIN, replayed=replayed)
    seconds = precompile(config.model, model.kernels.products, context)
    if seconds is not None:
        paths["kernels compiled"] = f"in {seconds:.0f} s, several at a time"
    attention = attach_attention(model, config.run.attention, context, compiled, work, config.run.compile)
    return model, compiled, paths | chosen | attention


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The model's losses of tokens, for scoring, by the weights that it has when they are called.

    windows: of windows, compiled where the model is. stream: of a text that is read on; never compiled, since a chunk
    is long enough to keep a device busy. learning: the mean of windows, with gradients, as `GPT.loss`; compiled where
    the model is. None for what cannot learn.
    """

    windows: TokenLoss
    stream: OpenStream
    learning: Callable[..., Tensor] | None = None

    def of(self, method: Method) -> TokenLoss | OpenStream:
        """What `epigram.evaluation.scorer.score` needs for `method`."""
        return self.stream if method.is_streaming else self.windows


def scoring_losses(model: GPT, compiled: bool, backend: str, context: Context) -> Losses:
    """The losses of `model`. backend: as in `RunConfig.attention`.

    On a CPU they are not compiled: that takes longer than all scores of a demo, and then saves a fifth.
    """

    def open_stream(method: Method) -> StreamLoss:
        attend, _ = stream_attention(model, backend, context)
        limits = method.streaming.limits
        if limits and len(limits) != model.config.num_layers:
            raise UserError(f"streaming.limits has {len(limits)} numbers, the model {model.config.num_layers} layers")
        cache = Cache(model.config, method.seq_len, limits=limits, attend=attend)
        return partial(model.nll, cache=cache)

    pays = compiled and context.device.type == "cuda"
    prepare = compile_shapes if pays else lambda function: function
    return Losses(windows=prepare(model.nll), stream=open_stream, learning=prepare(model.loss))


def bank_transform(model: GPT, config: Config) -> BankTransform:
    """Fake quantization of every bank on the grid of the export."""
    splits = {role.bank: role.splits for role in model.roles().values() if role.kind == "matrix"}

    def transform(name: str, bank: Tensor) -> Tensor:
        return fake_quantize(bank, splits[name], config.quant.grid)

    return transform


def check_fit(config: Config, data: DataFolder) -> None:
    """Raises UserError when the data's vocabulary is not the model's, its documents cannot be told apart, or the
    artifact that a run ends with, or an export of it, could not carry its tokenizer or the model."""
    found = data.tokenizer.vocab_size
    if found != config.model.vocab_size:
        raise UserError(
            f"the data has a vocabulary of {found}, the recipe {config.model.vocab_size}: "
            f"set model.vocab_size={found}, or build the data with --vocab-size {config.model.vocab_size}"
        )
    check_documents(config.model, data.tokenizer.bos_id)
    carried = compact(data.tokenizer.proto) if config.artifact.tokenizer else b""
    require_carried(config, len(carried))


def check_documents(model: ModelConfig, bos_id: int) -> None:
    """Raises UserError when documents are to be isolated that begin with another token, or with none (bos_id < 0)."""
    if not model.isolated or bos_id == model.bos_id:
        return
    if bos_id < 0:
        raise UserError(
            'model.documents = "isolated" needs documents that begin with a BOS, and the tokenizer has none: set '
            "model.documents=joined"
        )
    raise UserError(
        f"documents begin with token {bos_id} by the tokenizer, with token {model.bos_id} by the model, which isolates "
        f"them: set model.bos_id={bos_id}"
    )


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's random numbers, by kind of device."""
    state = {"cpu": torch.random.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on with random numbers where `random_state` was taken, as far as it was on this kind of device."""
    if "cpu" in state:
        torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def state_of(engine: Engine) -> dict[str, dict[str, Any]]:
    """All tensors that training changes, as live tensors by part."""
    return {
        "model": dict(engine.model.state_dict()),
        "optimizer": engine.optimizer.state_dict(),
        "average": engine.average.state_dict(),
    }
