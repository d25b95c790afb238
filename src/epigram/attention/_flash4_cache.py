"""Lets flash-attn-4 keep its compiled kernels on disk, so that only the first run on a machine waits for them.

The library compiles a kernel for each kind of call, which takes seconds, in every process of every run. It can store
them, but reads from the environment whether and where, once, when it is imported; so the defaults are set before that,
and what the user has set counts. Its store is keyed by a hash over its sources and the versions of its compiler, takes
a lock for each file, renames finished files into place, and compiles again what it cannot load.

What it lacks is added here. Not every key names the GPU's architecture, so each architecture gets a folder of its own.
The files are loaded as code, so the folder must be the user's alone (the library's own default lies in the temp
folder). And a file system without locks would fail each kernel after fifteen seconds, so a lock is tried first.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

import torch

from epigram.user_cache import user_cache

_ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
_FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


def enable(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the defaults for flash-attn-4's import, unless the user has set one of them or the folder is of no use."""
    chosen = _ENABLED in environment or _FOLDER in environment
    if chosen or os.name != "posix" or not torch.cuda.is_available():
        return
    major, minor = torch.cuda.get_device_capability()
    folder = user_cache(environment) / "flash4" / f"sm{major}{minor}"
    if why_not_safe(folder) is None:
        environment.update({_ENABLED: "1", _FOLDER: str(folder)})


def why_not_safe(folder: Path) -> str | None:
    """Why code must not be kept in `folder`, which is made if need be; None when it can."""
    import fcntl  # POSIX only

    probe = folder / ".lock"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
            return "others may write there"
        descriptor = os.open(probe, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        return f"it cannot be written ({error.strerror})"
    try:
        # Shared: eight processes of a run try at the same time, and none may refuse another's.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return f"it has no locks ({error.strerror})"
    finally:
        os.close(descriptor)
    return None
