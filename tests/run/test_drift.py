"""Replicas are compared bit by bit; one that differs is named with its rank."""

import pytest
import torch

from epigram.dist import collectives
from epigram.dist.context import Context
from epigram.run.decision import Decision, agree
from epigram.run.drift import DriftError, bit_hash, check_replicas
from epigram.run.signals import Requests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
def test_a_change_of_any_element_changes_the_hash(dtype: torch.dtype):
    tensor = torch.arange(60).reshape(5, 12).to(dtype)
    before = bit_hash(tensor)
    assert before.equal(bit_hash(tensor.clone()))
    for index in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[index] += 1
        assert not bit_hash(other).equal(before)
    assert not bit_hash(tensor.flip(0)).equal(before), "places count"


def test_the_hash_is_that_of_its_formula():
    tensor = torch.tensor([1.0, -2.5, float("nan")])
    bits = tensor.view(torch.int32).tolist()
    expected = sum(b * (2 * 0x1E3779B97F4A7C15 * place + 1) for place, b in enumerate(bits)) % 2**64
    assert bit_hash(tensor).item() % 2**64 == expected


def test_what_differs_is_named(monkeypatch):
    named = {"a": torch.ones(3), "b": torch.zeros(2), "c": torch.ones(1)}

    def of_four(context: Context, own: torch.Tensor) -> torch.Tensor:
        hashes = own.repeat(4, 1)
        hashes[2, 1] += 1
        hashes[3, 1] += 2
        return hashes

    monkeypatch.setattr(collectives, "gathered", of_four)
    with pytest.raises(DriftError, match=r"after step 7 .* \(b on rank 2, 3\)"):
        check_replicas(Context(world_size=4), named, 7)
    monkeypatch.setattr(collectives, "gathered", lambda context, own: own.repeat(4, 1))
    check_replicas(Context(world_size=4), named, 7)
    check_replicas(Context(), named, 7)


def test_one_process_decides_for_itself():
    assert agree(Context(), 1.5, Requests()) == Decision(1.5, False, False)
    assert agree(Context(), 0.1, Requests(stop=True, checkpoint=True)) == Decision(0.1, True, True)
