"""A model of what processes send each other in a step, to be checked by measurement: nothing is sent here.

Today a step sums its gradients over the processes in one message after the last lane, so nothing of it is hidden.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from epigram.data.plan import LanePlan
from epigram.dist.cost import NVLINK_BYTES_PER_S, all_reduce_bytes

_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Message:
    """what: in words. sent_bytes: by each process in a step. ms: at NVLink's rate, without latency."""

    what: str
    sent_bytes: int
    ms: float


def messages(num_parameters: int, num_lanes: int, world_size: int) -> list[Message]:
    """What a step of `run.train` sums over the processes."""
    contents = {
        "gradients, after the last lane": num_parameters,
        "losses and norms of lanes, before the update": 2 * num_lanes,
    }
    sent = {what: all_reduce_bytes(_FLOAT32 * numbers, world_size) for what, numbers in contents.items()}
    return [Message(what=w, sent_bytes=round(b), ms=1000 * b / NVLINK_BYTES_PER_S) for w, b in sent.items()]


def step_ms(plan: LanePlan, sent: Iterable[Message]) -> float:
    """The slowest process's lanes, whose times must be ms, and then all messages, without the update."""
    return max(plan.loads) + sum(message.ms for message in sent)
