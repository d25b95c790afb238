"""The `epigram` command. Nothing heavy is imported until a command runs, so that --help answers at once."""

import codecs
import io
import os
import signal
import sys
from collections.abc import MutableMapping
from types import FrameType
from typing import NoReturn

import click

from epigram.cli import bench, check, compare, data, describe, doctor, export, generate, report, score, submit, train
from epigram.errors import LostPeerError, UserError

INTERRUPTED = 130  # what a shell expects after Ctrl-C
TERMINATED = 143  # and after `kill`, which a cluster sends before it takes a machine away
_SPINS = "10000"
"""Turns that a thread of GNU OpenMP waits awake for the others, about half a millisecond, before it sleeps. Its own
300,000 are some 15 ms: where anything else computes, each product of a small model waits for a thread whose processor
a waiting one holds. A step of `demo` on two cores beside one busy process: 1,170 to 2,370 ms with 300,000, 475 with
these, 375 to 400 with none; on idle ones 250 with 300,000 and 261 with these (docs/log.md)."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="epigram")
def command() -> None:
    """Train the best language model that fits in a byte budget and a time budget, and prove its score.

    \b
    Start:      epigram train demo              (a laptop's CPU, a few minutes)
    Your text:  epigram train demo --data my_text.txt
    One H100:   epigram train h100 --data DIR   (epigram data fetch)
    Machine:    epigram doctor                  (what a run would take on it)
    """


for module in (train, export, score, generate, data, describe, compare, report, submit, check, bench, doctor):
    command.add_command(module.command)


def main() -> None:
    """Entry point: exit code 0 on success, 2 for a user's mistake (one sentence), 130 after Ctrl-C, 143 after kill
    or when the terminal went away, of which a run in training makes 129."""
    share_processors(os.environ)
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, _terminate)  # the terminal is gone
    for stream in (sys.stdout, sys.stderr):  # tables have letters that an output may lack
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="replace")
    if hasattr(signal, "SIGUSR1"):  # outside of training there is nothing to save, and no reason to die
        signal.signal(signal.SIGUSR1, _ignore)
    try:
        sys.exit(command(prog_name="epigram", standalone_mode=False))  # which returns an exit code, or None for 0
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except LostPeerError as error:
        if not error.told:
            print(f"epigram: {error}", file=sys.stderr)
        _exit(2)
    except UserError as error:
        print(f"epigram: {error}", file=sys.stderr)
        _exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"epigram: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        _exit(2)
    except (KeyboardInterrupt, click.Abort):
        print("epigram: interrupted", file=sys.stderr)
        _exit(INTERRUPTED)


def share_processors(environment: MutableMapping[str, str]) -> None:
    """Let threads that wait sleep soon, unless the user has said how they wait; read when torch is first imported."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = _SPINS


def _exit(code: int) -> NoReturn:
    """As sys.exit; but one of several processes, after a failure, does not wait for what belongs to the lost ones."""
    from epigram.dist import watch

    if watch.current is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)  # as an exception, so that a run folder is completed


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


if __name__ == "__main__":
    main()
