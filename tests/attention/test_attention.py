"""Every backend of the folder against the oracle, forward and backward; the closed-form tile map."""

import math
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from epigram import plugin
from epigram.attention import cudnn, flex, reference, sdpa
from epigram.attention.base import PACKAGE, Request, band_mask, usable

SHAPES = [(2, 33, 4, 2, 16), (1, 130, 4, 4, 16), (2, 257, 6, 2, 32)]  # B, T, H, K, D; no multiple of a tile
WINDOWS = [0, 1, 16, 100, 500]
FLOAT32_RELATIVE = 1e-6  # float32 keeps 24 bits; the sums over at most 257 keys average the errors out


def request(window: int, device_type: str = "cpu", **changes) -> Request:
    values = dict(compiled=True, capability=None, dtype=torch.float32, head_dim=16, num_heads=4, num_kv_heads=2)
    return Request(device_type=device_type, window=window, **(values | changes))


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, packed: bool = False) -> list[torch.Tensor]:
    """q, k, v; packed: as views into one (B, T, (H + 2 K) D) tensor."""
    b, t, h, k, d = shape
    generator = torch.Generator().manual_seed(t)
    whole = torch.randn(b, t, h + 2 * k, d, generator=generator, dtype=dtype)
    parts = whole.split((h, k, k), dim=2)
    return [(x if packed else x.contiguous()).requires_grad_() for x in map(torch.Tensor.detach, parts)]


def dense_loop(q, k, v, window: int) -> torch.Tensor:
    """One query at a time."""
    out = torch.empty_like(q)
    groups = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            first = max(0, t - window) if window else 0
            for h in range(q.shape[2]):
                keys, values = k[b, first : t + 1, h // groups], v[b, first : t + 1, h // groups]
                out[b, t, h] = torch.softmax(keys @ q[b, t, h] / q.shape[3] ** 0.5, 0) @ values
    return out


@pytest.mark.parametrize("window", [0, 1, 7, 40])
def test_reference_is_the_definition(window: int) -> None:
    q, k, v = (x.detach() for x in inputs(SHAPES[0]))
    torch.testing.assert_close(reference.attend(q, k, v, window), dense_loop(q, k, v, window))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", plugin.names(PACKAGE))
def test_backends_agree_with_the_reference(name: str, shape: tuple[int, ...], window: int) -> None:
    _, _, h, k, d = shape
    if reason := usable(request(window, head_dim=d, num_heads=h, num_kv_heads=k))[name]:
        pytest.skip(reason)
    attend = plugin.load(PACKAGE, name).attend
    expected = output_and_gradients(reference.attend, inputs(shape), window)
    for packed in (False, True):
        found = output_and_gradients(attend, inputs(shape, packed=packed), window)
        torch.testing.assert_close(found, expected)
    found = output_and_gradients(attend, inputs(shape, torch.float32), window)
    exact = output_and_gradients(
        reference.attend, [x.detach().double().requires_grad_() for x in inputs(shape, torch.float32)], window
    )
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= FLOAT32_RELATIVE * theirs.norm()


@pytest.mark.parametrize(("before", "window"), [(0, 0), (0, 9), (0, 32), (0, 33), (7, 39), (32, 16)])
def test_cudnn_leaves_to_sdpa_what_only_generation_has(
    before: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache gives every layer a window, which is its length; a text may be longer."""
    monkeypatch.setattr(cudnn, "sdpa_kernel", lambda backend: nullcontext())
    q, k, v = (x.detach() for x in inputs(SHAPES[0]))
    found = cudnn.attend(q[:, before:], k, v, window)
    torch.testing.assert_close(found, reference.attend(q, k, v, window)[:, before:])


def documents(batch: int, length: int, seed: int = 0, before: int = 5) -> torch.Tensor:
    """(B, T) int32: how far back the document of each position goes; the first one of a row was begun `before`."""
    draw = torch.Generator().manual_seed(seed)
    reach = torch.empty(batch, length, dtype=torch.int32)
    for row in reach:
        since = before
        for t in range(length):
            since = 0 if float(torch.rand((), generator=draw)) < 0.06 else since + 1
            row[t] = since
    return reach


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["reference", "sdpa", "flex"])
def test_within_documents_each_is_alone(name: str, shape: tuple[int, ...], window: int) -> None:
    """A document forwarded alone gives the same outputs and gradients.

    flex has no backward on a CPU, and computes by its mask there, not by its tile map.
    """
    attend = plugin.load(PACKAGE, name).attend
    tensors = inputs(shape)
    reach = documents(shape[0], shape[1])
    if name == "flex":
        found = [attend.within(reach)(*(x.detach() for x in tensors), window)]
    else:
        found = output_and_gradients(attend.within(reach), tensors, window)
    weights = torch.randn(tensors[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for row in range(shape[0]):
        starts = sorted({0, *torch.nonzero(reach[row] == 0).flatten().tolist(), shape[1]})
        for first, end in pairwise(starts):
            parts = [x[row : row + 1, first:end].detach().requires_grad_() for x in tensors]
            out = reference.attend(*parts, window)
            alone = [out.detach(), *torch.autograd.grad(out, parts, weights[row : row + 1, first:end])]
            torch.testing.assert_close([x[row : row + 1, first:end] for x in found], alone[: len(found)])


@pytest.mark.parametrize("name", ["sdpa", "flex"])
@pytest.mark.parametrize("window", [0, 1, 5, 31, 32, 40])
def test_within_documents_queries_are_the_last_positions(name: str, window: int) -> None:
    """With keys of before, as a cache hands them over, and where only the last positions are asked for."""
    q, k, v = (x.detach() for x in inputs(SHAPES[0]))
    attend = plugin.load(PACKAGE, name).attend
    reach = documents(2, 33)
    full = reference.attend.within(reach)(q, k, v, window)
    for count in (1, 2, 20, 27, 32, 33):
        for some in (reach, reach[:, -count:]):
            torch.testing.assert_close(attend.within(some)(q[:, -count:], k, v, window), full[:, -count:])


def output_and_gradients(attend, tensors: list[torch.Tensor], window: int) -> list[torch.Tensor]:
    out = attend(*tensors, window)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, tensors, weights.to(out.dtype))]


STRIDES: list[tuple[int, ...]] = []
"""Of the gradients that came to `watched_output`. It and its backward are operators: the compiler would trace through
anything else, and note nothing."""


@torch.library.custom_op("epigram_tests::watched_output", mutates_args=())
def watched_output(out: torch.Tensor) -> torch.Tensor:
    return out.clone()


@torch.library.custom_op("epigram_tests::watched_gradient", mutates_args=())
def watched_gradient(grad: torch.Tensor) -> torch.Tensor:
    STRIDES.append(grad.stride())
    return grad.clone()


watched_output.register_fake(torch.empty_like)
watched_gradient.register_fake(torch.empty_like)
watched_output.register_autograd(lambda ctx, grad: watched_gradient(grad))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("name", "window"), [("sdpa", 0), ("cudnn", 0), ("sdpa", 16)])
def test_the_kernel_gets_gradients_of_one_layout(name: str, window: int, batch: int, traced: bool, monkeypatch) -> None:
    """Whatever follows attention: plans of cuDNN's backward are kept for one."""
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False) -> torch.Tensor:
        out = kernel(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
        return out if attn_mask is not None else watched_output(out)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(cudnn, "sdpa_kernel", lambda backend: nullcontext())
    attend = plugin.load(PACKAGE, name).attend

    def weighted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (attend(q, k, v, window) * weights).sum()

    function = torch.compile(weighted, backend="aot_eager", dynamic=False) if traced else weighted
    length, heads, size = 40, 4, 16
    tensors = inputs((batch, length, heads, 2, size), torch.float32)
    rows = torch.randn(batch, 2 * length, heads, size, generator=torch.Generator().manual_seed(1))
    heads_first = rows[:, :length].transpose(1, 2).contiguous().transpose(1, 2)
    one = rows[:1, :1, :1, :1].expand(batch, length, heads, size)
    first = (window or length) * heads * size  # numbers of one sequence of what is attended to without a mask
    for weights in (rows[:, :length], rows[:, ::2], heads_first, one):
        STRIDES.clear()
        found = torch.autograd.grad(function(*tensors, weights), tensors)
        expected = torch.autograd.grad((reference.attend(*tensors, window) * weights).sum(), tensors)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        (strides,) = STRIDES
        assert strides == (first, size, heads * size, 1), weights.stride()


@pytest.mark.parametrize("name", ["sdpa", "reference"])
@pytest.mark.parametrize("window", [0, 1, 5, 31, 32, 40])
def test_queries_are_the_last_positions_of_the_keys(name: str, window: int) -> None:
    """What a cache needs: the last queries alone give the last rows, by the definition of a window."""
    q, k, v = (x.detach() for x in inputs(SHAPES[0]))
    attend = plugin.load(PACKAGE, name).attend
    full = dense_loop(q, k, v, window)
    for count in (1, 2, 3, 20, 27, 28, 32, 33):
        torch.testing.assert_close(attend(q[:, -count:], k, v, window), full[:, -count:])


def test_a_window_costs_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """sdpa hands its kernels T * 2 window pairs at most, and for a few queries the keys that they may see."""
    pairs = []
    kernel = sdpa._call

    def count(q, k, v, mask, *, causal):
        pairs.append(q.shape[0] * q.shape[1] * k.shape[1])
        return kernel(q, k, v, mask, causal=causal)

    monkeypatch.setattr(sdpa, "_call", count)
    q, k, v = (x.detach() for x in inputs((1, 1000, 2, 1, 8)))
    sdpa.attend(q, k, v, 50)
    assert sum(pairs) <= 1000 * 100
    pairs.clear()
    sdpa.attend(q[:, -3:], k, v, 50)
    assert pairs == [3 * 53]
    pairs.clear()
    sdpa.attend(q[:, 100:], k, v, 50)  # a chunk of a stream
    assert sum(pairs) <= 900 * 100


def listed(count: torch.Tensor, order: torch.Tensor, sequence: int) -> torch.Tensor:
    """The map of tiles (rows, columns) of a sequence that lists of them stand for."""
    tiles = torch.zeros(order.shape[2:], dtype=torch.bool)
    for row, (number, columns) in enumerate(zip(count[sequence, 0], order[sequence, 0], strict=True)):
        tiles[row, columns[: int(number)].long()] = True
    return tiles


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("before", [0, 100, 128])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 700, 1024])
@pytest.mark.parametrize("window", [0, 1, 100, 128, 300, 512, 5000])
def test_tile_map_equals_the_mask(length: int, window: int, before: int, apart: bool) -> None:
    """A tile is left out exactly when no pair in it is visible, and unmasked only when all are. With documents, some of
    them longer than a tile, each sequence has a map of its own."""
    reach = None
    if apart:
        reach = torch.stack([(torch.arange(length, dtype=torch.int32) + 90) % size for size in (50, 128, 400, 2000)])
    mask = flex.block_mask(length, before + length, window, torch.device("cpu"), reach)
    tiles, columns = -(-length // 128), -(-(before + length) // 128)
    dense = band_mask(length, before + length, window, "cpu", reach)
    for sequence, visible in enumerate(dense if apart else dense[None]):
        partial = listed(mask.kv_num_blocks, mask.kv_indices, sequence)
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, sequence)
        assert partial.shape == full.shape == (tiles, columns)
        assert partial.equal(listed(mask.q_num_blocks, mask.q_indices, sequence).mT), "the backward's lists"
        assert full.equal(listed(mask.full_q_num_blocks, mask.full_q_indices, sequence).mT)
        for row in range(tiles):
            for column in range(columns):
                tile = visible[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
                assert bool(tile.any()) == bool(partial[row, column] | full[row, column])
                if full[row, column]:
                    assert bool(tile.all())


TILES: list[torch.Tensor] = []
"""Lists of tiles that came to `watched_tiles`, with the strides that the compiler had chosen for them."""


@torch.library.custom_op("epigram_tests::watched_tiles", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def watched_tiles(out: torch.Tensor, tiles: list[torch.Tensor]) -> torch.Tensor:
    TILES.extend(tiles)
    return out.clone()


def watch_backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple:
    tiles = list(ctx.saved_tensors)  # type: ignore[attr-defined]
    return watched_tiles(grad, tiles), [None] * len(tiles)


watched_tiles.register_fake(lambda out, tiles: torch.empty_like(out))
watched_tiles.register_autograd(
    watch_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1])
)


@pytest.mark.parametrize("training", [False, True], ids=["scoring", "training"])
@pytest.mark.parametrize("sequences", [0, 2], ids=["whole rows", "documents"])
@pytest.mark.parametrize(("length", "window"), [(1024, 0), (1100, 512)])
def test_the_compiler_lays_out_tiles_as_the_kernels_of_flex_read_them(
    length: int, window: int, sequences: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They step along a list by one, and from sequence to sequence by the stride of the heads' axis, though it has one
    entry.

    The kernel for CPUs steps by the right ones, so that here only strides can be compared.
    """

    def kernel(q, k, v, block_mask: BlockMask, enable_gqa: bool) -> torch.Tensor:
        return watched_tiles(q, [part for part in block_mask.as_tuple() if isinstance(part, torch.Tensor)])

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reach: torch.Tensor | None) -> torch.Tensor:
        return (flex.attend if reach is None else flex.attend.within(reach))(q, k, v, window)

    TILES.clear()
    monkeypatch.setattr(flex, "flex_attention", kernel)
    q, k, v = (torch.randn(2, length, 2, 16, requires_grad=training) for _ in range(3))
    out = torch.compile(attend, dynamic=False)(q, k, v, documents(sequences, length) if sequences else None)
    if training:
        out.sum().backward()
    assert len(TILES) == (16 if training else 8)
    for tiles in TILES:
        assert tiles.shape[:2] == (sequences or 1, 1)
        assert tiles.stride() == tuple(math.prod(tiles.shape[axis + 1 :]) for axis in range(tiles.dim()))
