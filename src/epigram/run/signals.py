"""What a cluster or a user asks of a run in progress by a signal.

SIGUSR1: write a checkpoint and go on. SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal is gone, and no nohup): finish
the step, write a checkpoint, end; a second one ends at once. Any one process of a run may get the signal: all of them
learn of it with the clock of the next step.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

_ONE_S = 1.0  # two within it are one: under a bare torchrun, Ctrl-C comes from the terminal and is passed on besides


@dataclass
class Requests:
    """What has been asked for. stop: the signal that did, or 0. checkpoint: taken back by whoever fulfils it."""

    stop: int = 0
    checkpoint: bool = False


@contextmanager
def listening() -> Iterator[Requests]:
    """Inside, signals become requests. Outside of the main thread, where Python takes none, there are never any.

    SIGINT stays with whoever else has a use for it, or ignores it.
    """
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    asked_s = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked_s
        if not requests.stop:
            requests.stop, asked_s = number, time.monotonic()
        elif time.monotonic() - asked_s > _ONE_S:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    def checkpoint(number: int, frame: FrameType | None) -> None:
        requests.checkpoint = True

    handlers: dict[int, Any] = {signal.SIGTERM: stop}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handlers[signal.SIGHUP] = stop
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = stop
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
