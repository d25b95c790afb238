"""What a model is computed with where its recipe leaves that open, and what was chosen, in words for the log.

Precision, kernels, compiler, CUDA graphs and attention, as the device and the libraries that are there allow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from epigram.attention.base import Attend, Request, candidates, choose, why_not
from epigram.capability import support, why_no_compile
from epigram.compiling import compile_shapes
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.kernels import float8
from epigram.kernels.base import PLAIN
from epigram.kernels.base import choose as choose_kernels
from epigram.kernels.products.base import Dims
from epigram.model.config import ModelConfig
from epigram.model.gpt import GPT
from epigram.run import machine
from epigram.run.speed import Work, agreed_ms

_CPU_TOKENS = 8192  # what memory holds beside all that a backward needs: 49,152 tokens of h100 at once take over 22 GB


def pick_precision(name: str, context: Context) -> tuple[torch.dtype, dict[str, str]]:
    """The precision called `name`; for "auto" the one that the capability table gives this device."""
    auto = support(context.device.type, context.capability).precision
    dtype = auto if name == "auto" else getattr(torch, name)
    where = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else context.device.type
    return dtype, {"device": where, "precision": str(dtype).removeprefix("torch.")}


def attach_kernels(model: GPT, kernels: str, compile_: str, context: Context) -> tuple[bool, dict[str, str]]:
    """Give the model its kernels; returns whether it is to be compiled, and both choices in words.

    kernels, compile_: as in `RunConfig`. The model's precision must be set.
    """
    dims = Dims(widths=_widths(model.config), dtype=model.compute_dtype, carries=model.config.residual_lambdas)
    name = "plain" if compile_ == "on" else kernels
    model.kernels = choose_kernels(name, context.device.type, context.capability, dims)
    if model.kernels is not PLAIN:
        return False, {"kernels": model.kernels.name, "compile": "off: the kernels are fused by hand"}
    compiled = should_compile(compile_, context)
    return compiled, {"kernels": model.kernels.name, "compile": "on" if compiled else "off"}


def should_compile(setting: str, context: Context) -> bool:
    """Whether to compile: asked for, or left open and possible. Raises UserError when it is asked for in vain."""
    if setting == "off":
        return False
    reason = why_no_compile(context.device.type, context.capability)
    if reason is None and not compiler_available():
        reason = "it needs a C++ compiler and the headers of Python: install g++ and python3-dev"
    if setting == "on" and reason:
        raise UserError(f'run.compile = "on" cannot be used here: {reason}; or set run.compile=off')
    return reason is None


def backends_compile(setting: str, context: Context) -> bool:
    """Whether an attention backend may compile itself in a model that is not compiled."""
    return setting != "off" and should_compile("auto", context)


def compiler_available() -> bool:
    """A C++ compiler, and the headers of Python that the compiled graphs include."""
    return machine.cpp_compiler() is not None and machine.python_header() is not None


def tokens_at_a_time(setting: int, device_type: str) -> int | None:
    """The most tokens of a lane, or of a forward of a score, that are computed at a time; None where it is any number.

    setting: `RunConfig.micro_tokens`.
    """
    return setting or (_CPU_TOKENS if device_type == "cpu" else None)


def should_capture(setting: str, model: GPT, context: Context) -> bool:
    """Whether lanes are recorded as CUDA graphs. Raises UserError when that is asked for in vain."""
    reason = None
    if context.device.type != "cuda":
        reason = "CUDA graphs are for CUDA devices"
    elif model.kernels is PLAIN:
        reason = "it goes with fused kernels, and this run has plain ones"
    if setting == "on" and reason:
        raise UserError(f'run.cuda_graphs = "on" cannot be used here: {reason}; set run.cuda_graphs=auto')
    return setting != "off" and reason is None


def explain_float8(model: GPT, context: Context) -> dict[str, str]:
    """How products in float8 are computed here, in words. The model's precision must be set.

    Raises UserError where they cannot be.
    """
    device_type, dtype = context.device.type, str(model.compute_dtype).removeprefix("torch.")
    if reason := float8.why_not(device_type, context.capability, _widths(model.config)):
        raise UserError(f"run.float8 = true cannot be used here: {reason}; set run.float8=false")
    how = "" if device_type == "cuda" else f", rounded to it and multiplied in {dtype}: slower than without"
    return {"products of layers in training": f"float8{how}"}


def _widths(c: ModelConfig) -> tuple[int, ...]:
    """Rows and columns of the matrices of a layer, and of the parts of q, k and v."""
    return c.model_dim, c.query_dim, c.kv_dim, c.query_dim + 2 * c.kv_dim, c.mlp_dim


def attach_attention(
    model: GPT, backend: str, context: Context, compiled: bool, work: Work | None = None, compile_: str = "auto"
) -> dict[str, str]:
    """Give the model its attention backends for full and for windowed layers; returns which, in words.

    work: with it, "auto" takes on CUDA what is fastest at it; else what comes first in the capability table. compile_:
    as in `RunConfig`; a backend may compile itself in a model that is not compiled, where the shapes of `work` are all
    that it will be called with and nobody forbade it.
    """
    backward, compiles = work is None or work.backward, work is not None and backends_compile(compile_, context)
    request = attention_request(model, context, compiled, backward, compiles)
    prepare = compile_shapes if compiled else None
    on_cuda = context.device.type == "cuda"
    measure = partial(agreed_ms, context, work, prepare=prepare) if work is not None and on_cuda else None
    chosen = choose(backend, request, measure)
    model.attend, paths = chosen.attend, {"attention": str(chosen)}
    if model.config.window_layers:
        chosen = choose(backend, replace(request, window=model.config.window), measure)
        model.attend_window, paths["attention of windowed layers"] = chosen.attend, str(chosen)
    return paths


def attention_request(
    model: GPT, context: Context, compiled: bool, backward: bool = True, compiles: bool = False
) -> Request:
    """What the model's full-attention layers ask of a backend."""
    c = model.config
    return Request(
        device_type=context.device.type,
        capability=context.capability,
        dtype=model.compute_dtype,
        head_dim=c.head_dim,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        window=0,
        compiled=compiled,
        compiles=compiles,
        backward=backward,
        documents=c.isolated,
    )


@contextmanager
def attention_for_eager(model: GPT, context: Context) -> Iterator[None]:
    """Inside, the model may run uncompiled: with backends that do not need the compiler."""
    chosen = model.attend, model.attend_window
    attach_attention(model, "auto", context, compiled=False)
    try:
        yield
    finally:
        model.attend, model.attend_window = chosen


def stream_attention(model: GPT, backend: str, context: Context) -> tuple[Attend, str]:
    """The backend for chunks that follow cached keys, and the choice in words.

    It is the one called `backend` if that can; else, in the open, the first that can in the order of the capability
    table: every layer has a window then, and not every backend serves that, or does without the compiler.
    """
    request = replace(attention_request(model, context, compiled=False, backward=False), window=1, longer_keys=True)
    if backend == "auto" or (reason := why_not(backend, request)) is None:
        chosen = choose(backend, request)
        return chosen.attend, chosen.name
    chosen = choose(candidates(request)[0], request)
    return chosen.attend, f"{chosen.name} ({reason})"
