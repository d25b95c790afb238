"""Every attention backend that can serve the recipe's layers here, full and windowed, as a layer calls it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from epigram import plugin
from epigram.attention.base import ORACLE, PACKAGE, Attend, Request, usable
from epigram.data.lanes import Lane
from epigram.model.cost import attention_bytes_per_token, attention_flops_per_token
from epigram.run import machine
from epigram.run.bench.base import Bench, Work, lane_name
from epigram.run.choices import attention_request, backends_compile
from epigram.run.speed import as_called

REPEATS = 20
OPTIONS = frozenset({"profile"})

_ORACLE_MATRICES = 5  # of logits that it holds at once, in float32


def run(bench: Bench) -> None:
    engine = bench.engine
    compiles = backends_compile(engine.config.run.compile, engine.context)
    request = attention_request(engine.model, engine.context, engine.compiled, compiles=compiles)
    windows = (0, engine.config.model.window) if engine.config.model.window_layers else (0,)
    for window in windows:
        _time_backends(bench, replace(request, window=window))


def _time_backends(bench: Bench, request: Request) -> None:
    kind = f"window {request.window}" if request.window else "full"
    for name, reason in usable(request).items():
        if reason:
            bench.left_out[f"{name}, {kind}"] = reason
            continue
        for lane in bench.lanes():
            _time_backend(bench, name, kind, lane, request)


def _time_backend(bench: Bench, name: str, kind: str, lane: Lane, request: Request) -> None:
    what = f"{name}, {kind}, {lane_name(lane)}"
    if name == ORACLE and (reason := _too_large(bench, lane)):
        bench.left_out[what] = reason
        return
    try:
        _time_passes(bench, what, as_called(plugin.load(PACKAGE, name).attend, request), lane, request.window)
    except torch.OutOfMemoryError:
        bench.left_out[what] = "it needs more memory than this device has"


def _time_passes(bench: Bench, what: str, attend: Attend, lane: Lane, window: int) -> None:
    torch.compiler.reset()  # one function serves all backends, and a function may be compiled so many times only
    compiled = bench.compile(_windowed(attend, window))
    q, k, v, grad = _inputs(bench, lane)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]

    def forward() -> Tensor:
        with torch.no_grad():
            return compiled(q, k, v)

    def both() -> Any:
        return torch.autograd.grad(compiled(*leaves), leaves, grad)

    amounts = {"tokens": lane.num_tokens}
    bench.time(f"{what}, forward", forward, _work(bench, lane, window, backward=False), amounts=amounts)
    bench.time(f"{what}, forward + backward", both, _work(bench, lane, window, backward=True), amounts=amounts)


def _windowed(attend: Attend, window: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, window)

    return call


def _inputs(bench: Bench, lane: Lane) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the output's gradient. As in a layer, v is part of the product that makes all three."""
    c = bench.engine.config.model
    packed = bench.random(lane.num_seqs, lane.seq_len, c.query_dim + 2 * c.kv_dim)
    q, k, v = (x.unflatten(-1, (-1, c.head_dim)) for x in packed.split([c.query_dim, c.kv_dim, c.kv_dim], dim=-1))
    return q.contiguous(), k.contiguous(), v, bench.random(*q.shape, seed=1)


def _work(bench: Bench, lane: Lane, window: int, *, backward: bool) -> Work:
    config, item_bytes = bench.engine.config.model, bench.engine.model.compute_dtype.itemsize
    flops = attention_flops_per_token(config, lane.seq_len, window) * (3 if backward else 1)
    traffic = attention_bytes_per_token(config, item_bytes, backward=backward)
    return Work(flops=flops * lane.num_tokens, bytes=traffic * lane.num_tokens)


def _too_large(bench: Bench, lane: Lane) -> str | None:
    """Why the oracle is left out: it writes out all logits."""
    needed = _ORACLE_MATRICES * 4 * bench.engine.config.model.num_heads * lane.num_seqs * lane.seq_len**2
    if bench.engine.context.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(bench.engine.context.device)
    else:
        free = machine.memory_bytes() or needed
    if needed <= free // 2:
        return None
    return f"it writes out all logits, about {needed / 1e9:.0f} GB at this size, and {free / 1e9:.0f} GB are free"
