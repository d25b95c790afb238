"""The loader against the stream's plan and the shards' own bytes; background, resume, files that change."""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_shards

from epigram.data import loader as loader_module
from epigram.data.lanes import Lane, length_groups
from epigram.data.loader import Loader
from epigram.data.shards import write_shard
from epigram.data.stream import WindowStream
from epigram.errors import DataError, UserError

LANES = (
    Lane(seq_len=16, num_seqs=4),
    Lane(seq_len=40, num_seqs=2),
    Lane(seq_len=16, num_seqs=4),
    Lane(seq_len=16, num_seqs=3),
)
LENGTHS = [700, 1500, 40, 3000]


@pytest.fixture
def shards(tmp_path: Path):
    return write_shards(tmp_path / "data", LENGTHS)


def take(loader: Loader, steps: int) -> list[list[torch.Tensor]]:
    return [loader.next_step() for _ in range(steps)]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def planned(steps: int, seed: int = 0) -> list[list[torch.Tensor]]:
    """The steps as the plan says, from the formula of the shards' tokens."""
    groups = length_groups(LANES)
    streams = [WindowStream(LENGTHS, groups, index, seed) for index in range(len(groups))]
    result = []
    for _ in range(steps):
        step: list[torch.Tensor | None] = [None] * len(LANES)
        for group, stream in zip(groups, streams, strict=True):
            windows = stream.draw().tolist()
            for lane, places in zip(group.lanes, group.deal(), strict=True):
                rows = [
                    [(1009 * s + at + t) % 1000 for t in range(group.seq_len + 1)]
                    for s, at in map(windows.__getitem__, places)
                ]
                step[lane] = torch.tensor(rows)
        result.append(step)
    return result


@pytest.mark.parametrize("prefetch", [0, 1, 2, 7])
def test_windows_are_the_planned_ones(shards, prefetch: int) -> None:
    with Loader(shards, LANES, seed=0, prefetch=prefetch) as loader:
        steps = take(loader, 40)  # several passes
        assert equal(steps, planned(40))
        assert [tensor.shape for tensor in steps[0]] == [(4, 17), (2, 41), (4, 17), (3, 17)]
        assert all(tensor.dtype == torch.int64 for tensor in steps[0])
        assert loader.passes[16] > 1


def test_processes_that_share_the_lanes_see_the_same_run(shards) -> None:
    with (
        Loader(shards, LANES, 3) as whole,
        Loader(shards, LANES, 3, lane_indices=[2, 0]) as first,
        Loader(shards, LANES, 3, 0, lane_indices=[1, 3]) as second,
    ):
        for _ in range(10):
            expected, a, b = whole.next_step(), first.next_step(), second.next_step()
            assert equal([[a[1], b[0], a[0], b[1]]], [expected])
        assert whole.state_dict() == first.state_dict() == second.state_dict()


def test_seeds_change_the_order_and_moving_the_folder_does_not(shards, tmp_path: Path) -> None:
    with Loader(shards, LANES, 0) as loader, Loader(shards, LANES, 1) as other:
        steps = take(loader, 5)
        assert not equal(steps, take(other, 5))
        state = loader.state_dict()
        expected = take(loader, 5)
    (tmp_path / "data").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        path.rename(path.with_name(f"renamed{path.name}"))
    moved = [
        type(shard)(path=tmp_path / "moved" / f"renamed{shard.path.name}", num_tokens=shard.num_tokens, split="train")
        for shard in shards
    ]
    with Loader(moved, LANES, 0) as loader:
        assert equal(take(loader, 5), steps)
    with Loader(moved, LANES, 0) as loader:
        loader.load_state_dict(state)
        assert equal(take(loader, 5), expected)


@pytest.mark.parametrize("prefetch", [0, 2, 5])
def test_a_resumed_run_goes_on_exactly(shards, prefetch: int) -> None:
    with Loader(shards, LANES, 0, prefetch) as loader:
        start = json.loads(json.dumps(loader.state_dict()))
        for before in (1, 3, 20):
            take(loader, before)
            if prefetch:
                time.sleep(0.05)  # let the background run ahead: what it prepared is not in the state
            state = json.loads(json.dumps(loader.state_dict()))
            expected = take(loader, 6)
            with Loader(shards, LANES, 0, 1) as resumed:
                resumed.load_state_dict(state)
                assert resumed.passes == pytest.approx(resumed.passes)
                assert resumed.state_dict() == state
                assert equal(take(resumed, 6), expected)
                assert resumed.state_dict() == loader.state_dict()
        loader.load_state_dict(start)  # as after a warm-up
        assert equal(take(loader, 4), planned(4))


def test_state_does_not_fit_another_run(shards, tmp_path: Path) -> None:
    with Loader(shards, LANES, 0) as loader:
        state = loader.state_dict()
    others = write_shards(tmp_path / "other", [701, *LENGTHS[1:]])
    for other, what in [
        (Loader(shards, LANES, 1), "seed"),
        (Loader(shards, LANES[:2], 0), "lanes"),
        (Loader(others, LANES, 0), "shards"),
    ]:
        with other, pytest.raises(UserError, match=rf"cannot go on with other data: {what} changed"):
            other.load_state_dict(state)
    with Loader(shards, LANES, 0) as loader, pytest.raises(UserError, match="version 0"):
        loader.load_state_dict({**state, "version": 0})


def test_same_lengths_but_other_tokens_are_another_run(shards) -> None:
    with Loader(shards, LANES, 0) as loader:
        state = loader.state_dict()
    write_shard(shards[1].path, np.zeros(LENGTHS[1], np.uint16), "train")
    with Loader(shards, LANES, 0) as loader, pytest.raises(UserError, match="shards changed"):
        loader.load_state_dict(state)


def cut(path: Path) -> None:
    os.truncate(path, 1100)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(2000)
        file.write(b"\7\7")
    os.utime(path, ns=(1, 1))


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("damage", [cut, overwrite])
def test_a_shard_that_changes_under_the_run_is_named(shards, prefetch: int, damage) -> None:
    with Loader(shards, LANES, 0, prefetch) as loader:
        take(loader, 2)
        damage(shards[3].path)
        with pytest.raises(DataError, match=r"x_train_000003\.bin changed since it was opened"):
            take(loader, 20)
        with pytest.raises(DataError, match=r"x_train_000003\.bin"):  # and again
            loader.next_step()


def test_a_shard_that_is_replaced_or_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epigram.data.shard_files._OPEN_FILES", 2)  # so that files are opened again
    lanes = (Lane(seq_len=16, num_seqs=8),)
    for name, damage, message in (
        ("gone", remove, r"cannot be read: No such file"),
        ("new", lambda path: write_shard(path, np.zeros(3000, np.uint16), "train"), "changed since"),
    ):
        shards = write_shards(tmp_path / name, LENGTHS)
        with Loader(shards, lanes, 0, 0) as loader:
            take(loader, 2)
            damage(shards[3].path)
            with pytest.raises(DataError, match=rf"x_train_000003\.bin {message}"):
                take(loader, 30)


def test_a_shard_cut_before_the_run_is_named(shards) -> None:
    cut(shards[3].path)
    with pytest.raises(DataError, match=r"x_train_000003\.bin changed"):
        Loader(shards, LANES, 0)


def test_hundreds_of_shards_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epigram.data.shard_files._OPEN_FILES", 5)
    shards = write_shards(tmp_path, [50 + i % 7 for i in range(300)])
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with Loader(shards, [Lane(seq_len=8, num_seqs=64)], 0, 0) as loader:
        take(loader, 30)
        if before:
            assert len(os.listdir("/proc/self/fd")) <= before + 5


def test_ids_beyond_the_vocabulary_are_named(shards) -> None:
    with Loader(shards, LANES, 0, vocab_size=1000) as loader:
        take(loader, 5)
    with (
        Loader(shards, LANES, 0, vocab_size=500) as loader,
        pytest.raises(DataError, match=r"x_train.*vocabulary of 500"),
    ):
        take(loader, 20)


def test_errors_of_the_background_reach_the_caller(shards, monkeypatch: pytest.MonkeyPatch) -> None:
    with Loader(shards, LANES, 0, 2) as loader:
        take(loader, 1)

        def fail(*_: object) -> None:
            raise ZeroDivisionError("from the thread")

        monkeypatch.setattr(loader, "_gather", fail)
        with pytest.raises(ZeroDivisionError, match="from the thread"):
            take(loader, 10)


def test_close_ends_the_thread(shards) -> None:
    before = threading.active_count()
    loader = Loader(shards, LANES, 0, 2)
    take(loader, 1)
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(AssertionError, match="closed"):
        loader.next_step()


def test_the_background_works_ahead_but_not_far(shards, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    prepare = Loader._prepare
    monkeypatch.setattr(Loader, "_prepare", lambda self: prepared.append(1) or prepare(self))
    with Loader(shards, LANES, 0, 3) as loader:
        take(loader, 1)
        time.sleep(3 * loader_module._POLL_S)
        assert len(prepared) == 5  # one handed out, three ready, one waiting for room
        take(loader, 1)
        time.sleep(3 * loader_module._POLL_S)
        assert len(prepared) == 6


def test_the_windows_are_the_callers_own(shards) -> None:
    with Loader(shards, LANES, 0, 2) as loader:
        first = loader.next_step()
        copies = [tensor.clone() for tensor in first]
        first[0].fill_(7)
        take(loader, 5)
        assert equal([first[1:]], [copies[1:]])


def test_impossible_requests(shards) -> None:
    with pytest.raises(UserError, match=r"no shards .*; seed = -1 .*; prefetch = -1 .*; lanes \[4\] do not exist"):
        Loader([], LANES, -1, -1, lane_indices=[0, 4])
    with pytest.raises(DataError, match=r"no window of 5,000 tokens fits"):
        Loader(shards, [Lane(seq_len=5000, num_seqs=1)], 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_windows_are_the_same(shards) -> None:
    with Loader(shards, LANES, 0, pin=True) as loader:
        steps = take(loader, 20)
        assert all(tensor.is_pinned() for step in steps for tensor in step)
        assert equal([[tensor.to("cuda", non_blocking=True).cpu() for tensor in step] for step in steps], planned(20))
