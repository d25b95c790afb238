"""`--gpus N`: the same command under torchrun, N processes on this machine."""

import signal
import subprocess
import sys
from collections.abc import Sequence

from epigram.config import load_recipe
from epigram.errors import UserError
from epigram.run.lanes import lane_plan


def launch(num_processes: int, recipe: str | None = None, overrides: Sequence[str] = ()) -> None:
    """Run this command line again as `num_processes` processes. Raises UserError when they do not all succeed.

    recipe, overrides: looked at first if given, so that a mistake in them is told once and not by every process.
    """
    if recipe is not None:
        lane_plan(load_recipe(recipe, overrides), num_processes)
    # A session of their own: Ctrl-C in a terminal comes to this process alone and is passed on once.
    torchrun = subprocess.Popen(torchrun_command(sys.argv[1:], num_processes), start_new_session=True)
    try:
        code = torchrun.wait()
    except BaseException as stop:
        torchrun.send_signal(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
        torchrun.wait()  # the run folder is being completed
        raise
    if code:
        raise UserError(f"a process of the {num_processes} did not succeed; its message is above")


def torchrun_command(arguments: list[str], num_processes: int) -> list[str]:
    """`arguments` of this program without --gpus, for torchrun."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--gpus":
            next(rest, None)  # its value
        elif not argument.startswith("--gpus="):
            kept.append(argument)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_processes}",
    ]
    return [*torchrun, "-m", "epigram", *kept]
