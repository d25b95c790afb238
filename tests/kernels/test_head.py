"""The head's loss and nats against their twins."""

import math

import pytest
import torch
from parity import FLOOR, Place, assert_as_good, compare
from torch import Tensor

from epigram.kernels import head as plain


@pytest.fixture
def fused(place: Place, monkeypatch):
    """With several chunks of logits in the interpreter, the last one smaller."""
    from epigram.kernels._triton import head

    if not place.is_large:
        monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 7 * 50)
    return head


def inputs(place: Place, vocab_size: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Final states and embedding so that logits spread over several nats, and targets; V is no power of two unless
    `vocab_size` is given."""
    batch, length, width, usual = (8, 1024, 512, 1_000) if place.is_large else (2, 9, 24, 50)
    vocab_size = vocab_size or usual
    x = place.normal(batch, length, width, seed=0)
    embed = place.normal(vocab_size, width, seed=1) * (3 * width**-0.5)
    return {"x": x, "embed": embed}, place.tokens(vocab_size, batch, length)


@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("exponent", [None, 0.0, 0.6])
def test_loss(place: Place, fused, cap: float, exponent: float | None):
    tensors, targets = inputs(place)
    gamma = None if exponent is None else torch.tensor(exponent, device=place.device)

    def of(module):
        return lambda x, embed: module.head_loss(x, embed, targets, cap, gamma, 0.2)

    compare(of(fused), of(plain), of(plain), tensors, place.dtype)


@pytest.mark.parametrize("vocab_size", [6_000, 8_192])
def test_large_vocabularies(place: Place, fused, vocab_size: int):
    """With everything on, as recipes have it; 6,000 is padded by more than a third."""
    tensors, targets = inputs(place, vocab_size)
    targets[0, :2] = torch.tensor([0, vocab_size - 1])
    gamma = torch.tensor(0.6, device=place.device)

    def of(module):
        return lambda x, embed: module.head_loss(x, embed, targets, 30.0, gamma, 0.2)

    compare(of(fused), of(plain), of(plain), tensors, place.dtype)


def test_chunks_of_rows_by_vocabulary():
    """A step of 36 x 2048: all at once at 1,024 pieces, at 8,192 parts of 256 MiB, each row in one of them."""
    pytest.importorskip("triton")
    from epigram.kernels._triton.head import _chunks

    x = torch.empty(73_728, 1, device="meta")
    assert _chunks(x, 1_024) == [slice(0, 73_728)]
    parts = _chunks(x, 8_192)
    assert [part.stop - part.start for part in parts] == [16_384] * 4 + [8_192]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_the_floor_of_the_weight(place: Place, fused, floor: float):
    """A high exponent, so that weights are small."""
    tensors, targets = inputs(place)
    gamma = torch.tensor(8.0, device=place.device)

    def of(module):
        return lambda x, embed: module.head_loss(3 * x, embed, targets, 0.0, gamma, floor)

    compare(of(fused), of(plain), of(plain), tensors, place.dtype)


def test_a_loss_without_gradient(place: Place, fused):
    tensors, targets = inputs(place)
    with torch.no_grad():
        found = fused.head_loss(**tensors, targets=targets, cap=30.0, gamma=None, floor=0.0)
    assert not found.requires_grad
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    with_graph = fused.head_loss(**leaves, targets=targets, cap=30.0, gamma=None, floor=0.0)
    assert found.item() == pytest.approx(with_graph.item(), rel=1e-6)


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_nats(place: Place, fused, cap: float):
    tensors, targets = inputs(place)
    exact, expected, found = (
        {"nats": module.head_nll(*(t.to(dtype) for t in tensors.values()), targets, cap)}
        for module, dtype in ((plain, torch.float64), (plain, place.dtype), (fused, place.dtype))
    )
    assert found["nats"].dtype == torch.float32
    assert_as_good(found, expected, exact, FLOOR[place.dtype])


def test_far_logits_are_finite(place: Place, fused):
    """Without a cap: beside a logit of 60 all others have a probability of zero in float32."""
    x = torch.zeros(1, 2, 16, device=place.device, dtype=place.dtype)
    embed = torch.zeros(50, 16, device=place.device, dtype=place.dtype)
    x[..., 0], embed[3, 0] = 6.0, 10.0
    targets = torch.tensor([[3, 4]], device=place.device)
    found = fused.head_nll(x, embed, targets, 0.0)
    assert found[0, 0].item() == pytest.approx(49 * math.exp(-60), abs=1e-6)
    assert found[0, 1].item() == pytest.approx(60, rel=1e-3)
