"""What a run's kernels are compiled with beforehand, on a machine that has none of the libraries: with stand-ins."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from epigram.dist.context import Context
from epigram.model.config import ModelConfig
from epigram.run import precompile as module
from epigram.run.precompile import precompile, run_workers, tasks

SMALL = ModelConfig(
    vocab_size=50, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, window=6,
    window_layers=(1,), rotary_dim=4,
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def stand_ins(monkeypatch):
    """Triton's products in its interpreter, and attention written out."""
    from epigram.kernels.products import triton

    for name, size in (("_TILE_M", 64), ("_TILE_N", 32), ("_TILE_K", 32)):
        monkeypatch.setattr(triton, name, size)
    for name, value in (("_PRODUCTS", "triton"), ("_BACKEND", "reference"), ("_ROWS", 64), ("_LENGTH", 16)):
        monkeypatch.setattr(module, name, value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_every_task_calls_what_it_names(stand_ins, monkeypatch):
    """Each function of the products with each choice, and attention as training and scoring call it."""
    from epigram.attention import reference
    from epigram.kernels.products import triton

    called: set[tuple] = set()
    for name in ("scaled", "added", "up", "down_back", "back", "mixed"):
        function = getattr(triton, name)

        def spy(*arguments, name=name, function=function):
            kinds = {"added": 3, "up": 4, "back": 5}
            if name == "mixed":
                called.add((name, len(arguments[4]), arguments[5]))
            elif name in kinds:
                choice = arguments[kinds[name]]
                called.add((name, choice if isinstance(choice, bool) else choice is not None))
            else:
                called.add((name,))
            return function(*arguments)

        monkeypatch.setattr(triton, name, spy)
    attend = reference.attend

    def spy_attend(q, k, v, window):
        called.add(("attend", window, k.shape[2], q.requires_grad))
        return attend(q, k, v, window)

    monkeypatch.setattr(reference, "attend", spy_attend)
    for task in tasks(SMALL, CPU, torch.float16).values():
        task()
    assert called == {
        ("scaled",), ("down_back",), ("added", True), ("added", False), ("up", True), ("up", False), ("back", True),
        ("back", False), *(("mixed", count, keep) for count in (1, 2) for keep in (True, False)),
        *(("attend", w, heads, backward) for w in (0, 6) for heads in (2, 4) for backward in (True, False)),
    }  # fmt: skip


def test_a_worker_that_fails_says_why_and_the_run_goes_on(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(module, "_PRODUCTS", "triton")
    monkeypatch.setattr(module, "run_workers", lambda shares, model, device: ["no such kernel"])
    context = Context(device=torch.device("cuda:0"))
    with pytest.warns(UserWarning, match="the run does it itself: no such kernel"):
        assert precompile(SMALL, "triton", context, tmp_path) is not None
    assert not list(tmp_path.iterdir()), "what failed is tried again"


def test_it_is_done_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(module, "_PRODUCTS", "triton")
    shares: list[list[str]] = []
    monkeypatch.setattr(module, "run_workers", lambda given, model, device: shares.extend(given) or [])
    context = Context(device=torch.device("cuda:0"))
    assert precompile(SMALL, "triton", context, tmp_path) is not None
    assert sorted(name for share in shares for name in share) == sorted(tasks(SMALL, CPU))
    assert precompile(SMALL, "triton", context, tmp_path) is None
    for same in ({"qk_gain": 5.0}, {"window": 3}, {"xsa_layers": (0,)}, {"rotary_scaling": "none"}):
        assert precompile(replace(SMALL, **same), "triton", context, tmp_path) is None, same
    isolated = {"documents": "isolated", "bos_id": 1}
    for other in (
        {"mlp_dim": 64},
        {"window": 0, "window_layers": ()},
        {"skips": "none"},
        {"num_kv_heads": 4},
        isolated,
    ):
        assert precompile(replace(SMALL, **other), "triton", context, tmp_path) is not None, other
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert precompile(SMALL, "triton", context, tmp_path) is not None


def test_two_runs_at_once_do_it_once(tmp_path: Path, monkeypatch):
    """The second waits for the first, and then finds it done."""
    calls: list[int] = []

    def run_workers(*_: object) -> list[str]:
        calls.append(1)
        time.sleep(0.3)  # without a lock the other one would begin now
        return []

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(module, "_PRODUCTS", "triton")
    monkeypatch.setattr(module, "run_workers", run_workers)
    context = Context(device=torch.device("cuda:0"))
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(precompile, SMALL, "triton", context, tmp_path) for _ in range(2)]
        took_s = [run.result() for run in runs]
    assert len(calls) == 1
    assert all(seconds is not None and seconds > 0.2 for seconds in took_s)


def test_without_a_place_to_write_it_is_done_all_the_same(tmp_path: Path, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(module, "_PRODUCTS", "triton")
    monkeypatch.setattr(module, "run_workers", lambda *_: calls.append(1) or [])
    (tmp_path / "file").touch()
    assert precompile(SMALL, "triton", Context(device=torch.device("cuda:0")), tmp_path / "file" / "folder") is not None
    assert calls == [1]


@pytest.mark.parametrize(("products", "device"), [(None, "cuda:0"), ("triton", "cuda:0"), ("quack", "cpu")])
def test_nothing_to_do(products, device, tmp_path: Path):
    assert precompile(SMALL, products, Context(device=torch.device(device)), tmp_path) is None


def test_machines_that_have_other_products_wait_for_each_other(tmp_path: Path, monkeypatch):
    """What one of them has is for it alone to know, so both take part in the message."""
    waited = []

    @contextmanager
    def together(context: Context) -> Iterator[None]:
        waited.append(context)
        yield

    monkeypatch.setattr(module.collectives, "together", together)
    monkeypatch.setattr(module, "_once", lambda *_: 1.0)
    context = Context(device=torch.device("cuda:0"))
    assert [precompile(SMALL, products, context, tmp_path) for products in ("quack", "triton", None)] == [
        1.0,
        None,
        None,
    ]
    assert len(waited) == 3


def test_workers_are_processes_of_their_own(monkeypatch):
    """They belong to no group of processes, and the last line of what one complains about comes back."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(module.__file__).parents[2]) + os.pathsep + os.environ.get("PYTHONPATH", "")
    )
    assert run_workers([[], ["no such task"]], SMALL, "cpu") == ["KeyError: 'no such task'"]
