"""One decision for all processes: what time it is, and what is to be done beside the next step."""

import math
from typing import NamedTuple

from epigram.dist import collectives
from epigram.dist.context import Context
from epigram.run.signals import Requests


class Decision(NamedTuple):
    """elapsed_s: the time by rank 0's clock. stop: a signal by which a process was asked to, or 0. checkpoint: whether
    one was asked to."""

    elapsed_s: float
    stop: int
    checkpoint: bool


def agree(context: Context, elapsed_s: float, requests: Requests) -> Decision:
    """The decision that all processes come to, in one message between hosts; nothing waits for a device.

    elapsed_s: by this process's clock. The host is ahead of its device, so the message costs no step time.
    """
    own = [elapsed_s if context.is_main else -math.inf, float(requests.stop), float(requests.checkpoint)]
    elapsed_s, stop, checkpoint = collectives.largest(context, own)
    return Decision(elapsed_s, int(stop), bool(checkpoint))
