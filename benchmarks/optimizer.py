"""Time the optimizer's step: `PYTHONPATH=src python benchmarks/optimizer.py [--tiles 128,128,64,8,3 ...]`.

Clipping, Muon and its parts, AdamW, the average and the whole, on the parameters of a recipe with made-up gradients.
Needs torch, and Triton for what is fused. "eager" is the time between two events around the launches, as the host makes
them; "graph" that of the same launches captured in a CUDA graph, which is what the device needs. Medians, in ms.

What the step of pr1212 costs at least (28.31 million weights in 72 matrices, 29.75 million parameters in all), on an
H100 with 989 bfloat16 TFLOP/s and 3.35 TB/s:

  Newton-Schulz   342.3 GFLOP as full products (0.35 ms); 239.6 (0.24 ms) when the two symmetric ones of an iteration
                  are halved, 265.2 (0.27 ms) in tiles of a quarter of a side
  Muon's passes   566 MB (0.17 ms): gradient 4 and momentum 2 + 2 bytes a weight, the update written and read again
                  in bfloat16, the weight 4 + 4
  clipping        119 MB (0.04 ms): every gradient once
  AdamW            40 MB (0.01 ms): 28 bytes for each of 1.44 million parameters
  average         357 MB (0.11 ms): 12 bytes for each parameter

in all 265.2 GFLOP and 1,083 MB: 0.6 ms if products and passes do not overlap.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from epigram.config import load_recipe
from epigram.kernels import symmetric
from epigram.kernels.choice import use_fused, why_not
from epigram.model.gpt import GPT
from epigram.optim.average import Ema
from epigram.optim.gradients import LaneGradients, total_norm
from epigram.optim.muon import Muon
from epigram.optim.optimizer import Optimizer
from epigram.roles import ParameterRole

TILES = ("128,128,64,8,3", "128,128,64,8,4", "128,128,64,4,3", "128,128,32,4,4", "64,64,64,4,4", "128,256,64,8,3")
MULTIPLIER, MOMENTUM, MAX_NORM = 0.9, 0.95, 0.3


class Bench:
    """Times functions on one device, prints each result, and keeps it."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._cuda = device.type == "cuda"
        self._repeats = repeats
        self.results: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, function: Callable[[], Any]) -> float:
        """Measure `function` after three calls that compile and allocate; returns what the device needs."""
        for _ in range(3):
            function()
        found = {"eager": self._median(function)}
        if self._cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            found["graph"] = self._median(graph.replay)
        self.results[name] = found
        print(f"  {name:46}" + "   ".join(f"{k} {v:8.4f}" for k, v in found.items()), flush=True)
        return found.get("graph", found["eager"])

    def _median(self, function: Callable[[], Any]) -> float:
        times = []
        for _ in range(self._repeats):
            if self._cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                function()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                start_s = time.perf_counter()
                function()
                times.append(1e3 * (time.perf_counter() - start_s))
        return round(statistics.median(times), 4)


class Setup:
    """Parameters of a recipe with gradients of a realistic size, and optimizers over copies of them."""

    def __init__(self, recipe: str, device: torch.device) -> None:
        config = load_recipe(recipe)
        model = GPT(config.model)
        torch.manual_seed(0)
        model.initialize(0)
        self.device = device
        self.roles: dict[str, ParameterRole] = model.roles()
        self.config = config.optim
        self._start = {name: p.detach().to(device) for name, p in model.named_parameters()}
        size = sum(p.numel() for p in self._start.values()) ** 0.5
        self._gradients = {name: torch.randn_like(p) / size for name, p in self._start.items()}  # norm 1: is clipped

    def parameters(self) -> dict[str, nn.Parameter]:
        named = {name: nn.Parameter(p.clone()) for name, p in self._start.items()}
        for name, parameter in named.items():
            parameter.grad = self._gradients[name].clone()
        return named

    def optimizer(self, kernels: str) -> tuple[dict[str, nn.Parameter], Optimizer]:
        named = self.parameters()
        optimizer = Optimizer(named, self.roles, self.config, kernels=kernels)
        optimizer.set_rates(MULTIPLIER, MOMENTUM)
        return named, optimizer

    def describe(self) -> None:
        weights = sum(p.numel() for name, p in self._start.items() if self.roles[name].kind == "matrix")
        total = sum(p.numel() for p in self._start.values())
        print(f"{total:,} parameters, {weights:,} of them in matrices", flush=True)


def clipping(bench: Bench, setup: Setup) -> None:
    """One lane, as in training: the norm of its gradients and the scale; and with a pass that multiplies them."""
    named = setup.parameters()
    gradients = [p.grad for p in named.values() if p.grad is not None]
    lanes = LaneGradients(named, clip="lane", max_norm=MAX_NORM, lane_weights=[1.0])

    def collect() -> Tensor:
        lanes.add(0)
        return lanes.finish().scale

    one = torch.ones((), device=setup.device)
    bench("clip: norm and scale", collect)
    bench("  of which the norm", lambda: total_norm(gradients))
    bench("  a pass that multiplies, for comparison", lambda: torch._foreach_mul_(gradients, one))


def parts(bench: Bench, setup: Setup, kernels: list[str]) -> None:
    """Muon and its parts, AdamW, the average, and all of them."""
    for name in kernels:
        named, optimizer = setup.optimizer(name)
        muon, one = optimizer._muon, torch.ones((), device=setup.device)
        momentum, multiplier = MOMENTUM * one, MULTIPLIER * one
        bench(f"Muon, {name}", partial(muon.step, multiplier, momentum, one))
        every = range(len(muon._plan))
        bench(f"  momentum, {name}", partial(for_each, every, muon._absorb, momentum, one))
        bench(f"  products, {name}", partial(for_each, every, muon._orthogonalize))
        bench(f"  weights, {name}", partial(weights_alone, muon, multiplier))
    bench("AdamW", partial(optimizer._adamw.step, multiplier, one))
    bench("average", Ema(named, 0.997).apply)


def summary(bench: Bench, kernels: list[str]) -> None:
    """The two sums that have a target."""
    for way in ("eager", "graph"):
        times = {name: found[way] for name, found in bench.results.items() if way in found}
        if times:
            rest = times["clip: norm and scale"] + times["AdamW"] + times["average"]
            muon = ", ".join(f"Muon {name} {times[f'Muon, {name}']:.3f}" for name in kernels)
            print(f"  sums, {way}: clip + AdamW + average {rest:.3f} (aim 0.5), {muon} (aim 4)", flush=True)


@torch.no_grad()
def for_each(batches: range, work: Callable[..., Any], *arguments: Tensor) -> None:
    """Part of Muon's step for each of its batches."""
    for index in batches:
        work(index, *arguments)


@torch.no_grad()
def weights_alone(muon: Muon, multiplier: Tensor) -> None:
    """The last pass of Muon, on updates that are not orthogonalised."""
    triples, muon._triples = muon._triples, ()
    factors = iter(muon._factors(multiplier))
    for index in range(len(muon._plan)):
        muon._descend(index, muon._orthogonalize(index), factors, None)
    muon._triples = triples


def whole(bench: Bench, setup: Setup, kernels: list[str]) -> None:
    """Clipping, step and average, as the training loop calls them."""
    for name in kernels:
        named, optimizer = setup.optimizer(name)
        average = Ema(named, 0.997)
        lanes = LaneGradients(named, clip="lane", max_norm=MAX_NORM, lane_weights=[1.0])

        def step(lanes=lanes, optimizer=optimizer, average=average) -> None:
            lanes.add(0)
            optimizer.step(MULTIPLIER, MOMENTUM, lanes.finish().scale)
            average.update()

        if setup.device.type == "cuda":
            step()
            step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        bench(f"everything, {name}", step)
    if setup.device.type == "cuda":
        print("  no step waited for the device (torch.cuda.set_sync_debug_mode)", flush=True)


def products(bench: Bench, setup: Setup, tiles: list[tuple[int, ...]]) -> None:
    """The three products of an iteration for each batch, by torch and by the kernel with each choice of tiles."""
    from epigram.kernels._triton import symmetric as kernel

    _, optimizer = setup.optimizer("fused")
    a, b, c = 3.4445, -4.7750, 2.0315
    for update in optimizer._muon._updates:
        x = torch.randn_like(update) / update.shape[2] ** 0.5
        gram = symmetric.gram(x, fused=False)
        n, short, long = x.shape
        flops = {"X Xᵀ": 2 * n * short**2 * long, "b A + c A A": 2 * n * short**3, "a X + P X": 2 * n * short**2 * long}
        torch_calls: dict[str, Callable[[], Tensor]] = {
            "X Xᵀ": partial(symmetric.gram, x, fused=False),
            "b A + c A A": partial(symmetric.polynomial, gram, b, c, fused=False),
            "a X + P X": partial(symmetric.advance, x, gram, a, fused=False),
        }
        print(f"{n} x ({short} x {long}):", flush=True)
        bench(f"{short} x {long}: P X alone, torch", partial(torch.bmm, gram, x))
        for product, call in torch_calls.items():
            name = f"{short} x {long}: {product}"
            times = {"torch": bench(f"{name}, torch", call)}
            for choice in tiles:
                chosen = kernel.Tiles(*choice)
                is_symmetric = product != "a X + P X"
                if is_symmetric and chosen.rows != chosen.cols:
                    continue
                fused = {
                    "X Xᵀ": partial(kernel.product, x, x.mT, symmetric=True, tiles=chosen),
                    "b A + c A A": partial(
                        kernel.product, gram, gram, gram, alpha=c, beta=b, symmetric=True, tiles=chosen
                    ),
                    "a X + P X": partial(kernel.product, gram, x, x, beta=a, tiles=chosen),
                }[product]
                label = ",".join(map(str, choice))
                times[label] = bench(f"{name}, {label}", fused)
            best = min(times, key=times.__getitem__)
            rate = flops[product] / times[best] / 1e9
            print(f"  -> best: {best}, {times[best]:.4f} ms, {rate:.0f} TFLOP/s as a full product", flush=True)


def errors(setup: Setup, kernels: list[str]) -> dict[str, float]:
    """Relative error of Muon's first update against the same in double precision, and between the paths."""
    moved: dict[str, Tensor] = {}
    for name in ["exact", *kernels]:
        named, optimizer = setup.optimizer("plain" if name == "exact" else name)
        if name == "exact":
            muon = optimizer._muon
            muon._dtype = torch.float64
            muon._updates = [update.double() for update in muon._updates]
            muon._squares = [squares.double() for squares in muon._squares]
        optimizer.update()
        change = [
            (p.detach() - setup._start[n]).double().flatten()
            for n, p in named.items()
            if setup.roles[n].kind == "matrix"
        ]
        moved[name] = torch.cat(change)
    found = {name: float((moved[name] - moved["exact"]).norm() / moved["exact"].norm()) for name in kernels}
    if "fused" in kernels:
        found["fused against plain"] = float((moved["fused"] - moved["plain"]).norm() / moved["plain"].norm())
    for name, error in found.items():
        print(f"  error of Muon's update, {name:24} {error:.2e}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="pr1212")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--tiles", nargs="*", default=TILES, help="rows,cols,depth,warps,stages of the products to try; none: skip them"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    setup, bench = Setup(arguments.recipe, device), Bench(device, arguments.repeats)
    kernels = ["plain", "fused"] if use_fused("auto", device) else ["plain"]
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else device}, torch {torch.__version__}")
    if "fused" not in kernels:
        print(why_not(device))
    setup.describe()
    found = errors(setup, kernels)
    clipping(bench, setup)
    parts(bench, setup, kernels)
    whole(bench, setup, kernels)
    summary(bench, kernels)
    if "fused" in kernels and arguments.tiles:
        products(bench, setup, [tuple(map(int, choice.split(","))) for choice in arguments.tiles])
    print(json.dumps({"ms": bench.results, "errors": found}, ensure_ascii=False))


if __name__ == "__main__":
    main()
