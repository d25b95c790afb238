"""Which process and which device: read from the environment once, refused where it cannot be."""

import pytest
import torch

from epigram.dist import collectives
from epigram.dist.context import Context, open_context, pick_device
from epigram.errors import UserError


def test_one_process_needs_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with open_context("cpu") as context:
        assert context == Context()
        assert context.is_main
        assert context.capability is None
    assert not torch.distributed.is_initialized()


def test_one_process_has_nothing_to_communicate():
    context, tensor = Context(), torch.tensor([1.5, 2.5])
    collectives.sum_(context, [tensor])
    assert tensor.tolist() == [1.5, 2.5]
    assert collectives.from_main(context, 0.1) == 0.1
    with collectives.together(context):
        pass
    with pytest.raises(KeyError, match="own"), collectives.together(context):
        raise KeyError("own")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu:1", "cuda:-1", "meta", "0"])
def test_unknown_devices(name: str):
    with pytest.raises(UserError, match=f"there is no device '{name}': choose auto, cpu"):
        pick_device(name)


@pytest.mark.parametrize(
    ("name", "local_rank", "expected"), [("auto", 0, 0), ("cuda", 3, 3), ("cuda:2", 3, 2), ("cuda:0", 1, 0)]
)
def test_gpus_by_number(monkeypatch, name: str, local_rank: int, expected: int):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device(name, local_rank) == torch.device("cuda", expected)


def test_gpus_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="there is no GPU 2, only 2 of them .* start at most 2 processes"):
        pick_device("auto", local_rank=2)
    with pytest.raises(UserError, match="there is no GPU 7"):
        pick_device("cuda:7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        pick_device("cuda")
    with pytest.raises(UserError, match="through MPS"):
        pick_device("mps")
    assert pick_device() == torch.device("cpu")
