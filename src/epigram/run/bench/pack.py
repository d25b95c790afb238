"""From a random model to a file and back: calibration, quantization, and every codec."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from epigram import plugin
from epigram.artifact.table import CODECS
from epigram.artifact.tensors import Contents, load, save
from epigram.config import to_tree
from epigram.model.cost import forward_flops_per_token
from epigram.quant.config import QuantConfig
from epigram.quant.policy import Part, method_of, plan
from epigram.quant.quantize import Stored, quantize_model
from epigram.quantized import QuantizedTensor
from epigram.run.bench.base import Bench, Work
from epigram.run.export import BATCH_TOKENS, calibrate, taps
from epigram.run.warmup import random_tokens

REPEATS = 1  # a codec may take a minute
OPTIONS = frozenset({"profile", "codecs"})


def run(bench: Bench) -> None:
    codecs = bench.options.codecs or plugin.names(CODECS)
    for codec in codecs:  # a wrong name is told before the work
        plugin.load(CODECS, codec)
    stored = _quantize(bench)
    contents = Contents(model=to_tree(bench.engine.config)["model"], tensors=stored, recipe=bench.engine.config.recipe)
    bench.figures["weights"] = sum(parameter.numel() for parameter in bench.engine.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        for codec in codecs:
            _time_codec(bench, codec, contents, Path(folder) / f"{codec}.epigram")


def _quantize(bench: Bench) -> Stored:
    engine, config = bench.engine, bench.engine.config.quant
    hessians: dict[str, Tensor] = {}
    stored: Stored = {}

    def measure_hessians() -> None:
        hessians.update(calibrate(engine.model, engine.config, _windows(bench), engine.context))

    def quantize() -> None:
        stored.update(quantize_model(named, engine.model.roles(), hessians, config)[0])

    named = {name: parameter.detach() for name, parameter in engine.model.named_parameters()}
    if config.needs_hessians:
        tokens = config.calibration.num_windows * config.calibration.seq_len
        work = _calibration_work(bench, tokens)
        bench.time("calibrate on made-up tokens", measure_hessians, work, warm_up=1, amounts={"tokens": tokens})
    else:
        bench.left_out["calibrate"] = f'quant.method = "{config.method}" needs no calibration'
    work = _quantization_work(plan(named, engine.model.roles(), config.grid), config)
    bench.time(f"quantize, {config.method}", quantize, work, warm_up=1, amounts={"weights": _num_weights(named)})
    return stored


def _calibration_work(bench: Bench, tokens: int) -> Work:
    """A forward, and the products of each tap's input with itself."""
    config = bench.engine.config
    forward = sum(forward_flops_per_token(config.model, config.quant.calibration.seq_len).values())
    return Work(flops=tokens * (forward + sum(2 * cols**2 for cols in taps(bench.engine.model, config).values())))


def _quantization_work(parts: Sequence[Part], config: QuantConfig) -> Work:
    """Of GPTQ each column's error in all columns behind it; weights read and codes written."""
    swept = [part.tensor for part in parts if method_of(part, config) == "gptq"]
    moved = sum(part.tensor.numel() * (part.tensor.itemsize + 1) for part in parts)
    return Work(flops=sum(tensor.numel() * tensor.shape[1] for tensor in swept), bytes=moved)


def _windows(bench: Bench) -> Iterator[Tensor]:
    settings = bench.engine.config.quant.calibration
    size = max(BATCH_TOKENS // settings.seq_len, 1)
    for first in range(0, settings.num_windows, size):
        yield random_tokens(bench.engine, min(size, settings.num_windows - first), settings.seq_len)


def _time_codec(bench: Bench, codec: str, contents: Contents, path: Path) -> None:
    loaded: list[Contents] = []
    amounts = {"MB": raw_bytes(contents.tensors) / 1e6}
    bench.time(f"pack, {codec}", lambda: save(path, contents, codec), warm_up=0, amounts=amounts, profiled=False)
    bench.time(f"unpack, {codec}", lambda: loaded.append(load(path)), warm_up=0, amounts=amounts, profiled=False)
    bench.figures[f"{codec}_bytes"] = path.stat().st_size
    assert all(_same(contents.tensors[name], tensor) for name, tensor in loaded[-1].tensors.items())


def raw_bytes(stored: Stored) -> int:
    """Bytes of the tensors before packing: one for each integer weight, scales and floats as they are."""
    parts = [t for x in stored.values() for t in ((x.codes, x.scale) if isinstance(x, QuantizedTensor) else (x,))]
    return sum(tensor.numel() * tensor.itemsize for tensor in parts)


def _same(saved: QuantizedTensor | Tensor, loaded: QuantizedTensor | Tensor) -> bool:
    if isinstance(saved, QuantizedTensor) and isinstance(loaded, QuantizedTensor):
        return torch.equal(saved.codes, loaded.codes) and torch.equal(saved.scale, loaded.scale)
    assert isinstance(saved, Tensor) and isinstance(loaded, Tensor)
    return torch.equal(saved, loaded)


def _num_weights(named: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in named.values())
