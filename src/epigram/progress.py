"""Progress for anything that takes longer than two seconds: a bar on a terminal, a plain line elsewhere."""

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

_QUIET_S = 2.0  # shorter work shows nothing
_LINE_EVERY_S = 5.0  # between plain lines where output is no terminal


class Progress:
    """Context manager that reports how far a piece of work is, on standard error.

    `total` is in the same unit as `advance`; without it only the count and the rate are shown. shown: False in all but
    one of several processes at the same work.
    """

    def __init__(self, description: str, total: float | None = None, unit: str = "", *, shown: bool = True) -> None:
        self.description, self.total, self.unit, self.shown = description, total, unit, shown
        self.done = 0.0
        self._told = -1.0  # how much was done when it was last told in a line
        self._start_s = self._last_line_s = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._part = ""
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget_part()
        if self._bar is not None:
            self._bar.stop()
        elif self._last_line_s != self._start_s and kind is None and self._told != self.done:
            self._line()

    def begin(self, part: str) -> None:
        """`part` of the work starts, to be named at once, or when the work turns out to take long."""
        if not self.shown:
            return
        self._forget_part()
        self._part = part
        wait_s = _QUIET_S - (time.monotonic() - self._start_s)
        if wait_s <= 0:
            self._name_part()
            return
        self._timer = threading.Timer(wait_s, self._name_part)
        self._timer.daemon = True
        self._timer.start()

    def _forget_part(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # if it has begun to write, let it end
            self._timer = None

    def _name_part(self) -> None:
        if sys.stderr.isatty():
            self._show_bar()
            return
        self._last_line_s = time.monotonic()
        place = f" ({self.done + 1:,.0f} of {self.total:,.0f})" if self.total else ""
        print(f"{self.description}{place}: {self._part}", file=sys.stderr, flush=True)

    def advance(self, amount: float = 1) -> None:
        """`amount` more is done."""
        self.update(self.done + amount)

    def update(self, done: float) -> None:
        """`done` of `total` is done."""
        self.done = done
        now_s = time.monotonic()
        if not self.shown or now_s - self._start_s < _QUIET_S:
            return
        if sys.stderr.isatty():
            self._show_bar()
        elif now_s - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = now_s
            self._line()

    def _show_bar(self) -> None:
        with self._lock:  # a part may be named by its timer
            self._update_bar()

    def _update_bar(self) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.description, total=self.total, rate="")
            self._bar.start()
        words = f"{self.description}: {self._part}" if self._part else self.description
        rate = self.done / max(time.monotonic() - self._start_s, 1e-9)
        self._bar.update(self._task, completed=self.done, description=words, rate=f"{rate:,.1f} {self.unit}/s")

    def _line(self) -> None:
        self._told = self.done
        elapsed_s = time.monotonic() - self._start_s
        rate = self.done / max(elapsed_s, 1e-9)
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        left = f", {(self.total - self.done) / max(rate, 1e-9):.0f} s left" if self.total else ""
        print(
            f"{self.description}: {self.done:,.0f} {self.unit}{share}, {rate:,.1f}/s{left}",
            file=sys.stderr,
            flush=True,
        )
