"""`--gpus N`: the same command under torchrun, N processes on this machine."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from epigram.config import load_recipe
from epigram.errors import LostPeerError, UserError
from epigram.run import torchrun
from epigram.run.lanes import lane_plan


def launch(num_processes: int, recipe: str | None = None, overrides: Sequence[str] = ()) -> None:
    """Run this command line again as `num_processes` processes, and pass on to them what signals ask for.

    recipe, overrides: looked at first if given, so that a mistake in them is told once and not by every process.
    Raises UserError when they do not all succeed: LostPeerError, already told, when they said why; and SystemExit when
    they ended, their checkpoint written, because one of them was told to.
    """
    if recipe is not None:
        lane_plan(load_recipe(recipe, overrides), num_processes)
    launcher = _start(torchrun_command(sys.argv[1:], num_processes))
    try:
        code = launcher.wait()
    except BaseException as stop:
        _end(launcher, stop)
        raise
    if code in torchrun.STOPPED:
        raise SystemExit(code)
    if code == torchrun.TOLD:
        raise LostPeerError(f"a process of the {num_processes} failed", told=True)
    if code:
        raise UserError(
            f"a process of the {num_processes} did not succeed (exit code {code}): what it said is above; without a "
            "word the system ends those that take all memory"
        )


def _start(command: list[str]) -> subprocess.Popen:
    """torchrun, in a session of its own: Ctrl-C in a terminal comes to this process alone and is passed on once.

    SIGUSR1 goes to the processes that it has started, and not to itself, whom it would end.
    """
    if not hasattr(signal, "SIGUSR1"):
        return subprocess.Popen(command, start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        for pid in workers(launcher.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as it is inherited
    launcher = subprocess.Popen(command, start_new_session=True)
    signal.signal(signal.SIGUSR1, pass_on)
    return launcher


def _end(launcher: subprocess.Popen, stop: BaseException) -> None:
    """Pass on what stopped this process, and what follows: the first asks for the run folder to be completed, the next
    for the end."""
    while True:
        launcher.send_signal(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
        try:
            launcher.wait()
            return
        except (KeyboardInterrupt, SystemExit) as again:
            stop = again


def workers(parent: int) -> list[int]:
    """The children of process `parent` that torchrun gave a rank; on Linux, elsewhere nobody is found."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            # After the name, which may hold anything, in brackets: the state, and the parent's number.
            ppid = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if ppid == parent and b"\0LOCAL_RANK=" in b"\0" + (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


def torchrun_command(arguments: list[str], num_processes: int) -> list[str]:
    """`arguments` of this program without --gpus, for torchrun."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--gpus":
            next(rest, None)  # its value
        elif not argument.startswith("--gpus="):
            kept.append(argument)
    launcher = [sys.executable, "-m", "epigram.run.torchrun", "--standalone", f"--nproc-per-node={num_processes}"]
    return [*launcher, "-m", "epigram", *kept]
