"""The libraries that a record's script imports, as `requirements.txt` declares them."""

import ast
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata

from epigram.errors import UserError

# Modules that are not called like their distribution.
DISTRIBUTIONS = {"tomli_w": "tomli-w", "flash_attn": "flash-attn-4", "quack": "quack-kernels", "yaml": "pyyaml"}
UNPUBLISHED = frozenset({"flash_attn_interface", "flash_attn_config"})  # FlashAttention 3 is built from source
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@cache
def imported(text: str) -> frozenset[str]:
    """Top-level modules outside the standard library that a source text imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return frozenset(name.split(".")[0] for name in found) - sys.stdlib_module_names


def distribution(module: str) -> str:
    """The name under which a module is installed, normalised."""
    return normal(DISTRIBUTIONS.get(module, module))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(text: str) -> set[str]:
    """Names in a requirements file, normalised."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {normal(m[0]) for line in lines if not line.startswith("-") and (m := _NAME.match(line))}


def requirements(sources: Iterable[str], versions: Mapping[str, str], *, on_gpu: bool) -> str:
    """Lines for what `sources` import: the version that the runs used if it is known, else what the package asks.

    versions: by distribution, from a run's environment.json. What only GPUs need is left out of runs without one, and
    what the runs did not have installed too.
    """
    used = {distribution(name) for text in sources for name in imported(text) - UNPUBLISHED} - {"epigram"}
    known, lines = _asked_for(), []
    pinned = {normal(name): version.partition("+")[0] for name, version in versions.items()}
    for name in sorted(used):
        if name not in known:
            raise UserError(f"the sources import {name}, which pyproject.toml does not declare")
        specifier, extra = known[name]
        if extra and not (on_gpu and extra in ("kernels", "flash4") and name in pinned):
            continue
        lines.append(f"{name}=={pinned[name]}" if name in pinned else f"{name}{specifier}")
    return "\n".join(lines) + "\n"


def _asked_for() -> dict[str, tuple[str, str]]:
    """Distribution -> version specifier and extra ("" for what is always needed), as the package declares them."""
    try:
        lines = metadata.requires("epigram") or []
    except metadata.PackageNotFoundError as error:
        raise UserError("epigram is not installed, so its libraries are not known: pip install -e .") from error
    found: dict[str, tuple[str, str]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"](.+?)['\"]", marker)
        parts = re.match(r"([A-Za-z0-9._-]+)(?:\[.*?\])?\s*(.*)", requirement.strip())
        if parts:
            found.setdefault(normal(parts[1]), (parts[2].strip("() "), extra[1] if extra else ""))
    return found
