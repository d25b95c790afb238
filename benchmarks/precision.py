"""Which part of training in bfloat16 costs what: one recipe and seed, with single parts in float32.

    python -m benchmarks.precision --data DATA --steps 300

Every way trains with torch's operators one by one, from the same weights on the same tokens. `bfloat16` and `float32`
are what `run.precision` offers; between them lie ways that leave one rounding out. Whichever comes near float32 names
what costs. Losses go to a JSON file for each way as soon as it is over; then all are compared.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss_curves import LATE, PLAIN, distances
from epigram.config import load_recipe
from epigram.data.dataset import open_data
from epigram.dist.context import open_context
from epigram.kernels import base
from epigram.kernels.base import Kernels
from epigram.kernels.heads import Attend
from epigram.kernels.trunk import Layer, Shape
from epigram.model.config import ModelConfig
from epigram.model.rope import rotary_tables
from epigram.run.machine import environment
from epigram.run.setup import build_session
from epigram.run.train import plan_step, train_step

SINGLE = torch.float32


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` in the precision of the weights, whatever x is in."""
    return F.linear(x.to(weight.dtype), weight)


def stream(config: ModelConfig, dtype: torch.dtype) -> Kernels:
    """The residual stream, its mixes and norms: rounded only where a product reads it."""

    def enter(*arguments: Any) -> Tensor:
        tokens, embed, extra, gate, _, *reset = arguments
        return base.PLAIN.enter(tokens, embed, extra, gate, SINGLE, *reset)

    def mix_norm(streams: Any, coefficients: Any) -> Tensor:
        return base.PLAIN.mix_norm(streams, coefficients).to(dtype)

    return replace(base.PLAIN, enter=enter, trunk=partial(base.PLAIN.trunk, linear=linear), mix_norm=mix_norm)


def head(config: ModelConfig, dtype: torch.dtype) -> Kernels:
    """The last norm, the product with the embedding, logits and losses, and the gradients of all of these."""

    def mix_norm(streams: Sequence[Tensor], coefficients: Any) -> Tensor:
        return base.PLAIN.mix_norm(tuple(stream.to(SINGLE) for stream in streams), coefficients)

    return replace(base.PLAIN, mix_norm=mix_norm)


def heads(config: ModelConfig, dtype: torch.dtype) -> Kernels:
    """Results of the product for q, k and v, their norms, rotation and gain: rounded where attention reads them."""

    def finish(layer: Layer) -> Layer:
        return layer._replace(qkv=layer.qkv.to(SINGLE), attend=_in(dtype, layer.attend))

    def trunk(x0: Tensor, layers: Sequence[Layer], value: Tensor | None, shape: Shape, **options: Any) -> Any:
        length = x0.shape[1]
        shape = shape._replace(rotary=rotary_tables(config, 0, length, length, x0.device, SINGLE))
        return base.PLAIN.trunk(x0, [finish(layer) for layer in layers], value, shape, linear=linear, **options)

    return replace(base.PLAIN, trunk=trunk)


def attention(config: ModelConfig, dtype: torch.dtype) -> Kernels:
    """Logits, weights and sums of attention; its inputs and its output stay rounded."""

    def trunk(x0: Tensor, layers: Sequence[Layer], *arguments: Any, **options: Any) -> Any:
        return base.PLAIN.trunk(
            x0, [layer._replace(attend=_in(SINGLE, layer.attend)) for layer in layers], *arguments, **options
        )

    return replace(base.PLAIN, trunk=trunk)


def mlp(config: ModelConfig, dtype: torch.dtype) -> Kernels:
    """Hidden channels before and after their activation: rounded where the second product reads them."""

    def trunk(x0: Tensor, layers: Sequence[Layer], *arguments: Any, **options: Any) -> Any:
        wide = [layer._replace(up=layer.up.to(SINGLE)) for layer in layers]
        return base.PLAIN.trunk(x0, wide, *arguments, linear=linear, **options)

    return replace(base.PLAIN, trunk=trunk)


def weights(config: ModelConfig, dtype: torch.dtype) -> Kernels:
    """Matrices of the layers and the gradients of them; on a CUDA device products read them as TF32, 10 bits."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.to(SINGLE), weight).to(x.dtype)

    def scaled(bank: Tensor, scale: Tensor | None, _: torch.dtype) -> Tensor:
        return base.PLAIN.scaled(bank, scale, SINGLE)

    return replace(base.PLAIN, scaled=scaled, trunk=partial(base.PLAIN.trunk, linear=product))


def _in(dtype: torch.dtype, attend: Attend) -> Attend:
    def attend_in(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return attend(q.to(dtype), k.to(dtype), v.to(dtype), window).to(q.dtype)

    return attend_in


PARTS: dict[str, Callable[[ModelConfig, torch.dtype], Kernels]] = {
    part.__name__: part for part in (stream, head, heads, attention, mlp, weights)
}
"""Ways to compute a loss, by what of it is in float32."""

BFLOAT16 = ['run.precision="bfloat16"']
SETTINGS = {
    "float32": ['run.precision="float32"'],
    "bfloat16": BFLOAT16,
    **dict.fromkeys(PARTS, BFLOAT16),
    "muon": [*BFLOAT16, 'optim.muon.dtype="float32"', 'optim.muon.momentum_dtype="float32"'],
}
"""Of each way; the momentum and Newton-Schulz of Muon are in bfloat16 on a CUDA device in all but the last."""


def losses_of(way: str, recipe: str, settings: Sequence[str], data: str, device: str) -> tuple[list[float], Any]:
    """Mean loss of each step, and the machine. The number of steps is `budget.max_steps`."""
    with open_context(device) as context:
        config = load_recipe(recipe, settings)
        session = build_session(config, open_data(data), context)
        try:
            if way in PARTS:
                kernels = PARTS[way](config.model, session.model.compute_dtype)
                session.lane_loss = partial(session.lane_loss, kernels=kernels)
            found = []
            while session.step < config.budget.max_steps:
                elapsed_s = session.clock.elapsed_s(session.step)
                found.append(train_step(session, plan_step(session, elapsed_s))[0])
                session.times_s.append(elapsed_s)
                session.step += 1
            return torch.stack(found).tolist(), environment(session.paths)
        finally:
            session.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data folder")
    parser.add_argument("--recipe", default="h100")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--ways", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("docs/results/precision"))
    arguments = parser.parse_args()
    steps = ['budget.clock="steps"', f"budget.steps={arguments.steps}", f"budget.max_steps={arguments.steps}"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for way in arguments.ways:
        lanes = "lanes=[{count=1,seq_len=2048,num_seqs=8}]"
        settings = [*PLAIN, *steps, lanes, *arguments.overrides, *SETTINGS[way]]
        start_s = time.perf_counter()
        losses, machine = losses_of(way, arguments.recipe, settings, arguments.data, arguments.device)
        machine.pop("command", None)  # of this machine's folders; the settings say the rest
        record = {"way": way, "recipe": arguments.recipe, "settings": settings, "machine": machine, "losses": losses}
        (arguments.out / f"{way}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        print(f"{way}: {losses[0]:.4f} to {losses[-1]:.4f}, {time.perf_counter() - start_s:.0f} s", flush=True)
    files = {way: arguments.out / f"{way}.json" for way in SETTINGS}
    known = {way: json.loads(path.read_text("utf-8"))["losses"] for way, path in files.items() if path.exists()}
    same = {way: losses for way, losses in known.items() if len(losses) == arguments.steps}
    if "float32" in same:
        print(f"| last {LATE} steps | mean difference to float32 | mean absolute difference |\n|---|---|---|")
        for way, (mean, size) in distances(same, "float32").items():
            print(f"| {way} | {mean:+.5f} | {size:.5f} |")


if __name__ == "__main__":
    main()
