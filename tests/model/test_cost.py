"""Operation counts against a count of what really runs."""

import pytest
import torch
from golden_model import CONFIG, golden_model
from torch.utils.flop_counter import FlopCounterMode

from epigram.attention.base import band_mask
from epigram.model.cost import (
    attention_bytes_per_token,
    attention_flops_per_token,
    forward_flops_per_token,
    visible_keys,
)


@pytest.mark.parametrize(("length", "window"), [(1, 0), (10, 0), (10, 3), (10, 9), (10, 10), (100, 32)])
def test_visible_keys_is_the_mean_of_the_mask(length: int, window: int) -> None:
    assert visible_keys(length, window) == pytest.approx(
        band_mask(length, length, window, "cpu").sum(1).double().mean()
    )


def test_products_are_counted_as_they_run() -> None:
    """Attention is left out: the backend on this device may compute more than is visible."""
    model = golden_model()
    model.attend = model.attend_window = lambda q, k, v, window: q
    with FlopCounterMode(display=False) as counter:
        model.logits(model(torch.zeros(1, 50, dtype=torch.long)))
    parts = forward_flops_per_token(CONFIG, 50)
    assert counter.get_total_flops() == pytest.approx(50 * (sum(parts.values()) - parts["attention"]))


@pytest.mark.parametrize("window", [0, 7])
def test_attention_is_counted_as_what_is_visible(window: int) -> None:
    """Two products for each visible pair of positions and each query head."""
    pairs = int(band_mask(50, 50, window, "cpu").sum())
    expected = 2 * 2 * CONFIG.num_heads * CONFIG.head_dim * pairs
    assert 50 * attention_flops_per_token(CONFIG, 50, window) == pytest.approx(expected)


def test_attention_moves_each_tensor_once() -> None:
    q, k = (torch.empty(1, 50, heads, CONFIG.head_dim) for heads in (CONFIG.num_heads, CONFIG.num_kv_heads))
    forward = [q, k, k, q]  # q, k, v in, the output out
    backward = [q, k, k, q, q, q, k, k]  # these again, the output's gradient, and three gradients out
    for tensors, flag in ((forward, False), (forward + backward, True)):
        moved = sum(tensor.nbytes for tensor in tensors)
        assert 50 * attention_bytes_per_token(CONFIG, 4, backward=flag) == moved
