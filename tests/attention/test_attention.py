"""Every backend of the folder against the oracle, forward and backward; the closed-form tile map."""

import pytest
import torch

from epigram import plugin
from epigram.attention import flex, reference
from epigram.attention.base import PACKAGE, Request, band_mask, choose, usable
from epigram.errors import UserError

SHAPES = [(2, 33, 4, 2, 16), (1, 130, 4, 4, 16), (2, 257, 6, 2, 32)]  # B, T, H, K, D; no multiple of a tile
WINDOWS = [0, 1, 16, 100, 500]


def request(window: int, device_type: str = "cpu", **changes) -> Request:
    values = dict(compiled=True, capability=None, dtype=torch.float32, head_dim=16, num_heads=4, num_kv_heads=2)
    return Request(device_type=device_type, window=window, **(values | changes))


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    b, t, h, k, d = shape
    generator = torch.Generator().manual_seed(t)
    return [torch.randn(b, t, heads, d, generator=generator, dtype=dtype).requires_grad_() for heads in (h, k, k)]


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
    backend = plugin.load(PACKAGE, name)
    ours, theirs = inputs(shape), inputs(shape)
    out, expected = backend.attend(*ours, window), reference.attend(*theirs, window)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, e.grad)


@pytest.mark.parametrize("name", ["sdpa", "reference"])
@pytest.mark.parametrize("window", [0, 5, 40])
def test_queries_are_the_last_positions_of_the_keys(name: str, window: int) -> None:
    """What a cache needs: the last queries alone give the last rows."""
    q, k, v = (x.detach() for x in inputs(SHAPES[0]))
    attend = plugin.load(PACKAGE, name).attend
    full = attend(q, k, v, window)
    for count in (1, 3, 20):
        torch.testing.assert_close(attend(q[:, -count:], k, v, window), full[:, -count:])


@pytest.mark.parametrize("length", [1, 127, 128, 129, 700, 1024])
@pytest.mark.parametrize("window", [0, 1, 100, 128, 300, 512, 5000])
def test_tile_map_equals_the_mask(length: int, window: int) -> None:
    """A tile is left out exactly when no pair in it is visible, and unmasked only when all are."""
    mask = flex.block_mask(length, length, window, torch.device("cpu"))
    tiles = -(-length // 128)
    visible = band_mask(length, length, window, "cpu")
    partial, full = (torch.zeros(tiles, tiles, dtype=torch.bool) for _ in range(2))
    for chosen, count, order in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(tiles):
            chosen[row, order[0, 0, row, : int(count[0, 0, row])].long()] = True
    for row in range(tiles):
        for column in range(tiles):
            tile = visible[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
            assert bool(tile.any()) == bool(partial[row, column] | full[row, column])
            if full[row, column]:
                assert bool(tile.all())


def test_choice_says_why_not() -> None:
    assert choose("auto", request(512))[0] == "sdpa"
    assert choose("auto", request(512, "cuda", capability=(9, 0)))[0] == "flex"
    assert choose("auto", request(512, "cuda", capability=(7, 5)))[0] == "sdpa"
    assert choose("auto", request(512, "cuda", capability=(9, 0), compiled=False))[0] == "sdpa"
    assert choose("auto", request(0, "cuda", capability=(9, 0)))[0] == "sdpa"
    with pytest.raises(UserError, match="for CUDA devices"):
        choose("flex", request(512))
    with pytest.raises(UserError, match="choose one of flash4"):
        choose("nonsense", request(0))
    assert "CUDA" in usable(request(0))["flex"]
