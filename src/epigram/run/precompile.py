"""Compiles a run's kernels in several processes at once, where a run would compile them one after the other.

quack and flash-attn-4 compile each kernel when it is first called, for seconds, and keep it on disk. So before a run
first needs them on a machine, a few processes each call some of them on small made-up tensors; the run then loads what
they left. A mark in the cache folder says that this was done, for these versions and shapes on this kind of GPU, and
the next run starts no process; one that starts meanwhile waits. Nothing depends on it: what is missing is compiled
when it is called.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from epigram import plugin
from epigram.attention.base import PACKAGE as BACKENDS
from epigram.attention.base import within
from epigram.config import parse_model
from epigram.dist import collectives
from epigram.dist.context import Context
from epigram.kernels.products.base import PACKAGE as PRODUCTS
from epigram.model.config import ModelConfig
from epigram.progress import Progress
from epigram.user_cache import user_cache

_PRODUCTS, _BACKEND = "quack", "flash4"  # those that compile for seconds and keep what they compiled
_LIBRARIES = ("torch", "quack-kernels", "flash-attn-4", "nvidia-cutlass-dsl")
_FOLDERS = ("QUACK_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
_ROWS, _LENGTH = 2048, 1024  # tokens of the made-up calls: some tiles
_MOST_WORKERS = 12
_LIMIT_S = 300.0

Task = Callable[[], Any]


def precompile(model: ModelConfig, products: str | None, context: Context, folder: Path | None = None) -> float | None:
    """Compile what a model of this shape will call; returns the seconds that took, None if nothing had to be done.

    products: the file of `epigram.kernels.products` that this process uses; other machines may have others. folder: of
    the marks. Every process must call this; the first of each machine works, the others wait.
    """
    if context.device.type != "cuda":
        return None
    took: float | None = None
    with collectives.together(context):
        if context.local_rank == 0 and products == _PRODUCTS:
            took = _once(model, context.device, folder or user_cache() / "compiled")
    return took


def _once(model: ModelConfig, device: torch.device, folder: Path) -> float | None:
    mark = folder / _key(model, torch.cuda.get_device_name(device))
    if mark.exists():
        return None
    start_s = time.perf_counter()
    with _one_at_a_time(folder):
        if not mark.exists():  # else another run did it in the meantime
            _compile(model, device, mark)
    return time.perf_counter() - start_s


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Other runs on this machine wait: together they would only take each other's processors.

    Nobody waits where there is nothing to write to or to lock.
    """
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            import fcntl  # POSIX only

            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _compile(model: ModelConfig, device: torch.device, mark: Path) -> None:
    names = list(tasks(model, device))
    count = max(1, min(len(names), _MOST_WORKERS, (os.cpu_count() or 2) // 2))
    complaints = run_workers([names[i::count] for i in range(count)], model, str(device))
    for complaint in complaints:
        warnings.warn(f"kernels could not be compiled beforehand, the run does it itself: {complaint}", stacklevel=2)
    if not complaints:
        with suppress(OSError):  # without the mark the next run does it again
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def run_workers(shares: list[list[str]], model: ModelConfig, device: str) -> list[str]:
    """Let a process work on each share; returns the last words of those that failed. They open no process group."""
    workers = []
    for share in shares:
        order = json.dumps({"model": asdict(model), "tasks": share, "device": device})
        worker = subprocess.Popen(
            [sys.executable, "-m", "epigram.run.precompile"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert worker.stdin is not None
        with suppress(BrokenPipeError):  # it died at once; its last words come below
            worker.stdin.write(order)
            worker.stdin.close()
        worker.stdin = None
        workers.append(worker)
    complaints: list[str] = []
    with Progress("compiling kernels", len(workers), "processes") as bar:
        for worker in workers:
            complaints += filter(None, [_last_words(worker)])
            bar.advance()
    return complaints


def _last_words(worker: "subprocess.Popen[str]") -> str:
    try:
        _, errors = worker.communicate(timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.communicate()
        return f"it took over {_LIMIT_S:.0f} s"
    lines = errors.strip().splitlines()
    return (lines[-1] if lines else f"exit code {worker.returncode}") if worker.returncode else ""


def _key(model: ModelConfig, gpu: str) -> str:
    """Of a mark: whatever decides which kernels there are and where they lie."""
    facts: list[Any] = [gpu, _shape(model), [os.environ.get(name) for name in _FOLDERS], _LENGTH]
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            facts.append((name, metadata.version(name)))
    source = plugin.load(PRODUCTS, _PRODUCTS).__file__
    assert source is not None
    facts.append(hashlib.sha256(Path(source).read_bytes()).hexdigest())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _shape(c: ModelConfig) -> list[Any]:
    """What decides which kernels a model calls: another gain, rotation or length of window needs no other ones (whether
    there is a window does; how long it is, flash-attn-4 is told in the call), so no processes either."""
    widths = (c.num_heads, c.num_kv_heads, c.head_dim, c.model_dim, c.mlp_dim)
    return [widths, c.mlp_slope, bool(c.window_layers), c.skips != "none", c.isolated]


def tasks(model: ModelConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, Task]:
    """Every kernel that a model of this shape may need, by name; the slowest to compile first."""
    return {**_attention_tasks(model, device, dtype), **_product_tasks(model, device, dtype)}


def _attention_tasks(c: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Task]:
    windows = [0, c.window] if c.window_layers else [0]
    found: dict[str, Task] = {}

    def add(window: int, num_kv_heads: int, backward: bool) -> None:
        def task() -> None:
            module = plugin.load(BACKENDS, _BACKEND)
            heads = (c.num_heads, num_kv_heads, num_kv_heads)
            # The library takes another kernel for more than 256 sequences, documents or room for them.
            num_rows = 32 if c.isolated else 1
            q, k, v = (
                torch.randn(num_rows, _LENGTH, h, c.head_dim, device=device, dtype=dtype).requires_grad_(backward)
                for h in heads
            )
            reach = torch.arange(_LENGTH, device=device, dtype=torch.int32).expand(num_rows, -1)
            attend = within(module.attend, reach if c.isolated else None)
            out = attend(q, k, v, window)
            if backward:
                out.sum().backward()

        words = "forward and backward" if backward else "forward"
        found[f"attention, window {window}, {num_kv_heads} value heads, {words}"] = task

    for backward in (True, False):
        for window in windows:
            for num_kv_heads in dict.fromkeys((c.num_heads, c.num_kv_heads)):
                add(window, num_kv_heads, backward)
    return found


def _product_tasks(c: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Task]:
    """Every function of the products with every choice of its arguments, on `_ROWS` tokens."""
    width, channels = c.model_dim, c.query_dim + 2 * c.kv_dim

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype) / math.sqrt(shape[-1])

    def rows(columns: int) -> torch.Tensor:
        return matrix(_ROWS, columns)

    def factor(count: int = _ROWS) -> torch.Tensor:
        return torch.ones(count, device=device)

    def product() -> Any:
        return plugin.load(PRODUCTS, _PRODUCTS)

    found: dict[str, Task] = {
        "scaled": lambda: product().scaled(rows(width), matrix(channels, width), factor()),
        "down back": lambda: product().down_back(
            rows(width), matrix(width, c.mlp_dim), rows(c.mlp_dim), factor(), c.mlp_slope
        ),
        "back": lambda: product().back(
            rows(channels), matrix(channels, width), rows(width), rows(width), factor(), None
        ),
        "back, own": lambda: product().back(
            rows(c.mlp_dim), matrix(c.mlp_dim, width), rows(width), rows(width), factor(), factor(width)
        ),
        "added": lambda: product().added(rows(c.mlp_dim), matrix(width, c.mlp_dim), rows(width), False),
        "added, squares": lambda: product().added(rows(c.query_dim), matrix(width, c.query_dim), rows(width), True),
    }
    for keep in (True, False):
        found[f"up, keep {keep}"] = lambda keep=keep: product().up(  # type: ignore[misc]
            rows(width), matrix(c.mlp_dim, width), factor(), c.mlp_slope, keep
        )
        for count in (1, 2) if c.skips != "none" else (1,):
            found[f"mixed, {count} streams, keep {keep}"] = lambda keep=keep, count=count: product().mixed(  # type: ignore[misc]
                rows(c.mlp_dim), matrix(width, c.mlp_dim), rows(width), factor(width),
                [(factor(width), rows(width)) for _ in range(count)], keep,
            )  # fmt: skip
    return found


def work(order: dict[str, Any]) -> None:
    """What a worker does."""
    device = torch.device(order["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    known = tasks(parse_model(order["model"]), device)
    for name in order["tasks"]:
        known[name]()


if __name__ == "__main__":
    work(json.loads(sys.stdin.read()))
