"""The wrappers of the FlashAttention libraries, over stand-ins that take their arguments at their word."""

import os
import stat
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from golden_model import CONFIG
from stand_ins import CALLS, flash_attn_3, flash_attn_4

from epigram import plugin
from epigram.attention import _flash, _flash4_cache, reference
from epigram.attention.base import PACKAGE, Request, within
from epigram.errors import UserError
from epigram.evaluation.scorer import token_nlls
from epigram.evaluation.windows import Method
from epigram.model.gpt import GPT
from epigram.user_cache import user_cache

LIBRARIES = {
    "flash4": ("flash4", flash_attn_4),
    "flash3, windows as pairs": ("flash3", lambda: flash_attn_3("tuple")),
    "flash3, as operators": ("flash3", lambda: flash_attn_3("operators")),
}
WINDOWS = [0, 5, 16, 500]


@pytest.fixture(params=LIBRARIES, ids=list(LIBRARIES))
def backend(request, install) -> ModuleType:
    name, library = LIBRARIES[request.param]
    install(library())
    return plugin.load(PACKAGE, name)


def packed(heads=(4, 2, 2), length=37, head_dim=8, dtype=torch.float64) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One (B, T, (H + 2 K) D) tensor, and q, k, v as views into it."""
    generator = torch.Generator().manual_seed(length)
    whole = torch.randn(2, length, sum(heads) * head_dim, generator=generator, dtype=dtype)
    return whole, views(whole, heads, head_dim)


def views(whole: torch.Tensor, heads=(4, 2, 2), head_dim=8) -> list[torch.Tensor]:
    return list(whole.unflatten(-1, (sum(heads), head_dim)).split(heads, dim=2))


def gradients(attend, q, k, v, window) -> list[torch.Tensor]:
    """The output and the gradients."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs, window)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 4, 4), (6, 2, 2)])
@pytest.mark.parametrize("window", WINDOWS)
def test_agrees_with_the_reference(backend, window, heads):
    q, k, v = packed(heads)[1]
    for found, exact in zip(
        gradients(backend.attend, q, k, v, window), gradients(reference.attend, q, k, v, window), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)  # the denominators are float32


@pytest.mark.parametrize("window", [0, 5])
def test_queries_are_the_last_positions_of_the_keys(backend, window):
    q, k, v = packed()[1]
    torch.testing.assert_close(backend.attend(q[:, -3:], k, v, window), reference.attend(q, k, v, window)[:, -3:])


def reach_of(*rows: list[int]) -> torch.Tensor:
    """Rows of documents of these lengths, the first of which began so many tokens before the row."""
    return torch.tensor(
        [[*range(before, before + first), *(t for n in others for t in range(n))] for before, first, *others in rows],
        dtype=torch.int32,
    )


DOCUMENTS = reach_of([0, 37], [0, 10, 1, 1, 25])
BEGUN = reach_of([50, 2, 20, 15], [3, 30, 7])


@pytest.mark.parametrize("reach", [DOCUMENTS, BEGUN], ids=["whole", "begun"])
@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 4, 4)])
@pytest.mark.parametrize("window", WINDOWS)
def test_within_documents_it_agrees_with_the_reference(backend, window, heads, reach):
    q, k, v = packed(heads)[1]
    found, exact = (gradients(x.attend.within(reach), q, k, v, window) for x in (backend, reference))
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 20, 36])
@pytest.mark.parametrize("window", [0, 5])
def test_within_documents_queries_are_the_last_positions_of_the_keys(backend, window, count):
    """Keys of earlier documents, or of none that can be seen, lie before the first query's."""
    q, k, v = packed()[1]
    for reach in (DOCUMENTS, BEGUN):
        exact = reference.attend.within(reach)(q, k, v, window)[:, -count:]
        torch.testing.assert_close(backend.attend.within(reach)(q[:, -count:], k, v, window), exact)


def test_a_batch_with_too_many_documents_is_not_a_number(backend, monkeypatch):
    """Shapes cannot follow the text, so there is a bound; beyond it no wrong number may come out."""
    monkeypatch.setattr(_flash, "_SPARE", 4)
    q, k, v = packed()[1]
    for count, is_fine in ((4, True), (5, False)):  # besides those that begin rows
        reach = reach_of([0, 37], [0, 37 - count, *[1] * count])
        out = backend.attend.within(reach)(q, k, v, 0)
        assert bool(out.isfinite().all()) == is_fine
        assert is_fine or bool(out[..., 0].isnan().all())


def test_a_score_of_too_many_documents_says_what_to_do(backend):
    model = GPT(replace(CONFIG, documents="isolated", bos_id=1)).requires_grad_(False)
    model.initialize(0)
    model.attend = model.attend_window = backend.attend
    method = Method(name="blocks", seq_len=160, stride=160)
    tokens = np.where(np.arange(161) % 2, 1, 5).astype(np.uint16)
    with pytest.raises(UserError, match="FlashAttention has room for .* lower batch_tokens"):
        token_nlls(model.nll, tokens, method, device=torch.device("cpu"), batch_tokens=160)
    tokens[1::4] = 5
    assert token_nlls(model.nll, tokens, method, device=torch.device("cpu"), batch_tokens=160).min() > 0


def test_layers_share_the_segments(backend, monkeypatch):
    made, whole = [], _flash.segments
    monkeypatch.setattr(_flash, "segments", lambda *arguments: made.append(1) or whole(*arguments))
    q, k, v = packed()[1]
    attend = backend.attend.within(DOCUMENTS)
    for window in (0, 5, 0):
        attend(q, k, v, window)
    assert len(made) == 1
    assert getattr(attend, "equal_heads", False) == getattr(backend.attend, "equal_heads", False)


def test_views_are_passed_on_without_a_copy(backend):
    _, (q, k, v) = packed()
    gradients(backend.attend, q, k, v, 5)
    forward, backward = CALLS
    assert forward.pointers == backward.pointers[:3] == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    assert forward.strides == backward.strides == q.stride()


@pytest.mark.parametrize("spoil", ["last dimension", "rows", "start"])
def test_what_a_kernel_cannot_take_is_copied(backend, spoil):
    """Strides in the last dimension, rows or a start that are not aligned; the stand-ins refuse them."""
    q, k, v = (x.contiguous() for x in packed()[1])
    wide = torch.zeros(2, 37, 4, 17, dtype=torch.float64)
    view = {
        "last dimension": wide[..., :16:2],
        "rows": wide[..., :8],
        "start": wide.flatten()[1 : 1 + q.numel()].view(q.shape),
    }[spoil]
    view.copy_(q)
    torch.testing.assert_close(gradients(backend.attend, view, k, v, 0), gradients(backend.attend, q, k, v, 0))


@pytest.mark.parametrize("apart", [False, True])
def test_the_compiler_traces_through(backend, apart):
    """No graph break."""

    def function(x):
        return within(backend.attend, DOCUMENTS if apart else None)(*views(x), 5)

    results = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)):
        whole = packed()[0].requires_grad_()
        out = run(whole * 2)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append((out.detach(), whole.grad))
    torch.testing.assert_close(results[1], results[0])


def test_fake_implementations_are_right(backend):
    """Shapes, strides, dtypes, registered gradients and what is mutated, by torch's own checker."""
    name = backend.__name__.rsplit(".", 1)[-1]
    forward, backward = (getattr(torch.ops.epigram, f"{name}_{way}") for way in ("forward", "backward"))
    inputs = [x.detach().requires_grad_() for x in packed()[1]]
    for starts in ((None, None, None), _flash.segments(DOCUMENTS, 37)):
        torch.library.opcheck(forward, (*inputs, 5, *starts))
        q, k, v = (x.detach() for x in inputs)
        out, lse = forward(q, k, v, 5, *starts)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(backward, (q, k, v, out, lse, out, 5, *starts[:2]), test_utils=tests)


def request_of(capability=(9, 0), **changes) -> Request:
    values = dict(device_type="cuda", capability=capability, dtype=torch.bfloat16, head_dim=64, num_heads=8)
    return Request(**{**values, "num_kv_heads": 4, "window": 512, "compiled": True, **changes})


def test_check_of_flash4(install):
    install(flash_attn_4())
    check = plugin.load(PACKAGE, "flash4").check
    assert check(request_of()) is None and check(request_of((10, 0))) is None
    assert "8.9" in check(request_of((8, 9))) and "12.0" in check(request_of((12, 0)))
    assert "float32" in check(request_of(dtype=torch.float32))
    assert "not 100" in check(request_of(head_dim=100)) and "not 192" in check(request_of(head_dim=192))
    assert "CUDA" in check(request_of(None, device_type="cpu"))


def test_check_of_flash3(install):
    install(flash_attn_3("tuple"))
    check = plugin.load(PACKAGE, "flash3").check
    assert check(request_of()) is None and check(request_of(head_dim=192)) is None
    assert "8.9" in check(request_of((8, 9))) and "10.0" in check(request_of((10, 0)))
    assert "float32" in check(request_of(dtype=torch.float32))
    assert "not 100" in check(request_of(head_dim=100))
    assert "CUDA" in check(request_of(None, device_type="mps"))


def test_check_says_what_flash3_was_built_without(install):
    config = ModuleType("flash_attn_config")
    names = ("BACKWARD", "LOCAL", "FP16", "HDIM64")
    config.CONFIG = {"build_flags": {f"FLASHATTENTION_DISABLE_{name}": name != "HDIM64" for name in names}}
    install(flash_attn_3("operators") | {"flash_attn_config": config})
    check = plugin.load(PACKAGE, "flash3").check
    assert check(request_of()).endswith("built without gradients and windows")
    assert check(request_of(window=0, backward=False)) is None
    assert check(request_of(window=0, backward=False, dtype=torch.float16)).endswith("built without float16")
    config.CONFIG = {"build_flags": {"FLASHATTENTION_DISABLE_VARLEN": True}}
    install(flash_attn_3("operators") | {"flash_attn_config": config})
    check = plugin.load(PACKAGE, "flash3").check
    assert check(request_of()) is None
    assert check(request_of(documents=True)).endswith("built without sequences of different lengths")


def test_check_says_what_an_old_flash3_lacks(install):
    install(flash_attn_3("beta"))
    assert "a _flash_attn_forward without num_splits" in plugin.load(PACKAGE, "flash3").check(request_of())
    install({"flash_attn_interface": ModuleType("flash_attn_interface")})
    assert "no _flash_attn_forward" in plugin.load(PACKAGE, "flash3").check(request_of())


@pytest.mark.parametrize(("name", "advice"), [("flash4", "pip install 'epigram[flash4]'"), ("flash3", "folder hopper")])
def test_a_missing_library_says_how_to_get_it(install, name, advice):
    with pytest.raises(UserError, match="there is no module flash_attn") as error:
        plugin.load(PACKAGE, name)
    assert advice in str(error.value)


def test_a_broken_library_is_an_error_of_the_user(install, monkeypatch):
    """One that was built for another torch, say."""

    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "flash_attn_interface":
                raise ImportError("flash_attn_3/_C.so: undefined symbol", name="flash_attn_3._C")

    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    with pytest.raises(UserError, match=r"does not load \(flash_attn_3/_C.so: undefined symbol\)"):
        plugin.load(PACKAGE, "flash3")


ENABLED, FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


@pytest.fixture
def hopper(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_kernels_are_kept_in_a_private_folder(hopper, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    _flash4_cache.enable(environment)
    folder = tmp_path / "epigram" / "flash4" / "sm90"
    assert environment == {"XDG_CACHE_HOME": str(tmp_path), ENABLED: "1", FOLDER: str(folder)}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert user_cache({"XDG_CACHE_HOME": "relative"}) == user_cache({})
    assert str(user_cache({})).startswith(os.path.expanduser("~"))


@pytest.mark.parametrize("own", [{ENABLED: "0"}, {FOLDER: "/somewhere"}])
def test_what_the_user_set_counts(hopper, tmp_path, own):
    environment = {"XDG_CACHE_HOME": str(tmp_path), **own}
    _flash4_cache.enable(environment)
    assert environment == {"XDG_CACHE_HOME": str(tmp_path), **own}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_safe_is_not_used(hopper, tmp_path, monkeypatch):
    folder = tmp_path / "epigram" / "flash4" / "sm90"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert _flash4_cache.why_not_safe(folder) == "others may write there"
    folder.chmod(0o700)
    assert _flash4_cache.why_not_safe(folder) is None
    (tmp_path / "file").touch()
    assert "cannot be written" in _flash4_cache.why_not_safe(tmp_path / "file")

    def refuse(descriptor, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert _flash4_cache.why_not_safe(folder) == "it has no locks (No locks available)"
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    _flash4_cache.enable(environment)
    assert environment == {"XDG_CACHE_HOME": str(tmp_path)}


def test_the_cache_is_set_before_the_library_is_imported(hopper, install, tmp_path, monkeypatch):
    """The library reads the environment when it is imported."""
    seen = []

    class Watch:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "flash_attn":
                seen.append(os.environ.get(ENABLED))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (ENABLED, FOLDER):  # setenv first, so that they are gone again afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Watch, *sys.meta_path])
    with pytest.raises(UserError):
        plugin.load(PACKAGE, "flash4")
    assert seen == ["1"]
