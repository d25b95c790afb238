"""What enters the stream, and scaled weights, against their twins."""

import pytest
import torch
from parity import Place, compare

from epigram.kernels import front as plain


@pytest.fixture
def fused():
    from epigram.kernels._triton import front

    return front


def sizes(place: Place) -> tuple[int, int, int, int]:
    """Sequences, positions, vocabulary, width."""
    return (8, 1024, 1_000, 512) if place.is_large else (2, 13, 21, 24)


@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize(("with_gate", "reset_id"), [(False, -1), (True, -1), (True, 3), (True, 0)])
def test_enter(place: Place, fused, with_extra: bool, with_gate: bool, reset_id: int):
    """reset_id: a token that nothing is mixed into, at the first and the last position and next to itself too."""
    batch, length, vocab_size, width = sizes(place)
    tokens = place.tokens(vocab_size, batch, length)
    if reset_id >= 0:
        tokens[:, [0, 4, 5, length - 1]] = reset_id
    tensors = {"embed": place.normal(vocab_size, width, seed=1, dtype=torch.float32)}
    if with_extra:
        tensors["extra"] = place.normal(batch, length, width, seed=2)
    if with_gate:
        tensors["gate"] = place.normal(width, seed=3, dtype=torch.float32).sigmoid()

    def of(module, dtype):
        return lambda embed, extra=None, gate=None: module.enter(tokens, embed, extra, gate, dtype, reset_id)

    compare(of(fused, place.dtype), of(plain, place.dtype), of(plain, torch.float64), tensors, place.dtype)


@pytest.mark.parametrize("vocab_size", [6_000, 8_192])
def test_enter_with_a_large_vocabulary(place: Place, fused, vocab_size: int):
    """The first and the last token of it among others; most rows of the table get no gradient."""
    batch, length, _, width = sizes(place)
    tokens = place.tokens(vocab_size, batch, length)
    tokens[0, :3] = torch.tensor([vocab_size - 1, 0, vocab_size - 1])
    tensors = {
        "embed": place.normal(vocab_size, width, seed=1, dtype=torch.float32),
        "gate": place.normal(width, seed=3, dtype=torch.float32).sigmoid(),
    }

    def of(module, dtype):
        return lambda embed, gate: module.enter(tokens, embed, None, gate, dtype)

    compare(of(fused, place.dtype), of(plain, place.dtype), of(plain, torch.float64), tensors, place.dtype)


def test_look_up(place: Place, fused):
    """Of the tokens of a step many are the same: their gradients are added up."""
    batch, length, vocab_size, width = sizes(place)
    tokens = place.tokens(vocab_size, batch, length) // 3
    table = place.normal(vocab_size, width, seed=1, dtype=torch.float32)

    def of(module, dtype):
        return lambda table: module.look_up(tokens, table, dtype)

    compare(of(fused, place.dtype), of(plain, place.dtype), of(plain, torch.float64), {"table": table}, place.dtype)


def test_scaled(place: Place, fused):
    shape = (3, 1536, 512) if place.is_large else (3, 10, 24)
    tensors = {
        "bank": place.normal(*shape, seed=1, dtype=torch.float32),
        "scale": place.normal(*shape[:2], seed=2, dtype=torch.float32),
    }

    def of(module, dtype):
        return lambda bank, scale: module.scaled(bank, scale, dtype)

    compare(of(fused, place.dtype), of(plain, place.dtype), of(plain, torch.float64), tensors, place.dtype)


def test_one_scale_for_all_rows_of_a_layer(place: Place, fused):
    """A factor that is expanded over rows gets the sum of their gradients."""
    shape = (3, 10, 24)
    tensors = {
        "bank": place.normal(*shape, seed=1, dtype=torch.float32),
        "scale": place.normal(3, 1, seed=2, dtype=torch.float32),
    }

    def of(module, dtype):
        return lambda bank, scale: module.scaled(bank, scale.expand(3, 10), dtype)

    compare(of(fused, place.dtype), of(plain, place.dtype), of(plain, torch.float64), tensors, place.dtype)


def test_without_scale_a_bank_is_cast(place: Place, fused):
    bank = place.normal(3, 10, 24, seed=1, dtype=torch.float32)
    assert fused.scaled(bank, None, place.dtype).equal(plain.scaled(bank, None, place.dtype))
