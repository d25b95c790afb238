"""Who has which rows of a tensor that processes share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epigram.dist.context import Context
from epigram.dist.share import Share, as_whole, copy_in, is_shared, mesh_of, own_part

ROWS, RANKS = st.integers(1, 40), st.integers(1, 16)


@given(num_rows=ROWS, world_size=RANKS)
def test_every_row_belongs_to_one_process(num_rows: int, world_size: int):
    shares = [Share(num_rows, rank, world_size) for rank in range(world_size)]
    covered = [row for share in shares for row in range(*share.own)]
    assert covered == list(range(num_rows)), "in the order of ranks"
    assert [share.num_own for share in shares] == [len(range(*share.own)) for share in shares]


@given(num_rows=ROWS, world_size=RANKS)
def test_parts_are_those_of_a_dtensor(num_rows: int, world_size: int):
    """torch.chunk is how Shard(0) cuts, with nothing for ranks beyond the last chunk."""
    whole = torch.arange(num_rows)
    chunks = list(whole.chunk(world_size))
    chunks += [whole[:0]] * (world_size - len(chunks))
    for rank, chunk in enumerate(chunks):
        assert Share(num_rows, rank, world_size).of(whole).equal(chunk)


@given(num_rows=ROWS, world_size=RANKS)
def test_messages_have_room_for_all_and_less_than_one_row_each_to_spare(num_rows: int, world_size: int):
    share = Share(num_rows, 0, world_size)
    assert share.padded_rows % world_size == 0
    assert 0 <= share.padded_rows - num_rows < world_size
    assert (share.padded_rows == num_rows) == (num_rows % world_size == 0)
    for rank in range(world_size):
        first = rank * share.rows_each
        assert Share(num_rows, rank, world_size).own[0] == min(first, num_rows), "where its part of a message begins"


def test_one_process_has_all_of_it_and_nothing_around_it():
    tensor = torch.arange(6.0).view(3, 2)
    assert Share(3, 0, 1).of(tensor).data_ptr() == tensor.data_ptr()
    assert Share(3, 0, 1).own == (0, 3)
    assert mesh_of(Context()) is None
    assert as_whole(tensor, 3, None) is tensor
    assert own_part(tensor) is tensor
    assert not is_shared(tensor)
    copy_in(tensor, torch.ones(3, 2))
    assert tensor.equal(torch.ones(3, 2))


@pytest.mark.parametrize(("num_rows", "world_size", "own"), [(12, 8, [2, 2, 2, 2, 2, 2, 0, 0]), (5, 2, [3, 2])])
def test_the_last_ones_may_have_less(num_rows: int, world_size: int, own: list[int]):
    assert [Share(num_rows, rank, world_size).num_own for rank in range(world_size)] == own
