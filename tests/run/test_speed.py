"""Measuring attention backends: what is timed, what counts, and what a failure does; timings are simulated."""

import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from run_helpers import short

from epigram import capability
from epigram.attention import reference, sdpa
from epigram.attention.base import Request
from epigram.config import load_recipe
from epigram.dist.context import Context
from epigram.errors import UserError
from epigram.model.gpt import GPT
from epigram.run import choices, speed
from epigram.run.speed import Work, agreed_ms, measure_ms, scoring_work, training_work

REQUEST = Request(
    device_type="cpu", capability=None, dtype=torch.float32, head_dim=8, num_heads=4, num_kv_heads=2, window=3
)
CPU = torch.device("cpu")


def watched(attend, seen: list):
    """Notes the shapes and the window of each call, and the gradients' norms."""

    def call(q, k, v, window):
        seen.append((tuple(q.shape), tuple(k.shape), window, q.dtype, q.requires_grad and torch.is_grad_enabled()))
        return attend(q, k, v, window)

    return call


def test_the_work_of_a_recipe() -> None:
    work = training_work(load_recipe("pr1212"))
    assert sorted(work.shapes) == [(10, 6144)] * 3 + [(36, 2048)] * 5 and work.backward
    split = training_work(load_recipe("pr1212"), 16_384)
    assert sorted(split.shapes) == [(2, 6144)] * 15 + [(6, 2048)] * 30, "the same tokens"
    assert scoring_work(1024, 65_536) == Work(shapes=((64, 1024),), backward=False)
    assert scoring_work(1024, 100).shapes == ((1, 1024),)


@pytest.mark.parametrize("backward", [True, False])
def test_each_backend_does_the_work_once_for_each_length(backward: bool) -> None:
    seen: list = []
    times = iter([10.0, 40.0, 1.0, 7.0])

    def time_step(step) -> float:
        step()
        return next(times)

    work = Work(shapes=((2, 16), (1, 32), (2, 16)), backward=backward)
    attends = {"sdpa": watched(sdpa.attend, seen), "reference": watched(reference.attend, seen)}
    before = torch.random.get_rng_state()
    found = measure_ms(attends, REQUEST, work, CPU, time_step)
    assert found == {"sdpa": (2 * 10 + 40) / 3, "reference": (2 * 1 + 7) / 3}, "the mean over the lanes"
    shapes = [
        ((2, 16, 4, 8), (2, 16, 2, 8), 3, torch.float32, backward),
        ((1, 32, 4, 8), (1, 32, 2, 8), 3, torch.float32, backward),
    ]
    assert seen == shapes * 2
    assert torch.equal(before, torch.random.get_rng_state()), "the random numbers of the run are as before"


def test_the_step_computes_all_gradients() -> None:
    reached = []

    def attend(q, k, v, window):
        for x in (q, k, v):
            x.register_hook(lambda grad: reached.append(grad.abs().sum().item() > 0))
        return sdpa.attend(q, k, v, window)

    measure_ms({"sdpa": attend}, REQUEST, Work(shapes=((1, 8),), backward=True), CPU, lambda step: step() or 1.0)
    assert reached == [True] * 3


def test_a_failure_is_a_warning_and_takes_forever() -> None:
    def broken(q, k, v, window):
        raise RuntimeError("no kernel image is available")

    work = Work(shapes=((1, 8),), backward=False)
    with pytest.warns(UserWarning, match="backend flex failed when it was measured: .*no kernel image"):
        found = measure_ms({"flex": broken, "sdpa": sdpa.attend}, REQUEST, work, CPU, lambda step: step() or 2.0)
    assert found == {"flex": math.inf, "sdpa": 2.0}


def test_alone_the_numbers_are_ones_own_and_the_compiler_comes_first() -> None:
    prepared = []

    def prepare(attend):
        prepared.append(attend)
        return attend

    work = Work(shapes=((1, 8),), backward=True)
    found = agreed_ms(
        Context(), work, {"sdpa": sdpa.attend}, REQUEST, prepare=prepare, time_step=lambda step: step() or 0.25
    )
    assert (found, prepared) == ({"sdpa": 0.25}, [sdpa.attend])


@pytest.mark.parametrize("replayed", [True, False])
def test_what_a_graph_launches_is_timed_without_the_host(replayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "cuda_ms", lambda step: 0.75)
    monkeypatch.setattr(speed, "device_ms", lambda step: 0.5)
    work = Work(shapes=((1, 8),), backward=True, replayed=replayed)
    assert agreed_ms(Context(), work, {"sdpa": sdpa.attend}, REQUEST) == {"sdpa": 0.5 if replayed else 0.75}


def test_the_device_waits_until_a_row_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated device: a step takes the host 3 ms and the device 1 ms."""
    clock = {"host": 0.0, "device": 0.0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.ms = 0.0

        def record(self) -> None:
            clock["device"] = self.ms = max(clock["device"], clock["host"])

        def synchronize(self) -> None:
            clock["host"] = max(clock.values())

        def elapsed_time(self, end: "Event") -> float:
            return end.ms - self.ms

    def step() -> None:
        clock["host"] += 3
        clock["device"] = max(clock.values()) + 1

    def sleep(cycles: int) -> None:
        clock["device"] = max(clock.values()) + 1000 * cycles / 2e9

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.update(host=max(clock.values())))
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock["host"] / 1000)
    assert speed.cuda_ms(step) > 2.5
    assert speed.device_ms(step) == pytest.approx(1)


def test_fused_kernels_repeat_keys_and_values_in_training() -> None:
    """Where a backend wants as many of them as queries; so it is timed with as many."""
    heads: list[int] = []

    def attend(q, k, v, window):
        heads.append(k.shape[2])
        return sdpa.attend(q, k, v, window)

    for wants in (False, True):
        attend.equal_heads = wants
        for fused in (False, True):
            for backward in (False, True):
                work = Work(shapes=((1, 8),), backward=backward, fused=fused)
                measure_ms({"sdpa": attend}, REQUEST, work, CPU, lambda step: step() or 1.0)
    assert heads == [2] * 7 + [4]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The context of a process on an H100, as far as a choice looks at it."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    return SimpleNamespace(
        device=torch.device("cuda"),
        capability=(9, 0),
        rank=0,
        world_size=1,
        has_peers=False,
        is_main=True,
        synchronize=lambda: None,
    )


def test_a_session_prints_what_it_measured(hopper, shipped_backends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated timings, by backend and window, through the function that every run calls."""
    times = {("cudnn", 0): 0.5, ("sdpa", 0): 0.75, ("flex", 0): 1.0, ("flex", 512): 0.3, ("sdpa", 512): 2.0}

    def simulated(attends, request, work, device, time_step):
        assert work == training_work(config) and request.backward and request.compiled
        return {name: times[name, request.window] for name in attends}

    monkeypatch.setattr(speed, "measure_ms", simulated)
    config = load_recipe("pr1212", ["model.window=512"])
    with torch.device("meta"):
        model = GPT(config.model)
    model.compute_dtype, words = choices.pick_precision("auto", hopper)
    assert words == {"device": "NVIDIA H100", "precision": "bfloat16"}
    paths = choices.attach_attention(model, "auto", hopper, compiled=True, work=training_work(config))
    assert paths == {
        "attention": "cudnn (0.5 ms; sdpa 0.75, flex 1)",
        "attention of windowed layers": "flex (0.3 ms; sdpa 2)",
    }
    assert model.attend.__module__ == "epigram.attention.cudnn"
    assert model.attend_window.__module__ == "epigram.attention.flex"


@pytest.mark.parametrize("documents", ["joined", "isolated"])
@pytest.mark.parametrize("compile_", ["auto", "off", "on"])
def test_beside_fused_kernels_flex_compiles_itself(
    hopper, shipped_backends, monkeypatch: pytest.MonkeyPatch, compile_: str, documents: str
) -> None:
    """On an A100, which has no FlashAttention library that we know: else windows and documents were masks of sdpa."""
    hopper.capability = (8, 0)
    monkeypatch.setattr(capability, "triton_installed", lambda: True)
    monkeypatch.setattr(choices, "compiler_available", lambda: True)
    monkeypatch.setattr(speed, "measure_ms", lambda attends, *_: dict.fromkeys(attends, 1.0))
    config = load_recipe("pr1212", ["model.window=512", f'model.documents="{documents}"'])
    with torch.device("meta"):
        model = GPT(config.model)
    model.compute_dtype = torch.bfloat16
    compiled, words = choices.attach_kernels(model, "auto", compile_, hopper)
    assert compiled == (words["kernels"] == "plain") == (compile_ == "on")
    paths = choices.attach_attention(model, "auto", hopper, compiled, training_work(config), compile_)
    full = {"joined": ["sdpa", "cudnn", *(["flex"] if compiled else [])], "isolated": ["flex", "sdpa"]}[documents]
    for kind, names in (("attention", full), ("attention of windowed layers", ["flex", "sdpa"])):
        able = [name for name in names if name != "flex" or compile_ != "off"]
        assert sorted(re.findall(r"[a-z]{4,}", paths[kind])) == sorted(able), paths[kind]
    with choices.attention_for_eager(model, hopper):  # any shapes: what compiles itself would do so again and again
        assert model.attend_window is sdpa.attend
    assert choices.stream_attention(model, "auto", hopper)[1] == "sdpa"


def test_what_is_eager_or_named_is_not_measured(hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_ms", lambda *args: pytest.fail("measured"))
    config = short()
    model = GPT(config.model)
    model.compute_dtype = torch.bfloat16
    with choices.attention_for_eager(model, hopper):
        assert model.attend.__module__ in ("epigram.attention.cudnn", "epigram.attention.flash4")
    work = training_work(config)
    assert choices.attach_attention(model, "sdpa", hopper, compiled=True, work=work)["attention"] == "sdpa"
    paths = choices.attach_attention(model, "auto", Context(), compiled=True, work=work)
    assert paths["attention"] == "sdpa", "on a CPU the table decides"


@pytest.mark.parametrize(
    ("device", "capability", "triton", "reason"),
    [
        ("mps", None, True, "prototype"),
        ("cuda", (9, 0), False, "needs Triton"),
        ("cuda", (6, 1), True, "7.0 and later"),
    ],
)
def test_compiling_in_vain_says_why(monkeypatch, device, capability, triton, reason) -> None:
    monkeypatch.setattr("epigram.capability.triton_installed", lambda: triton)
    context = SimpleNamespace(device=torch.device(device), capability=capability)
    assert choices.should_compile("auto", context) is False
    assert choices.should_compile("off", context) is False
    with pytest.raises(UserError, match=reason):
        choices.should_compile("on", context)


def test_compiling_where_it_works(monkeypatch) -> None:
    monkeypatch.setattr("epigram.capability.triton_installed", lambda: True)
    monkeypatch.setattr(choices, "compiler_available", lambda: True)
    for context in (Context(), SimpleNamespace(device=torch.device("cuda"), capability=(7, 5))):
        assert choices.should_compile("auto", context) and choices.should_compile("on", context)
    monkeypatch.setattr(choices, "compiler_available", lambda: False)
    assert not choices.should_compile("auto", Context())
    with pytest.raises(UserError, match="install g\\+\\+ and python3-dev"):
        choices.should_compile("on", Context())


def test_no_warning_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure_ms(
            {"sdpa": sdpa.attend}, REQUEST, Work(shapes=((1, 8),), backward=True), CPU, lambda step: step() or 1.0
        )
