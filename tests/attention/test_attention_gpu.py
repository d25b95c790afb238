"""Every usable backend on a CUDA device, forward and backward, against the oracle in float64."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from epigram import plugin
from epigram.attention import _flash, reference
from epigram.attention.base import ORACLE, PACKAGE, Request, candidates, usable, within
from epigram.capability import support
from epigram.compiling import compile_shapes
from epigram.model.documents import reach as reach_of
from epigram.run.speed import Work, as_called, cuda_ms, measure_ms

pytestmark = pytest.mark.gpu

# Norm of the error over norm of the exact result. bfloat16 keeps 8 bits, float16 11; sums over keys average the errors
# out. Products in float32 may be done as three in TF32.
RELATIVE = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 1e-4}
HEADS = [(8, 4), (8, 8), (6, 2)]
HEAD_DIM = 64


def request(
    heads=(8, 4), window: int = 0, dtype: torch.dtype = torch.bfloat16, compiles: bool = True, documents: bool = False
) -> Request:
    return Request(
        documents=documents,
        device_type="cuda",
        capability=torch.cuda.get_device_capability(),
        dtype=dtype,
        head_dim=HEAD_DIM,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        window=window,
        compiles=compiles,
    )


def ready(name: str, asked: Request) -> Callable[..., Tensor]:
    """The backend's attend; skips where it is not usable."""
    if reason := usable(asked)[name]:
        pytest.skip(reason)
    attend: Callable[..., Tensor] = plugin.load(PACKAGE, name).attend
    return attend


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Each test compiles a few shapes; all of them together are more than one function may have."""
    torch._dynamo.reset()


def inputs(length: int, heads=(8, 4), dtype: torch.dtype = torch.bfloat16, packed: bool = True) -> list[Tensor]:
    """q, k, v, as views into one (B, T, (H + 2 K) D) tensor or each for itself."""
    generator = torch.Generator("cuda").manual_seed(length)
    h, k = heads
    whole = torch.randn(2, length, (h + 2 * k) * HEAD_DIM, device="cuda", generator=generator).to(dtype)
    parts = whole.unflatten(-1, (-1, HEAD_DIM)).split((h, k, k), dim=2)
    return [(x if packed else x.contiguous()).detach().requires_grad_() for x in parts]


def output_and_gradients(
    attend: Callable[..., Tensor], tensors: list[Tensor], window: int, weights: Tensor | None = None
) -> list[Tensor]:
    """weights: of the output's sum that is differentiated; random ones if not given."""
    out = attend(*tensors, window)
    if weights is None:
        generator = torch.Generator("cuda").manual_seed(1)
        weights = torch.randn(out.shape, device="cuda", generator=generator).to(torch.bfloat16)
    return [out.detach(), *torch.autograd.grad(out, tensors, weights.to(out.dtype))]


def exact_of(tensors: list[Tensor], window: int) -> list[Tensor]:
    return output_and_gradients(reference.attend, [x.detach().double().requires_grad_() for x in tensors], window)


def assert_near(found: list[Tensor], exact: list[Tensor], relative: float) -> None:
    """All of them are compared before one fails: which ones are wrong says where to look."""
    pairs = zip(("out", "dq", "dk", "dv"), found, exact, strict=False)
    errors = {name: float((ours.double() - theirs).norm() / theirs.norm()) for name, ours, theirs in pairs}
    words = {name: f"{error:.2e}" for name, error in errors.items()}
    assert all(error < relative for error in errors.values()), f"relative errors {words}, allowed {relative:.1e}"


def cases() -> Iterator[tuple[str, int, int, tuple[int, int]]]:
    """Backend, length, window, heads. flex compiles each of them for seconds, so it does other heads at one length."""
    for name, length, window, heads in product(plugin.names(PACKAGE), [200, 1000, 1024, 2000], [0, 100, 512], HEADS):
        if name != "flex" or length == 1000 or heads == HEADS[0]:
            yield name, length, window, heads


@pytest.mark.parametrize(("name", "length", "window", "heads"), list(cases()), ids=str)
def test_backend_agrees_with_float64(name: str, length: int, window: int, heads: tuple[int, int]) -> None:
    attend = ready(name, request(heads, window))
    exact = exact_of(inputs(length, heads), window)
    for packed in (True, False) if name != "flex" or length == 1000 else (True,):
        found = output_and_gradients(attend, inputs(length, heads, packed=packed), window)
        assert_near(found, exact, RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("name", plugin.names(PACKAGE))
def test_the_layout_of_the_gradient_does_not_count(name: str, window: int, compiled: bool) -> None:
    """Of the output's gradient, one after the other with the same q, k and v: what a backend keeps must fit all."""
    attend = ready(name, request(window=window))

    def weighted(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        return attend(q, k, v, window) * weights

    function = torch.compile(weighted, dynamic=False) if compiled else weighted
    rows = torch.randn(2, 2000, 8, HEAD_DIM, generator=torch.Generator("cuda").manual_seed(2), device="cuda").bfloat16()
    heads_first = rows[:, :1000].transpose(1, 2).contiguous().transpose(1, 2)
    ones = torch.ones_like(rows[:, :1000].contiguous())
    wide = [x.detach().double().requires_grad_() for x in inputs(1000)]
    for weights in (rows[:, :1000], rows[:, :1000].contiguous(), rows[:, ::2], heads_first, rows[:, :1000]):
        tensors = inputs(1000)
        out, exact = function(*tensors, weights), reference.attend(*wide, window) * weights.double()
        found = [out.detach(), *torch.autograd.grad(out, tensors, ones)]
        expected = [exact.detach(), *torch.autograd.grad(exact, wide, ones.double())]
        assert_near(found, expected, RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("before", [1, 100, 511])
@pytest.mark.parametrize("name", plugin.names(PACKAGE))
def test_queries_that_follow_keys(name: str, before: int) -> None:
    """A chunk of a stream: the last queries alone, all of whose keys are there."""
    asked = replace(request(window=511), longer_keys=True, backward=False)
    attend = ready(name, asked)
    q, k, v = (x.detach() for x in inputs(1200))
    exact = reference.attend(q.double(), k.double(), v.double(), 511)[:, before:]
    assert_near([attend(q[:, before:], k, v, 511)], [exact], RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("name", plugin.names(PACKAGE))
def test_compiled(name: str, window: int) -> None:
    """Traced without a break, with the products before and after that a model has."""
    attend = ready(name, request(window=window))

    def layer(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (-1, HEAD_DIM)).split((8, 4, 4), dim=2)
        return attend(q * 1.5, k, v, window).flatten(2)

    x = torch.randn(2, 1000, 16 * HEAD_DIM, device="cuda").bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    out = torch.compile(layer, fullgraph=True, dynamic=False)(x)
    q, k, v = wide.unflatten(-1, (-1, HEAD_DIM)).split((8, 4, 4), dim=2)
    exact = reference.attend(q * 1.5, k, v, window).flatten(2)
    weights = torch.randn_like(out)
    gradients = [*torch.autograd.grad(out, x, weights), *torch.autograd.grad(exact, wide, weights.double())]
    assert_near([out.detach(), gradients[0]], [exact.detach(), gradients[1]], RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", plugin.names(PACKAGE))
def test_other_precisions(name: str, dtype: torch.dtype, window: int) -> None:
    attend = ready(name, request(window=window, dtype=dtype))
    found = output_and_gradients(attend, inputs(1000, dtype=dtype), window)
    assert_near(found, exact_of(inputs(1000, dtype=dtype), window), RELATIVE[dtype])


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("name", [name for name in plugin.names(PACKAGE) if name != "flex"])
def test_queries_are_the_last_positions_of_the_keys(name: str, window: int) -> None:
    """What generation with a cache needs, uncompiled."""
    attend = ready(name, request(window=window, compiles=False))
    q, k, v = (x.detach() for x in inputs(400))
    full = reference.attend(q.double(), k.double(), v.double(), window)
    for count in (1, 7, 130, 399):
        assert_near([attend(q[:, -count:], k, v, window)], [full[:, -count:]], RELATIVE[torch.bfloat16])


def documents(length: int) -> Tensor:
    """(2, length) int32: documents of a few to some hundred tokens, the first of a row begun before it."""
    draw = torch.Generator().manual_seed(length)
    place, since = torch.arange(length), torch.full((2, 1), -40)
    begins = torch.rand(2, length, generator=draw) < 0.01
    begins[:, 300:310:3] = True
    starts = torch.where(begins, place, since).cummax(dim=1).values
    return (place - starts).int().cuda()


@pytest.mark.parametrize(
    ("name", "length", "window", "heads"), [case for case in cases() if case[1] in (1000, 1024)], ids=str
)
def test_within_documents_it_agrees_with_float64(name: str, length: int, window: int, heads: tuple[int, int]) -> None:
    asked, reach = request(heads, window, documents=True), documents(length)
    attend = ready(name, asked)

    def function(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return within(attend, reach)(q, k, v, window)

    def exactly(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return within(reference.attend, reach)(q, k, v, window)

    exact = output_and_gradients(exactly, [x.detach().double().requires_grad_() for x in inputs(length, heads)], window)
    assert_near(output_and_gradients(function, inputs(length, heads), window), exact, RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("name", [name for name in plugin.names(PACKAGE) if name != ORACLE])
def test_within_documents_compiled(name: str, window: int) -> None:
    """As in a model: what attention is told is computed from the tokens in the same graph, and two layers share it."""
    attend = ready(name, request(window=window, documents=True))

    def layers(x: Tensor, tokens: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        inside = within(attend, reach_of(tokens, 1, None))
        q, k, v = x.unflatten(-1, (-1, HEAD_DIM)).split((8, 4, 4), dim=2)
        return inside(inside(q * 1.5, k, v, window), k, v, 0).flatten(2)

    tokens = (documents(1000) > 0).long() + 1
    x = torch.randn(2, 1000, 16 * HEAD_DIM, device="cuda").bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    out = torch.compile(layers, fullgraph=True, dynamic=False)(x, tokens, attend)
    exact = layers(wide, tokens, reference.attend)
    weights = torch.randn_like(out)
    gradients = [*torch.autograd.grad(out, x, weights), *torch.autograd.grad(exact, wide, weights.double())]
    assert_near([out.detach(), gradients[0]], [exact.detach(), gradients[1]], 2 * RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("before", [1, 100, 511])
@pytest.mark.parametrize("name", [name for name in plugin.names(PACKAGE) if name != "flex"])
def test_within_documents_queries_that_follow_keys(name: str, before: int) -> None:
    """A chunk of a stream whose first document began in the one before, and keys of documents that are over."""
    asked = replace(request(window=511, compiles=False, documents=True), longer_keys=True, backward=False)
    attend, reach = ready(name, asked), documents(1200)
    q, k, v = (x.detach() for x in inputs(1200))
    exact = within(reference.attend, reach)(q.double(), k.double(), v.double(), 511)[:, before:]
    found = within(attend, reach)(q[:, before:], k, v, 511)
    assert_near([found], [exact], RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("backward", [False, True], ids=["score", "train"])
@pytest.mark.parametrize("name", [name for name in plugin.names(PACKAGE) if name != ORACLE])
def test_within_documents_a_graph_replays_any_text(name: str, backward: bool) -> None:
    """What is recorded for one text is right for another: shapes and launches do not follow the documents."""
    attend = ready(name, request(documents=True))
    tensors, reach = inputs(1024), documents(1024)

    def run(reach: Tensor, attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        if backward:
            return output_and_gradients(within(attend, reach), tensors, 0, weights)
        return [within(attend, reach)(*(x.detach() for x in tensors), 0)]

    weights = torch.randn(2, 1024, 8, HEAD_DIM, device="cuda").to(torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles
            run(reach, attend, tensors)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(reach, attend, tensors)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    for other in (documents(1024).flip(0), torch.arange(1024).int().cuda().expand(2, -1), documents(1024)):
        reach.copy_(other)
        graph.replay()
        assert_near(found, run(other, reference.attend, wide), RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("name", ["flash3", "flash4"])
def test_within_more_documents_than_are_searched_one_by_one(name: str, window: int, monkeypatch) -> None:
    """flash4 finds the document of a tile otherwise where a batch may have more than 256, as those of training may."""
    attend, reach = ready(name, request(window=window, documents=True)), (torch.arange(1024).int() % 7).expand(2, -1)
    assert not within(attend, reach.cuda())(*inputs(1024), window)[..., 0].isfinite().any(), "there is no room for them"
    monkeypatch.setattr(_flash, "_SPARE", 400)
    for some in (reach.cuda(), documents(1024)):
        exactly = within(reference.attend, some)
        exact = output_and_gradients(exactly, [x.detach().double().requires_grad_() for x in inputs(1024)], window)
        found = output_and_gradients(within(attend, some), inputs(1024), window)
        assert_near(found, exact, RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("apart", [False, True], ids=["joined", "apart"])
@pytest.mark.parametrize("window", [0, 512])
@pytest.mark.parametrize("backward", [True, False], ids=["train", "score"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("name", [name for name in plugin.names(PACKAGE) if name != ORACLE])
def test_every_candidate_can_be_measured(name: str, compiled: bool, backward: bool, window: int, apart: bool) -> None:
    """None fails on this device that said it could serve, prepared as a run does it."""
    row = support("cuda", torch.cuda.get_device_capability())
    asked = request(window=window, dtype=row.precision, compiles=not compiled, documents=apart)
    asked = replace(asked, compiled=compiled, backward=backward)
    if name not in candidates(asked):
        pytest.skip(usable(asked)[name] or f"{name} is no candidate for {row.device}")
    attend = as_called(plugin.load(PACKAGE, name).attend, asked)
    attend = compile_shapes(attend) if compiled else attend
    work = Work(shapes=((2, 1024), (1, 3000)), backward=backward)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "attention backend .* failed")  # raised with what the library raised
        times_ms = measure_ms({name: attend}, asked, work, torch.device("cuda"), cuda_ms)
    print({name: round(ms, 3) for name, ms in times_ms.items()})
    assert math.isfinite(times_ms[name]) and times_ms[name] > 0
