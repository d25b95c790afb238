"""torchrun as `epigram --gpus N` starts it: what is to be said of a failure is left to the processes themselves.

torchrun adds a summary and a traceback of its own, which say that a process failed and not why. Here they are left out,
and the exit code says how the processes ended.
"""

import logging
import signal
import sys

STOPPED = tuple(128 + getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Exit codes: the processes wrote a checkpoint and ended, as told."""

TOLD = 2
"""Exit code: a process failed, and the processes have said which and why."""

UNTOLD = 1
"""Exit code: all processes were ended by a signal at once, and none was left to say it."""


def main() -> None:
    """torchrun's command line, with exit codes instead of its traceback."""
    if hasattr(signal, "SIGUSR1"):  # inherited: a process that has only just begun must not die of it
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    logging.disable(logging.ERROR)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    arguments = get_args_parser().parse_args(sys.argv[1:])
    try:
        run(arguments)
    except ChildFailedError as error:
        sys.exit(exit_code([failure.exitcode for failure in error.failures.values()], int(arguments.nproc_per_node)))
    except SignalException as error:
        sys.exit(128 + error.sigval)


def exit_code(found: list[int], num_processes: int) -> int:
    """What to make of the exit codes of those that had failed when torchrun looked; -9 is an end by signal 9."""
    if len(set(found)) == 1 and found[0] in STOPPED:
        return found[0]
    return UNTOLD if len(found) == num_processes and max(found) < 0 else TOLD


if __name__ == "__main__":
    main()
