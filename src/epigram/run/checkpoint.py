"""Checkpoints: everything a run needs to go on, written so that one is either complete or absent.

A checkpoint is a folder `step-NNNNNNNN` with `tensors.safetensors` and `state.json`; it is written under another name,
flushed, and renamed. No pickle. Names of tensors are "model.*", "optimizer.*", "average.*".
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from epigram.errors import UserError

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})$")
_STATE = {"step", "times_s", "trained_s", "loader", "facts"}


@dataclass(frozen=True)
class Checkpoint:
    """tensors by name, on the CPU. state: plain JSON values.

    step; times_s: the clock at the start of each step; trained_s: what the steps really took; loader: its position;
    facts: what a result says of the run so far.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under "prefix.", without it."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}


def save(run: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep` (0: none).

    Raises UserError when it cannot be written; then those from before are still there.
    """
    assert state.keys() == _STATE
    folder = run / FOLDER
    target, beside = folder / f"step-{step:08d}", folder / f".writing-{step:08d}"
    tensors = {
        f"{part}.{name}": t.detach().cpu().contiguous() for part, named in parts.items() for name, t in named.items()
    }
    try:
        _write(beside, tensors, state)
        _replace(beside, target)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint of step {step} cannot be written to {folder} ({error}): make room there; "
            "what was written before is complete"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for old in complete(run)[:-keep] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return target


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    folder = run / FOLDER
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name)) if folder.is_dir() else []


def load(path: Path) -> Checkpoint:
    """A checkpoint folder, or the newest one of a run folder. Raises UserError when there is none or it is damaged."""
    if not _NAME.match(path.name):
        found = complete(path)
        if not found:
            raise UserError(
                f"{path} holds no complete checkpoint: name another run (one is written at the end of training, and "
                "before it every run.checkpoint_every_s seconds)"
            )
        path = found[-1]
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        if not isinstance(state, dict) or not state.keys() >= _STATE:
            raise ValueError("state.json is not what this release writes")
        return Checkpoint(load_file(path / "tensors.safetensors"), state)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the checkpoint {path} is damaged ({error}): remove it and use an older one") from error


def _write(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """A folder with both files, on the disk; what a killed run left under any such name goes."""
    for leftover in folder.parent.glob(".writing-*"):
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "tensors.safetensors")
    (folder / "state.json").write_text(json.dumps(state), "utf-8")
    for file in folder.iterdir():
        _flush(file)


def _replace(source: Path, target: Path) -> None:
    """Rename; a checkpoint of this step that is there already (a run resumed at its end) makes way."""
    if target.exists():
        os.replace(target, old := target.with_name(".writing-old"))
        shutil.rmtree(old)
    os.replace(source, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
