"""What a cluster or a user asks of a run in progress by a signal.

SIGUSR1: write a checkpoint and go on. SIGTERM: finish the step, write a checkpoint, end; a second one ends at once. Any
one process of a run may get the signal: all of them learn of it with the clock of the next step.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class Requests:
    """What has been asked for. checkpoint: taken back by whoever fulfils it."""

    stop: bool = False
    checkpoint: bool = False


@contextmanager
def listening() -> Iterator[Requests]:
    """Inside, signals become requests. Outside of the main thread, where Python takes none, there are never any."""
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        requests.stop = True

    def checkpoint(number: int, frame: FrameType | None) -> None:
        requests.checkpoint = True

    handlers: dict[int, Any] = {signal.SIGTERM: stop}
    if hasattr(signal, "SIGUSR1"):
        handlers[signal.SIGUSR1] = checkpoint
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in handlers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
