"""From a profiler's trace to time by kind of kernel. Pure: a list of trace events in, numbers out.

On CUDA what counts are the intervals in which the device works. Elsewhere it is the operators of the host, each
without those that it calls, so that no moment counts twice.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

PRODUCTS, ATTENTION, ELEMENTWISE = "products", "attention", "elementwise and reductions"
OPTIMIZER, COPIES, IDLE = "optimizer", "memory copies", "idle"
KINDS = (PRODUCTS, ATTENTION, ELEMENTWISE, OPTIMIZER, COPIES, IDLE)

_RULES = (
    (COPIES, r"^memcpy|^memset"),
    # The compiler names a fused kernel after all that is in it, be it the cast before attention or after a product.
    (ELEMENTWISE, r"^triton_(poi|red|per|for)_"),
    # Before products: attention kernels are made of products, some by the same template libraries.
    (ATTENTION, r"flash|fmha|sdpa|attention|attn"),
    (PRODUCTS, r"gemm|nvjet|cutlass|cublas|wgmma|xmma|gemv|splitk|matmul|product|triton_(tem|mm|bmm|addmm)"),
    (PRODUCTS, r"^aten::(mm|addmm|bmm|baddbmm|_addmm_activation|linalg_vecdot|mv|dot)$|^mkldnn::.*linear"),
)  # fmt: skip
"""The first pattern that is found in the name, in lower case, decides; what none fits is elementwise."""

_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCH = {"cuda_runtime", "cuda_driver"}
_TOP = 25

Event = Mapping[str, Any]


class Interval(NamedTuple):
    """Something at work, in microseconds of the trace's clock.

    launched: when the host asked for it, None where the trace does not say. continued: a later piece of a call.
    """

    name: str
    start: float
    end: float
    launched: float | None
    continued: bool = False


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """All calls of one name and kind. calls and ms are those of a step, on average."""

    name: str
    kind: str
    calls: float
    ms: float


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Where the time of a step went.

    steps: how many were profiled. wall_ms: a step, from the first interval's start to the last one's end. kinds:
    milliseconds of a step by kind; where two run at a time both count, so the sum may exceed wall_ms. idle: nothing
    ran. top: the kernels that took longest. unprofiled_ms: the median step without the profiler.
    """

    steps: int
    wall_ms: float
    kinds: dict[str, float]
    calls: dict[str, float]
    top: tuple[Kernel, ...]
    unprofiled_ms: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def kind_of(name: str) -> str:
    """The kind of a kernel or an operator by its name alone."""
    lowered = name.lower()
    return next((kind for kind, pattern in _RULES if re.search(pattern, lowered)), ELEMENTWISE)


def break_down(events: Iterable[Event], steps: int, update: str) -> Breakdown:
    """Time by kind in a trace of `steps` steps; `update` names the ranges whose kernels are the optimizer's.

    events: the "traceEvents" of a trace of torch's profiler.
    """
    events = [event for event in events if event.get("ph") == "X"]
    found = _device_intervals(events) or _host_intervals(events)
    assert found, "the trace holds nothing that ran"
    ranges = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["name"] == update and event.get("cat") == "user_annotation"
    ]
    spent: dict[tuple[str, str], float] = {}
    calls: Counter[tuple[str, str]] = Counter()
    for interval in found:
        key = _kind_in(interval, ranges), interval.name
        spent[key] = spent.get(key, 0.0) + interval.end - interval.start
        calls[key] += not interval.continued
    wall = max(i.end for i in found) - min(i.start for i in found)
    kinds = {kind: sum(us for (k, _), us in spent.items() if k == kind) for kind in KINDS}
    longest = sorted(spent.items(), key=lambda item: item[1], reverse=True)[:_TOP]
    kinds[IDLE] = wall - covered(found)
    scale = 1e-3 / steps
    top = [Kernel(name=name, kind=kind, calls=calls[kind, name] / steps, ms=us * scale) for (kind, name), us in longest]
    return Breakdown(
        steps=steps,
        wall_ms=wall * scale,
        kinds={kind: us * scale for kind, us in kinds.items()},
        calls={kind: sum(n for (k, _), n in calls.items() if k == kind) / steps for kind in KINDS},
        top=tuple(top),
    )


def covered(intervals: Sequence[Interval]) -> float:
    """Length of the union of the intervals."""
    total, reached = 0.0, float("-inf")
    for interval in sorted(intervals, key=lambda i: i.start):
        total += max(0.0, interval.end - max(interval.start, reached))
        reached = max(reached, interval.end)
    return total


def _kind_in(interval: Interval, ranges: Sequence[tuple[float, float]]) -> str:
    launched = interval.launched
    inside = launched is not None and any(start <= launched <= end for start, end in ranges)
    return OPTIMIZER if inside else kind_of(interval.name)


def _device_intervals(events: Sequence[Event]) -> list[Interval]:
    """What ran on the device. The launch of a kernel has the same correlation number as the kernel."""
    launches = {_correlation(event): event["ts"] for event in events if event.get("cat") in _LAUNCH}
    return [
        Interval(event["name"], event["ts"], event["ts"] + event["dur"], launches.get(_correlation(event)))
        for event in events
        if event.get("cat") in _DEVICE
    ]


def _correlation(event: Event) -> Any:
    return event.get("args", {}).get("correlation")


def _host_intervals(events: Sequence[Event]) -> list[Interval]:
    """Operators, thread by thread, each without the time of those that it calls.

    Autograd's own ranges around them are left out: time in which no operator runs is the host's.
    """
    threads: dict[Any, list[Event]] = {}
    for event in events:
        if event.get("cat") == "cpu_op" and _is_operator(event["name"]):
            threads.setdefault(event["tid"], []).append(event)
    return [piece for ops in threads.values() for piece in _innermost(ops)]


def _is_operator(name: str) -> bool:
    """Of a compiled graph the operators that it calls are seen; the rest of its time are its fused kernels."""
    if "CompiledFxGraph" in name:
        return True
    return "::" in name and not name.startswith(("autograd::", "torch::autograd::"))


def _innermost(operators: Sequence[Event]) -> list[Interval]:
    """The pieces of time in which each operator is the innermost one. They nest: one thread's calls."""
    pieces: list[Interval] = []
    stack: list[Event] = []
    seen: set[int] = set()
    reached = 0.0

    def emit(until: float) -> None:
        if stack and until > reached:
            top = stack[-1]
            pieces.append(Interval(top["name"], reached, until, top["ts"], id(top) in seen))
            seen.add(id(top))

    def close() -> float:
        emit(_end(stack[-1]))
        return max(reached, _end(stack.pop()))

    for operator in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        while stack and _end(stack[-1]) <= operator["ts"]:
            reached = close()
        emit(operator["ts"])
        stack.append(operator)
        reached = operator["ts"]
    while stack:
        reached = close()
    return pieces


def _end(event: Event) -> float:
    end: float = event["ts"] + event["dur"]
    return end
