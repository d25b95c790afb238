"""Scores of a model that learns from a text while it is scored. Afterwards the model is as it was.

What adapts are the float32 weights in memory, those of a packed file as they were dequantized; the file is not touched.
The scorer hands the adapter only what it has scored: see `epigram.evaluation.adapt` and `epigram.evaluation.documents`.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epigram.byte_tables import ByteTables
from epigram.dist import collectives
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.evaluation.adapt import SgdAdapter
from epigram.evaluation.adapt_config import AdaptConfig, adapted
from epigram.evaluation.bpb import Score, check_bytes
from epigram.evaluation.documents import document_batches, document_parts, find_documents, work
from epigram.evaluation.lora import LoraAdapter
from epigram.evaluation.passes import Part
from epigram.evaluation.scorer import Pace, as_score, score, sum_losses, token_nlls
from epigram.evaluation.windows import Method
from epigram.model.gpt import GPT
from epigram.model.lora import lora_shapes
from epigram.progress import Progress
from epigram.run.choices import attention_for_eager
from epigram.run.setup import Losses

Loss = Callable[..., Tensor]
"""Inputs and targets (B, T), and settings, to the nats of each target."""

_SURE_S = 20.0  # of work, after which a forecast of the rest is believed; a quarter of the limit, where that is less
_FASTER = {
    "sgd": "raise score.stride, lower score.adapt.sgd.epochs, or score on more processes",
    "lora": "raise score.adapt.lora.chunk_tokens, name fewer score.adapt.lora.targets, or score on more processes",
}


class OverTimeError(UserError):
    """Adaptation would not be done within the scoring time."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """How a model is scored while it learns. losses: its own. bos_id: begins documents. limit_s: of the whole score.
    plain_s: what the score of the same text by sliding windows took, 0 where that is not known. scoring: what the loss
    that scores is made of, from the model's; for experiments. The one that teaches is the model's own."""

    config: AdaptConfig
    model: GPT
    losses: Losses
    context: Context
    bos_id: int
    limit_s: float = math.inf
    plain_s: float = 0.0
    scoring: Callable[[Loss], Loss] = field(default=lambda loss: loss)

    def __post_init__(self) -> None:
        assert self.config.kind != "none"
        if self.config.kind == "lora" and self.bos_id < 0:
            raise UserError(
                "adaptation by lora reads documents, which begin with a BOS, and the tokenizer has none: take sgd"
            )

    @property
    def name(self) -> str:
        return adapted(self.config.kind)

    def settings(self) -> dict[str, Any]:
        """What a row of the result says of it."""
        kind = self.config.kind
        stride = {"stride": self.config.lora.chunk_tokens} if kind == "lora" else {}
        return {**stride, "adapt": {"kind": kind, **asdict(getattr(self.config, kind))}}

    def score(
        self,
        tokens: NDArray[np.uint16],
        tables: ByteTables,
        method: Method,
        *,
        batch_tokens: int,
        expected_bytes: int | None,
        byte_counts: NDArray[np.uint16] | None,
        progress: bool,
    ) -> Score:
        """As `epigram.evaluation.scorer.score`. method: gives windows and stride of sgd; lora reads documents, in
        windows of its seq_len. Raises OverTimeError, on every process, when limit_s will not do."""
        c, is_sgd = self.context, self.config.kind == "sgd"
        batches = [] if is_sgd else self._batches(tokens, method, batch_tokens)
        self._require_time(len(tokens) - 1, batches, method)
        pace = _Pace(self.limit_s, self.config.kind, c)
        if is_sgd:
            with restored(self.model, trains=True):
                return score(
                    self.scoring(self.losses.windows), tokens, tables, method,
                    device=c.device, batch_tokens=batch_tokens, expected_bytes=expected_bytes, byte_counts=byte_counts,
                    rank=c.rank, world_size=c.world_size, progress=progress,
                    reduce=partial(collectives.summed, c) if c.world_size > 1 else None,
                    adapter=self._sgd(method), chunk_tokens=self.config.sgd.chunk_tokens, pace=pace,
                )  # fmt: skip
        all_bytes = check_bytes(tokens, tables, expected_bytes, byte_counts)
        batches = batches[c.rank :: c.world_size]
        total, late = sum(int((batch[:, 1] - batch[:, 0]).sum()) for batch in batches), None
        sums = torch.zeros(4, dtype=torch.float64)
        shown = Progress(f"score {self.name}", total, "tokens", shown=progress)
        with restored(self.model, trains=False), shown as bar:
            try:
                found = self._documents(tokens, batches, method, pace)
                nats, counted = sum_losses(found, c.device, bar.advance)
                sums[:2] = torch.stack([nats, counted.double()]).cpu()
            except OverTimeError as error:  # the others are told with the sums
                sums[3], late = 1, error
        sums[2] = all_bytes if c.is_main else 0  # documents are the whole stream, of which the bytes are known
        if c.world_size > 1:
            sums = collectives.summed(c, sums)
        if sums[3]:
            raise late or OverTimeError(
                f"another process would not be done with the score of a model that adapts ({self.name}) in time: "
                f"{_advice(self.config.kind)}"
            )
        return as_score(sums[:3], (len(tokens) - 1, all_bytes))

    def nats(self, tokens: NDArray[np.uint16], method: Method, batch_tokens: int) -> NDArray[np.float32]:
        """What each of (n + 1,) tokens but the first costs, (n,), all on this process."""
        if self.config.kind == "sgd":
            with restored(self.model, trains=True):
                return token_nlls(
                    self.scoring(self.losses.windows), tokens, method,
                    device=self.context.device, batch_tokens=batch_tokens,
                    adapter=self._sgd(method, alone=True), chunk_tokens=self.config.sgd.chunk_tokens,
                )  # fmt: skip
        found, times = np.zeros(len(tokens) - 1, np.float32), np.zeros(len(tokens) - 1, np.int64)
        with restored(self.model, trains=False):
            for part in self._documents(tokens, self._batches(tokens, method, batch_tokens), method):
                targets, nats = part.counted()
                found[targets] = nats
                np.add.at(times, targets, 1)
        assert np.all(times == 1), "every token must be scored once"
        return found

    def _require_time(self, num_targets: int, batches: list[NDArray[np.int64]], method: Method) -> None:
        """Raise OverTimeError, on every process, where reading alone would take longer than there is, at the speed of
        the score by sliding windows: learning takes several times as long again."""
        read = 1.0  # of the tokens that sliding windows read
        if self.config.kind == "lora":
            num_read = sum(work(batch, self.config.lora, method.seq_len) for batch in batches)
            read = num_read / (num_targets * method.seq_len / method.stride)
        least_s = read * self.plain_s
        if self.limit_s <= 0 or least_s > self.limit_s:
            raise OverTimeError(
                f"the score of a model that adapts ({self.name}) was not begun: to read the text without learning "
                f"would take about {least_s:.1f} s, and {max(self.limit_s, 0.0):.1f} s of budget.score_s are left: "
                f"{_advice(self.config.kind)}"
            )

    def _sgd(self, method: Method, alone: bool = False) -> SgdAdapter:
        c, loss = self.context, self.losses.learning
        assert loss is not None
        roles = self.model.roles()
        shared = not alone and c.world_size > 1
        return SgdAdapter(
            list(self.model.parameters()),
            lambda inputs, targets: loss(inputs, targets, rope_len=method.seq_len),
            self.config.sgd,
            method.seq_len,
            layered=[roles[name].num_layers > 0 for name, _ in self.model.named_parameters()],
            rank=c.rank if shared else 0,
            world_size=c.world_size if shared else 1,
            reduce=partial(collectives.sum_, c) if shared else None,
        )

    def _batches(self, tokens: NDArray[np.uint16], method: Method, batch_tokens: int) -> list[NDArray[np.int64]]:
        return document_batches(find_documents(tokens, self.bos_id), self.config.lora, method.seq_len, batch_tokens)

    def _documents(
        self,
        tokens: NDArray[np.uint16],
        batches: list[NDArray[np.int64]],
        method: Method,
        pace: Pace | None = None,
    ) -> Iterator[Part]:
        """Through the plain kernels, which know adapters, and never compiled: windows grow with each chunk."""
        model, config, device = self.model, self.config.lora, self.context.device
        adapter = LoraAdapter(
            lora_shapes(model.config), model.config.num_layers, model.nll, config, method.seq_len, device
        )
        with attention_for_eager(model, self.context):
            yield from document_parts(
                self.scoring(model.nll), tokens, batches, adapter, config, method.seq_len, device, pace,
                filler=int(self.bos_id == 0),
            )  # fmt: skip


@contextmanager
def restored(model: torch.nn.Module, *, trains: bool) -> Iterator[None]:
    """Inside, the weights want gradients or do not, and may change; afterwards all is as it was, to the last bit."""
    parameters = list(model.parameters())
    before: list[tuple[Tensor, bool, Tensor | None]]
    before = [(p.detach().clone(), p.requires_grad, p.grad) for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(trains)
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, (weight, wanted, grad) in zip(parameters, before, strict=True):
                parameter.copy_(weight)
                parameter.requires_grad_(wanted)
                parameter.grad = grad


def _advice(kind: str) -> str:
    return f"{_FASTER[kind]}; or set score.adapt.kind=none"


class _Pace:
    """Ends a score that is over its time, or will be at the speed it has had since the first call.

    Processes that learn together ask rank 0's clock, and all end at the same chunk; others have their own, and say so
    when they add up.
    """

    def __init__(self, limit_s: float, kind: str, context: Context) -> None:
        self._limit_s, self._kind, self._context = limit_s, kind, context
        self._start_s = time.perf_counter()
        self._first: tuple[float, float] | None = None  # the first chunk compiles kernels

    def __call__(self, share: float) -> None:
        if math.isinf(self._limit_s):
            return
        elapsed_s = time.perf_counter() - self._start_s
        if self._kind == "sgd":
            elapsed_s = collectives.from_main(self._context, elapsed_s)
        self._first = self._first or (elapsed_s, share)
        first_s, first = self._first
        expected_s, would = elapsed_s, ""
        if share > first and elapsed_s - first_s >= min(_SURE_S, self._limit_s / 4):
            expected_s += (1 - share) * (elapsed_s - first_s) / (share - first)
            would = f"it would take {expected_s:.1f} s, and "
        if expected_s > self._limit_s:
            raise OverTimeError(
                f"the score of a model that adapts ({adapted(self._kind)}) was stopped after {elapsed_s:.1f} s, at "
                f"{100 * share:.0f} %: {would}{self._limit_s:.1f} s of budget.score_s were left: {_advice(self._kind)}"
            )


def beside(row: dict[str, Any], unadapted: dict[str, Any]) -> dict[str, Any]:
    """The row of an adapted score with what the same model has without, by sliding windows: above 0 is a gain."""
    plain = unadapted["val_bpb"]
    return {**row, "unadapted_bpb": plain, "gain_bpb": plain - row["val_bpb"]}
