"""What collectives put on the wire, in closed form."""

NVLINK_BYTES_PER_S = 450e9
"""What an H100 SXM can send to others of its host at best: 18 links of NVLink 4 with 25 GB/s each in each direction."""


def all_reduce_bytes(num_bytes: float, world_size: int) -> float:
    """Sent by each process to sum `num_bytes` over all: twice all but its own share, by a ring.

    No algorithm between the processes alone sends less (Patarasuk and Yuan 2009); switches that add on the way do.
    """
    return 2 * (world_size - 1) / world_size * num_bytes


def part_bytes(num_bytes: float, world_size: int) -> float:
    """Sent by each process to sum `num_bytes` so that each has its part, or to put equal parts together to `num_bytes`.

    All but its own share, once: a reduce-scatter or an all-gather, the halves of the all-reduce.
    """
    return (world_size - 1) / world_size * num_bytes
