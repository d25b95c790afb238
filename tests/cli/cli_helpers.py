"""The command line as a shell sees it, without starting a process."""

import signal
import sys
from typing import NamedTuple

import pytest

from epigram.cli.main import main

_HANDLED = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Outcome(NamedTuple):
    """Exit code, standard output, standard error."""

    code: int
    out: str
    err: str


class Shell:
    """`shell("describe", "smoke")` is `epigram describe smoke`."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["epigram", *map(str, arguments)])
        self._capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in _HANDLED}
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert isinstance(code, int)
        return Outcome(code, *self._capsys.readouterr())


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(capsys, monkeypatch)
