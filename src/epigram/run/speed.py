"""How fast each attention backend is on this device at a run's own shapes, so that "auto" takes the fastest.

One layer's forward and backward (the forward alone for scoring) on made-up tensors, for every length of the recipe's
lanes; what counts is the mean over the lanes of a step, and where lanes are recorded the device's time alone. One
process measures, and all use its numbers: they must take the same backend, and their own clocks would not agree.
"""

import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from epigram import plugin
from epigram.attention.base import PACKAGE, Attend, Request, within
from epigram.config import Config
from epigram.dist import collectives
from epigram.dist.context import Context

_WARM_UPS = 2  # the first compiles, the second allocates
_ROW_MS = 20.0  # of one backend at one shape; a row of steps takes about as long, and at least one step
_MOST_REPEATS = 10
_CLOCK_HZ = 2e9  # or less, and then the device waits longer than it was told to
_DOCUMENT = 1_000  # tokens; those of web text have that in the mean

Step = Callable[[], object]
TimeStep = Callable[[Step], float]
"""Milliseconds that one step takes."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run asks of attention: batches of (num_seqs, seq_len), as often as they come, and whether gradients.

    fused: in fused kernels, which in training write keys and values once for each query head where a backend has
    `equal_heads`. replayed: as part of a CUDA graph, so that it does not matter how long the host would take to launch
    it.
    """

    shapes: tuple[tuple[int, int], ...]
    backward: bool
    fused: bool = False
    replayed: bool = False


def training_work(config: Config, most_tokens: int | None = None) -> Work:
    """The lanes of a step, in parts where they have more than `most_tokens`."""
    shapes: list[tuple[int, int]] = []
    for lane in config.flat_lanes:
        parts = lane.parts(most_tokens)
        shapes += [(lane.num_seqs // parts, lane.seq_len)] * parts
    return Work(shapes=tuple(shapes), backward=True)


def scoring_work(seq_len: int, batch_tokens: int) -> Work:
    """A full batch of windows."""
    return Work(shapes=((max(batch_tokens // seq_len, 1), seq_len),), backward=False)


def agreed_ms(
    context: Context,
    work: Work,
    attends: Mapping[str, Attend],
    request: Request,
    *,
    prepare: Callable[[Attend], Attend] | None = None,
    time_step: TimeStep | None = None,
) -> dict[str, float]:
    """What rank 0 measures, on every rank: milliseconds by backend, infinity for one that failed there.

    Every process must call this. prepare: the compiler, where the model will be compiled. time_step: how a step is
    timed; where not given, by the device's own events.
    """
    times_ms: dict[str, float] = {}
    with collectives.together(context):
        if context.is_main:
            called = {name: as_called(attend, request) for name, attend in attends.items()}
            ready = {name: prepare(attend) if prepare else attend for name, attend in called.items()}
            usual = device_ms if work.replayed else cuda_ms
            times_ms = measure_ms(ready, request, work, context.device, time_step or usual)
    # The numbers of all backends of the folder, as other ranks cannot know which of them rank 0 has.
    numbers = {n: collectives.from_main(context, times_ms.get(n, math.nan)) for n in plugin.names(PACKAGE)}
    return {name: ms for name, ms in numbers.items() if not math.isnan(ms)}


def as_called(attend: Attend, request: Request) -> Attend:
    """`attend` as a layer calls it: within documents of a usual length, where they are kept apart."""
    if not request.documents:
        return attend

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        place = torch.arange(q.shape[1], device=q.device, dtype=torch.int32) % _DOCUMENT
        return within(attend, place.expand(q.shape[:2]))(q, k, v, window)

    call.equal_heads = getattr(attend, "equal_heads", False)  # type: ignore[attr-defined]
    return call


def measure_ms(
    attends: Mapping[str, Attend], request: Request, work: Work, device: torch.device, time_step: TimeStep
) -> dict[str, float]:
    """Milliseconds of each backend, the mean over the shapes of `work`. One that raises warns and takes forever."""
    found = {}
    for name, attend in attends.items():
        try:
            times = [
                count * time_step(_step(attend, request, shape, work, device))
                for shape, count in Counter(work.shapes).items()
            ]
        except Exception as error:  # whatever a kernel library raises where it does not fit this machine after all
            warnings.warn(f"attention backend {name} failed when it was measured: {error!r}", stacklevel=2)
            found[name] = math.inf
        else:
            found[name] = sum(times) / len(work.shapes)
    if device.type == "cuda":  # what was only tried must not hold memory, nor count as the run's peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return found


def _step(attend: Attend, request: Request, shape: tuple[int, int], work: Work, device: torch.device) -> Step:
    """One layer on tensors of `shape`; its random numbers are its own, so that a run's are as before."""
    generator = torch.Generator(device).manual_seed(0)

    def tensor(heads: int) -> torch.Tensor:
        size = (*shape, heads, request.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=request.dtype)

    equal = work.fused and work.backward and getattr(attend, "equal_heads", False)
    num_kv_heads = request.num_heads if equal else request.num_kv_heads
    q, k, v = (tensor(h).requires_grad_(work.backward) for h in (request.num_heads, num_kv_heads, num_kv_heads))
    grad = tensor(request.num_heads)

    def step() -> None:
        with torch.set_grad_enabled(work.backward):
            out = attend(q, k, v, request.window)
        if work.backward:
            torch.autograd.grad(out, (q, k, v), grad)

    return step


def cuda_ms(step: Step) -> float:
    """Milliseconds of a step on the current CUDA device: the median of three rows, each as long as a short while."""
    for _ in range(_WARM_UPS):
        step()
    return _median_ms(step, head_start_s=0.0)


def device_ms(step: Step) -> float:
    """The same without the host's part: the device does not begin before a row is launched.

    flash4's launches, for one, take the host 0.6 to 1.3 ms, and the device less in lanes of up to 24 x 2048.
    """
    for _ in range(_WARM_UPS):
        step()
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    step()
    return _median_ms(step, head_start_s=2 * (time.perf_counter() - start_s))


def _median_ms(step: Step, head_start_s: float) -> float:
    once_ms = max(_row_ms(step, 1, head_start_s), 1e-3)
    repeats = min(max(int(_ROW_MS / once_ms), 1), _MOST_REPEATS)
    return statistics.median(_row_ms(step, repeats, head_start_s * repeats) for _ in range(3)) / repeats


def _row_ms(step: Step, repeats: int, head_start_s: float) -> float:
    """Milliseconds of `repeats` steps one after the other: the host runs ahead of the device, as in training."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if head_start_s:
        torch.cuda._sleep(int(head_start_s * _CLOCK_HZ))
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
