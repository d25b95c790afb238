"""Scoring of made-up tokens by a random model, and what the published validation set would take."""

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from epigram.byte_tables import ByteTables
from epigram.evaluation.scorer import score
from epigram.evaluation.windows import EvalConfig, Method, batch_size, usual_stride
from epigram.model.cost import forward_flops_per_token
from epigram.run.bench._profile import profile_steps
from epigram.run.bench.base import Bench, Work

REPEATS = 5
OPTIONS = frozenset({"profile", "methods", "seq_len", "stride"})

VALIDATION_TOKENS = 62_000_000
"""Of the published validation set, FineWeb's with the tokenizer of 1,024 pieces, rounded."""

_BATCHES = 4  # of a timed call


def run(bench: Bench) -> None:
    config = settings(bench)
    for name in config.methods:
        work, median_ms = _time_method(bench, config.method(name), config.batch_tokens)
        if bench.options.profile and bench.breakdown is None:  # the methods run the same kernels
            bench.breakdown = profile_steps(work, median_ms, bench.engine.context, bench.options.profile)


def settings(bench: Bench) -> EvalConfig:
    """The recipe's way to score, changed by the options; UserError for what cannot be.

    As in `epigram score`, a window length comes with a stride of an eighth.
    """
    config, options = bench.engine.config.score, bench.options
    seq_len = options.seq_len or config.seq_len
    return replace(
        config,
        methods=options.methods or config.methods,
        seq_len=seq_len,
        stride=options.stride or (usual_stride(seq_len) if options.seq_len else config.stride),
        batch_tokens=max(config.batch_tokens, seq_len),
    )


def _time_method(bench: Bench, method: Method, batch_tokens: int) -> tuple[partial, float]:
    engine = bench.engine
    num_targets = _num_targets(method, batch_tokens)
    plan = method.plan(num_targets)
    work = partial(
        score,
        engine.losses.of(method),
        _tokens(engine.config.model.vocab_size, num_targets + 1),
        _one_byte_each(engine.config.model.vocab_size),
        method,
        device=engine.context.device,
        batch_tokens=batch_tokens,
        expected_bytes=None,
        progress=False,
    )
    read = len(plan) * plan.length
    flops = read * sum(forward_flops_per_token(engine.config.model, method.seq_len).values())
    row = bench.time(
        _words(method),
        work,
        Work(flops=flops),
        amounts={"tokens": read, "scored tokens": num_targets},
    )
    forecast_s = row.timing.median_ms / 1000 * full_batches(method, batch_tokens) / _BATCHES
    bench.figures[f"forecast_{VALIDATION_TOKENS // 10**6}M_tokens_{method.name}_s"] = forecast_s
    return work, row.timing.median_ms


def _num_targets(method: Method, batch_tokens: int) -> int:
    """As many as `_BATCHES` forwards can score."""
    if method.is_streaming:
        return _BATCHES * min(method.streaming.chunk_tokens or batch_tokens, batch_tokens)
    return method.seq_len + (_BATCHES * (batch_tokens // method.seq_len) - 1) * method.stride


def _words(method: Method) -> str:
    if method.is_streaming:
        return f"streaming, each token sees {method.seq_len}"
    return f"{method.name}, windows of {method.seq_len} every {method.stride}"


def full_batches(method: Method, batch_tokens: int) -> int:
    """Forwards that the published validation set takes; of a streaming score those of one segment at a time."""
    plan = method.plan(VALIDATION_TOKENS)
    if method.is_streaming:
        chunk = min(method.streaming.chunk_tokens or batch_tokens, batch_tokens)
        return len(plan) * -(-plan.length // chunk)
    return -(-len(plan) // batch_size(len(plan), plan.length, 1, batch_tokens))


def _tokens(vocab_size: int, count: int) -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(vocab_size, size=count, dtype=np.uint16)


def _one_byte_each(vocab_size: int) -> ByteTables:
    """Made-up tokens stand for no text; how many bytes they are said to be changes no time."""
    no = np.zeros(vocab_size, bool)
    return ByteTables(token_bytes=np.ones(vocab_size, np.int64), has_space=no, is_edge=no)
