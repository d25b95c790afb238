"""Where epigram keeps what is the user's and outlives a run: compiled kernels, and marks of them."""

import os
from collections.abc import Mapping
from pathlib import Path


def user_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """epigram in the user's cache folder (XDG base directories); it need not exist."""
    base = environment.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "epigram"
