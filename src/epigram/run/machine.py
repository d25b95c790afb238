"""Facts about this machine and this installation, collected once and stored with a run.

Every function answers with plain values that fit into JSON, and with None where a fact cannot be had.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# The distributions whose versions can change a result or its timing.
_LIBRARIES = (
    "epigram",
    "torch",
    "numpy",
    "sentencepiece",
    "brotli",
    "constriction",
    "zstandard",
    "triton",
    "flash-attn-4",
    "quack-kernels",
    "nvidia-cutlass-dsl",
)
_TIMEOUT_S = 10


def environment(paths: dict[str, str] | None = None, **facts: Any) -> dict[str, Any]:
    """What environment.json holds. paths: the backends and kernels in use; facts: whatever else matters, such as what
    `computing` says."""
    return {
        "command": command(),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": cpu_count(),
        "threads": thread_count(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus(),
        "driver": nvidia_driver(),
        "cuda": cuda_versions(),
        "paths": paths or {},
        **facts,
    }


def computing(device: "torch.device", num_processes: int) -> dict[str, Any]:
    """What a run computes on: the kind and the name of each process's device, and how many processes there are."""
    name = cpu_name()
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    return {"device": {"type": device.type, "name": name}, "processes": num_processes}


def versions() -> dict[str, str]:
    """Python and the installed ones of the libraries that matter."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command() -> list[str]:
    """What was typed to start this process: without the folder that the program lies in on this machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:  # a script, or the installed command
        program = Path(sys.argv[0])
        return [program.name if program.is_absolute() else sys.argv[0], *sys.argv[1:]]
    module = spec.name.removesuffix(".__main__")
    return [*(["epigram"] if module == "epigram" else ["python", "-m", module]), *sys.argv[1:]]


def commit() -> dict[str, Any] | None:
    """{"hash", "changed"} of the checkout that this package runs from; None for an installed copy.

    changed: whether any file of the package differs from that commit, or is not in it.
    """
    file = Path(__file__).resolve()
    folder = file.parents[1]
    # An installed copy may lie inside a repository of the user's; then its files are not tracked there.
    if _output("git", "-C", str(folder), "ls-files", "--error-unmatch", str(file)) is None:
        return None
    found = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if found is None:
        return None
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=all", ".")
    return {"hash": found, "changed": bool(changed)}


def cpu_name() -> str:
    """The processor's name as the system gives it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def cpu_count() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def thread_count() -> int | None:
    """Threads of one CPU operation of torch."""
    try:
        import torch
    except ImportError:
        return None
    return torch.get_num_threads()


def memory_bytes() -> int | None:
    """Memory that this process may use: the machine's, or the container's limit where that is less."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # names unknown to this system
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return found


def cpp_compiler() -> str | None:
    """Where a C++ compiler is that torch.compile can use."""
    return next(filter(None, map(shutil.which, ("g++", "clang++", "cl"))), None)


def python_header() -> Path | None:
    """Where Python.h is, which compiled code includes."""
    path = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return path if path.is_file() else None


def peak_memory_bytes(device_type: str) -> int:
    """The most that was used so far: of the device's allocator on CUDA, of the process elsewhere; 0 if unknown."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of each CUDA device; empty without any."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = [facts.major, facts.minor]
        found.append({"name": facts.name, "capability": capability, "memory_bytes": facts.total_memory})
    return found


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver."""
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def cuda_versions() -> dict[str, str] | None:
    """Of CUDA and cuDNN, as torch was built for them; None without either."""
    try:
        import torch
    except ImportError:
        return None
    if torch.version.cuda is None:
        return None
    return {"runtime": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}


def _output(*command: str) -> str | None:
    """What a command prints; None when there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
