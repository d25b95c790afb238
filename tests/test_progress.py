"""What is said of work in progress where output is no terminal."""

import threading
import time

import pytest

from epigram import progress
from epigram.progress import Progress


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)


def test_short_work_says_nothing(capsys):
    with Progress("warm-up", 2, "parts") as bar:
        for part in ("first", "second"):
            bar.begin(part)
            bar.advance()
    assert capsys.readouterr().err == ""
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_parts_of_long_work_are_named_with_their_place(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    with Progress("warm-up", 2, "parts") as bar:
        for part in ("first", "second"):
            bar.begin(part)
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["warm-up (1 of 2): first", "warm-up (2 of 2): second"]


def test_a_first_part_that_takes_long_is_named_while_it_runs(monkeypatch, capsys):
    """A compiler may be at work for a minute before anything advances."""
    monkeypatch.setattr(progress, "_QUIET_S", 0.05)
    with Progress("warm-up", 1, "parts") as bar:
        bar.begin("first")
        deadline_s, said = time.monotonic() + 20, ""
        while not said and time.monotonic() < deadline_s:
            time.sleep(0.01)
            said = capsys.readouterr().err
    assert said == "warm-up (1 of 1): first\n"


def test_the_end_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with Progress("calibrate", 4, "windows") as bar:
        bar.advance(3)
        bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" windows")[0] for line in lines] == ["calibrate: 3", "calibrate: 4"]
