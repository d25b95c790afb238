"""What "auto" takes on simulated devices, with and without the libraries, by order and by simulated speed."""

import math

import pytest
import torch
from stand_ins import flash_attn_3, flash_attn_4

from epigram import capability, plugin
from epigram.attention import cudnn
from epigram.attention.base import PACKAGE, Choice, Request, candidates, choose, usable
from epigram.errors import UserError

DEVICES = {
    "V100": ("cuda", (7, 0)),
    "T4": ("cuda", (7, 5)),
    "A100": ("cuda", (8, 0)),
    "4090": ("cuda", (8, 9)),
    "H100": ("cuda", (9, 0)),
    "B200": ("cuda", (10, 0)),
    "5090": ("cuda", (12, 0)),
    "MPS": ("mps", None),
    "CPU": ("cpu", None),
}
# For full and for windowed layers: without any library; with flash-attn-4; with FlashAttention 3; uncompiled with both.
EXPECTED = {
    "V100": {"full": ["sdpa"] * 4, "windowed": ["sdpa"] * 4},
    "T4": {"full": ["sdpa"] * 4, "windowed": ["sdpa"] * 4},
    "A100": {"full": ["sdpa cudnn flex"] * 3 + ["sdpa cudnn"], "windowed": ["flex sdpa"] * 3 + ["sdpa"]},
    "4090": {"full": ["sdpa cudnn flex"] * 3 + ["sdpa cudnn"], "windowed": ["flex sdpa"] * 3 + ["sdpa"]},
    "H100": {
        "full": [
            "cudnn sdpa flex",
            "flash4 cudnn sdpa flex",
            "flash3 cudnn sdpa flex",
            "flash4 flash3 cudnn sdpa",
        ],
        "windowed": ["flex sdpa", "flash4 flex sdpa", "flash3 flex sdpa", "flash4 flash3 sdpa"],
    },
    "B200": {
        "full": ["cudnn sdpa flex", "flash4 cudnn sdpa flex", "cudnn sdpa flex", "flash4 cudnn sdpa"],
        "windowed": ["flex sdpa", "flash4 flex sdpa", "flex sdpa", "flash4 sdpa"],
    },
    "5090": {"full": ["sdpa cudnn flex"] * 3 + ["sdpa cudnn"], "windowed": ["flex sdpa"] * 3 + ["sdpa"]},
    "MPS": {"full": ["sdpa"] * 4, "windowed": ["sdpa"] * 4},
    "CPU": {"full": ["sdpa"] * 4, "windowed": ["sdpa"] * 4},
}


def request_for(device: str, window: int = 0, **changes) -> Request:
    device_type, found = DEVICES[device]
    values = dict(dtype=capability.support(device_type, found).precision, head_dim=64, num_heads=8, num_kv_heads=4)
    return Request(
        **{**values, "device_type": device_type, "capability": found, "window": window, "compiled": True, **changes}
    )


pytestmark = pytest.mark.usefixtures("shipped_backends")


@pytest.fixture(autouse=True)
def recent_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)


@pytest.mark.parametrize("kind", ["full", "windowed"])
@pytest.mark.parametrize("device", DEVICES)
def test_candidates_of_each_device(install, device: str, kind: str) -> None:
    window = {"full": 0, "windowed": 512}[kind]
    bare, with_4, with_3, eager = EXPECTED[device][kind]
    assert candidates(request_for(device, window)) == tuple(bare.split())
    install(flash_attn_4())
    assert candidates(request_for(device, window)) == tuple(with_4.split())
    install(flash_attn_3("tuple"))
    assert candidates(request_for(device, window)) == tuple(with_3.split())
    install(flash_attn_4() | flash_attn_3("operators"))
    assert candidates(request_for(device, window, compiled=False)) == tuple(eager.split())
    # In a model that is not compiled a backend may still compile itself, where the table prefers it.
    itself = candidates(request_for(device, window, compiled=False, compiles=True))
    assert itself == tuple(eager.split() if "flash" in eager or not window else bare.split())


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("device", "flash"), [("A100", False), ("4090", False), ("5090", False), ("H100", False),
                                               ("H100", True), ("T4", False), ("CPU", False)])  # fmt: skip
def test_what_compiles_itself_is_tried_where_it_comes_first(install, device: str, flash: bool, documents: bool) -> None:
    """For windows and documents without FlashAttention; never for full attention of whole texts."""
    install(flash_attn_4() if flash else {})
    for window in (0, 512):
        asked = request_for(device, window, documents=documents, compiled=False, compiles=True)
        found, preferred = candidates(asked), candidates(request_for(device, window, documents=documents))
        first = preferred[0] == "flex"
        assert first == ((window > 0 or documents) and not flash and device not in ("T4", "CPU"))
        assert found == tuple(name for name in preferred if first or name != "flex")


def test_without_measuring_the_first_is_taken(install) -> None:
    assert choose("auto", request_for("CPU", 512)).name == "sdpa"
    assert str(choose("auto", request_for("H100"))) == "cudnn"
    assert choose("auto", request_for("H100", 512)).name == "flex"
    assert choose("auto", request_for("T4", 512)).attend is plugin.load(PACKAGE, "sdpa").attend


def simulated(**times_ms: float):
    """A measurement that gives these numbers and notes what it was asked."""
    asked = []

    def measure(attends, request):
        asked.append((tuple(attends), request.window))
        return times_ms

    return measure, asked


def test_the_fastest_is_taken_and_the_line_says_so(install) -> None:
    install(flash_attn_4())
    measure, asked = simulated(flash4=0.71234, cudnn=0.6, sdpa=1.5, flex=12.0)
    chosen = choose("auto", request_for("H100"), measure)
    assert asked == [(("flash4", "cudnn", "sdpa", "flex"), 0)]
    assert str(chosen) == "cudnn (0.6 ms; flash4 0.712, sdpa 1.5, flex 12)"
    assert chosen.attend is cudnn.attend
    measure, asked = simulated(flash4=0.2, flex=0.4, sdpa=0.9)
    assert str(choose("auto", request_for("H100", 512), measure)) == "flash4 (0.2 ms; flex 0.4, sdpa 0.9)"
    assert asked == [(("flash4", "flex", "sdpa"), 512)]


def test_a_named_backend_is_not_measured() -> None:
    def measure(attends, request):
        raise AssertionError("nothing to compare")

    assert str(choose("sdpa", request_for("H100"), measure)) == "sdpa"


def test_one_that_failed_is_named_and_not_taken() -> None:
    measure, _ = simulated(cudnn=math.inf, sdpa=1.5, flex=2.0)
    assert str(choose("auto", request_for("H100"), measure)) == "sdpa (1.5 ms; flex 2, cudnn failed)"
    measure, _ = simulated(cudnn=math.inf, sdpa=math.inf, flex=math.inf)
    with pytest.raises(UserError, match=r"every attention backend failed that was tried here \(cudnn, sdpa, flex\)"):
        choose("auto", request_for("H100"), measure)


def test_another_process_may_have_measured_what_is_missing_here(install) -> None:
    measure, _ = simulated(flash4=0.1, sdpa=1.5)
    with pytest.raises(UserError, match="flash4' needs flash-attn-4"):
        choose("auto", request_for("H100"), measure)
    with pytest.raises(UserError, match="'cudnn' cannot be used here: .* 7.5"):
        choose("auto", request_for("T4"), simulated(cudnn=0.1)[0])


def test_a_choice_says_why_not() -> None:
    with pytest.raises(UserError, match="for CUDA devices"):
        choose("flex", request_for("CPU", 512))
    with pytest.raises(UserError, match="choose one of cudnn, flash3, flash4"):
        choose("nonsense", request_for("CPU"))
    reasons = usable(request_for("CPU"))
    assert "CUDA" in reasons["flex"] and reasons["sdpa"] is reasons["reference"] is None


@pytest.mark.parametrize("name", ["flash3", "flash4"])
def test_no_library_is_advised_where_its_backend_cannot_serve(install, name: str) -> None:
    """Without the library, of which `install` leaves none, the device comes first; where it would help, the library."""
    for device, words in (
        ("CPU", "CPUs"),
        ("MPS", "Apple GPUs"),
        ("A100", "Ampere data-center"),
        ("5090", "Blackwell"),
    ):
        with pytest.raises(
            UserError,
            match=rf"attention = '{name}' cannot be used here: {name} is not for {words}.*, only for .*Hopper",
        ) as found:
            choose(name, request_for(device))
        assert "install" not in str(found.value) and "build it" not in str(found.value)
        assert f"{name} is not for {words}" in usable(request_for(device))[name]
    with pytest.raises(UserError, match=f"'{name}' needs [fF]lash.*: (pip install|build it)"):
        choose(name, request_for("H100"))
    assert "needs" in usable(request_for("H100"))[name]


def test_a_backend_that_somebody_adds_is_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """One new file in the folder; the table does not know it, so it comes last."""
    names, load = plugin.names, plugin.load
    monkeypatch.setattr(plugin, "names", lambda package: [*names(package), "added"])
    monkeypatch.setattr(plugin, "load", lambda package, name: load(package, "sdpa" if name == "added" else name))
    assert candidates(request_for("A100")) == ("sdpa", "cudnn", "flex", "added")


def test_a_library_is_not_loaded_for_a_device_that_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], plugin.load
    monkeypatch.setattr(plugin, "load", lambda package, name: loaded.append(name) or load(package, name))
    assert choose("auto", request_for("CPU", 512)).name == "sdpa"
    assert set(loaded) == {"sdpa"}


def test_without_any_backend_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epigram.attention.base.why_not", lambda name, request: f"{name} is ill")
    with pytest.raises(UserError, match="sdpa: sdpa is ill; cudnn: cudnn is ill"):
        candidates(request_for("A100"))


def test_check_of_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cudnn.check(request_for("A100")) is None
    assert "no windows" in cudnn.check(request_for("H100", 512))
    assert "7.5" in cudnn.check(request_for("T4"))
    assert "float32" in cudnn.check(request_for("H100", dtype=torch.float32))
    assert "not 256" in cudnn.check(request_for("H100", head_dim=256))
    assert "CUDA" in cudnn.check(request_for("MPS"))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert "has 91002" in cudnn.check(request_for("H100"))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert "has none" in cudnn.check(request_for("H100"))


@pytest.mark.parametrize("kind", ["full", "windowed"])
def test_documents_are_kept_apart_by_those_that_can(install, kind: str) -> None:
    """cuDNN cannot; what skips most of the rest comes first for all layers."""
    window = {"full": 0, "windowed": 512}[kind]
    asked = request_for("H100", window, documents=True)
    assert candidates(asked) == ("flex", "sdpa")
    assert candidates(request_for("H100", window, documents=True, compiled=False)) == ("sdpa",)
    install(flash_attn_4())
    assert candidates(asked) == ("flash4", "flex", "sdpa")
    install(flash_attn_3("tuple"))
    assert candidates(asked) == ("flash3", "flex", "sdpa")
    assert candidates(request_for("CPU", window, documents=True)) == ("sdpa",)
    with pytest.raises(UserError, match="'cudnn' cannot be used here: cudnn cannot keep documents apart"):
        choose("cudnn", request_for("H100", documents=True))


def test_the_line_of_a_choice() -> None:
    def attend(q, k, v, window):
        return q

    assert str(Choice(name="sdpa", attend=attend)) == "sdpa"
    assert str(Choice(name="sdpa", attend=attend, times_ms={"sdpa": 3.14159})) == "sdpa (3.14 ms)"
