"""Bytes on the wire, against a ring that really passes them on."""

import pytest

from epigram.dist.cost import all_reduce_bytes, part_bytes


def ring_all_reduce(values: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Each process's list summed over all, in 2 (n - 1) rounds of one chunk each; and how many numbers each sent."""
    n, held, sent = len(values), [list(row) for row in values], [0] * len(values)
    size = len(values[0]) // n
    for phase in range(2):  # chunks are summed on their way round, then the sums go round
        for turn in range(n - 1):
            moving = []
            for rank in range(n):
                chunk = (rank - turn + phase) % n
                part = slice(chunk * size, (chunk + 1) * size)
                moving.append(((rank + 1) % n, part, held[rank][part]))
                sent[rank] += size
            for target, part, numbers in moving:
                own = held[target][part]
                held[target][part] = [a + b for a, b in zip(own, numbers, strict=True)] if phase == 0 else numbers
    return held, sent


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_an_all_reduce_sends_what_a_ring_sends(world_size: int):
    values = [[rank * 100 + place for place in range(24)] for rank in range(world_size)]
    summed, sent = ring_all_reduce(values)
    assert summed == [[sum(column) for column in zip(*values, strict=True)]] * world_size
    assert set(sent) == {round(all_reduce_bytes(24, world_size))}
    assert all_reduce_bytes(24, world_size) == 2 * part_bytes(24, world_size), "its two phases"
