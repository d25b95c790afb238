"""A model of what processes send each other in a step, to be checked by measurement: nothing is sent here.

The messages are those of `optim.gradients` and `optim.muon`, in their order. All of them go over one communicator, one
after the other.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from epigram.data.plan import LanePlan
from epigram.dist.cost import NVLINK_BYTES_PER_S, all_reduce_bytes, part_bytes
from epigram.dist.share import Share

_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True, kw_only=True)
class Message:
    """what, and behind what work it hides, in words. sent_bytes: by each process in a step. ms: at NVLink's rate,
    without latency.
    """

    what: str
    sent_bytes: int
    ms: float
    behind: str


def messages(
    shapes: Mapping[str, Sequence[int]],
    banks: Collection[str],
    num_lanes: int,
    world_size: int,
    *,
    clip: str,
    muon_dtype: str,
) -> list[Message]:
    """What a step of `run.train` sends on CUDA devices.

    shapes: of all parameters. banks: those whose layers (axis 0) the processes share. clip: as in `GradientConfig`.
    muon_dtype: as in `MuonConfig`; "auto" counts as bfloat16, which it is on GPUs that have it.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    padded = sum(sizes[n] // shapes[n][0] * Share(shapes[n][0], 0, world_size).padded_rows for n in banks)
    small = sum(size for name, size in sizes.items() if name not in banks) + 2 * num_lanes
    update_bytes = _FLOAT32 if muon_dtype == "float32" else _BFLOAT16
    rows = [
        ("gradients of all but the banks, losses and norms", _FLOAT32 * small, all_reduce_bytes, "nothing"),
        ("gradients of the banks, each layer to its owner", _FLOAT32 * padded, part_bytes, "AdamW, Muon at the first"),
        ("updates of the banks, to all", update_bytes * padded, part_bytes, "Muon at the next, the averages"),
    ]  # fmt: skip
    if clip != "lane":
        rows[1] = (*rows[1][:3], "nothing: their norm is needed first")
        rows.insert(2, ("the norm of the average", _FLOAT32, all_reduce_bytes, "nothing"))
    sent = [(what, rule(num_bytes, world_size), behind) for what, num_bytes, rule, behind in rows]
    return [
        Message(what=what, sent_bytes=round(num_bytes), ms=1000 * num_bytes / NVLINK_BYTES_PER_S, behind=behind)
        for what, num_bytes, behind in sent
    ]


def step_ms(plan: LanePlan, sent: Iterable[Message]) -> float:
    """The slowest process's lanes, whose times must be ms, and then all messages as if none hid, without the update."""
    return max(plan.loads) + sum(message.ms for message in sent)
