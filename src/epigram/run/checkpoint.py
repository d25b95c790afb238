"""Checkpoints: everything a run needs to go on, written in the background, so that one is either complete or absent.

A checkpoint is a folder `step-NNNNNNNN` with tensors in safetensors files and `state.json`. It is written under another
name through torch.distributed.checkpoint, in whose safetensors format nothing is pickled; every process writes its
share. `state.json` comes last, and lists all files with sizes and checksums; then the folder is flushed and renamed.

Names of tensors are "part.name", the same whatever the number of processes. A tensor that several processes hand in is
the same in all of them and is written by one; one that a single process hands in is written by that; a DTensor is
written in pieces, each by the process that has it. Whoever resumes asks for names, and gets whole tensors.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from epigram.dist.context import Context
from epigram.dist.share import as_whole, is_shared, mesh_over, own_part
from epigram.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FOLDER = "checkpoints"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})$")
_STATE = {"step", "times_s", "trained_s", "loader", "facts"}
_TENSORS = ".safetensors"
_CHUNK_BYTES = 1 << 20
_HEADER_BYTES = 64 * 1024  # of each file, and state.json: in forecasts

Parts = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """tensors by name, on the CPU. state: plain JSON values.

    step; times_s: the clock at the start of each step; trained_s: what the steps really took; loader: its position;
    facts: what a result says of the run so far; and whatever else the run that wrote it put in.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under "prefix.", without it."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}


class Saver:
    """Writes checkpoints in a thread, one at a time; every process has one, and all of them call alike.

    Several processes agree in a group of their own, so that nothing of it meets what the training loop sends.
    """

    def __init__(self, context: Context | None = None) -> None:
        self._context = context or Context()
        self._group = dist.new_group(backend="gloo") if self._context.has_peers else None
        self._staged: dict[str, Tensor] = {}  # what this process has of each tensor
        self._whole_rows: dict[str, int] = {}  # of tensors that processes share
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, run: Path, step: int, parts: Parts, state: dict[str, Any], keep: int) -> None:
        """Copy the state to the host and begin to write the checkpoint of `step`; then go on at once.

        When it is there, all but the newest `keep` are dropped (0: none). Waits for the one before, if that is still
        being written, and raises what `wait` would.
        """
        assert state.keys() >= _STATE
        self.wait()
        ready = self._stage(parts)
        self._writing = self._thread.submit(self._write, ready, run, step, json.dumps(state), keep)

    def wait(self) -> None:
        """Until the last checkpoint is on the disk. Raises UserError when it could not be written.

        Then those from before are still there, and a later one may be tried.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    @property
    def failed(self) -> bool:
        """Whether the last one is known to have failed; `wait` says why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def close(self) -> None:
        """End the thread, after what it is writing; an error is left unsaid."""
        self._thread.shutdown()

    def _stage(self, parts: Parts) -> Callable[[], None]:
        """Copy all tensors to the host, in page-locked memory from CUDA, where it is used again each time.

        Returns what waits until the copies are there: this thread need not.
        """
        live = {f"{part}.{name}": tensor.detach() for part, named in parts.items() for name, tensor in named.items()}
        self._whole_rows = {name: len(tensor) for name, tensor in live.items() if is_shared(tensor)}
        self._staged = {name: tensor for name, tensor in self._staged.items() if name in live}
        for name, whole in live.items():
            tensor, staged = own_part(whole), self._staged.get(name)
            if tensor.device.type != "cuda":
                self._staged[name] = tensor.to("cpu", copy=True).contiguous()
                continue
            if staged is None or staged.shape != tensor.shape or staged.dtype != tensor.dtype:
                staged = self._staged[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            staged.copy_(tensor, non_blocking=True)
        if self._context.device.type != "cuda":
            return lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return copied.synchronize

    def _write(self, ready: Callable[[], None], run: Path, step: int, state: str, keep: int) -> None:
        if self._context.device.type == "cuda":
            torch.cuda.set_device(self._context.device)  # a thread begins with the first one
        ready()
        try:
            num_bytes = _write_beside(self._context.is_main, self._group, run, step, self._named_wholes())
            self._together(partial(_complete, run, step, num_bytes, state, keep))
        except (OSError, SafetensorError, _RemoteError) as error:
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {run / FOLDER} ({error}): make room there; "
                "what was written before is complete"
            ) from error
        finally:
            if self._context.is_main:
                shutil.rmtree(_beside(run, step), ignore_errors=True)

    def _named_wholes(self) -> dict[str, Tensor]:
        """The copies on the host, shared ones as DTensors over the group that writes."""
        shared = self._whole_rows.items()
        return self._staged | {name: as_whole(self._staged[name], rows, self._mesh) for name, rows in shared}

    @cached_property
    def _mesh(self) -> "DeviceMesh | None":
        return mesh_over(self._group, "cpu") if self._group is not None else None

    def _together(self, work: Callable[[], None]) -> None:
        """Do `work` in the first process; when it fails there, it fails in all."""
        problem: OSError | None = None
        if self._context.is_main:
            try:
                work()
            except OSError as error:
                problem = error
        if self._group is not None:
            failed = torch.tensor(int(problem is not None))
            dist.all_reduce(failed, group=self._group)
            if failed and problem is None:
                raise _RemoteError("the first process could not complete it")
        if problem is not None:
            raise problem


class _RemoteError(RuntimeError):
    """What went wrong in another process, or within torch.distributed.checkpoint, in words."""


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    folder = run / FOLDER
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name)) if folder.is_dir() else []


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def forecast_bytes(parts: Parts) -> int:
    """What a checkpoint of these tensors will take on the disk."""
    return _HEADER_BYTES + sum(t.numel() * t.element_size() for named in parts.values() for t in named.values())


def load(path: Path) -> Checkpoint:
    """A checkpoint folder, or the newest one of a run folder, which may be writing others meanwhile.

    Raises UserError when there is none or it is damaged.
    """
    if _NAME.match(path.name):
        return _load(path)
    while found := complete(path):
        try:
            return _load(found[-1])
        except UserError:
            if os.path.lexists(found[-1]):  # else it made way for a newer one
                raise
    raise UserError(
        f"{path} holds no complete checkpoint: train it again, or name another run (one is written at the end of "
        "training, and before it every run.checkpoint_every_s seconds)"
    )


def _load(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / STATE).read_text("utf-8"))
        if not isinstance(state, dict) or not state.keys() >= {*_STATE, "files"}:
            raise ValueError(f"{STATE} is not what this release writes")
        for name, (num_bytes, crc) in state.pop("files").items():
            if (found_bytes := (path / name).stat().st_size) != num_bytes:
                raise ValueError(f"{name} has {found_bytes:,} bytes instead of {num_bytes:,}")
            if _crc(path / name) != crc:
                raise ValueError(f"{name} has other bytes than were written")
        return Checkpoint(_read(path), state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the checkpoint {path} is damaged ({error}): remove it and use an older one") from error


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors, put together of whatever pieces the processes wrote."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in metadata.items()}  # type: ignore[union-attr]
    with _quiet(), _plain_errors():
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _write_beside(
    is_main: bool, group: dist.ProcessGroup | None, run: Path, step: int, tensors: dict[str, Tensor]
) -> int:
    """The files with tensors, on the disk; returns the bytes of all of them, whoever wrote them.

    What a killed run left under any such name goes.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    if is_main:
        for leftover in (run / FOLDER).glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # the others wait in a message by now
    # Each process makes the folder if it is not there, and writes when all have planned: the first one, which may
    # remove another's, has made its own by then. The writer has one thread: what goes wrong in further ones,
    # torch drops in silence.
    writer = HuggingFaceStorageWriter(str(_beside(run, step)), save_distributed=True, thread_count=1)
    writer.per_thread_copy_ahead = 0  # else it waits for the stream of the device, on which training goes on
    with _quiet(), _plain_errors():
        written = dcp.save(
            tensors, storage_writer=writer, planner=DefaultSavePlanner(), process_group=group, no_dist=group is None
        )
    return sum(m.size.numel() * m.properties.dtype.itemsize for m in written.state_dict_metadata.values())


def _complete(run: Path, step: int, num_bytes: int, state: str, keep: int) -> None:
    """Add the state to the tensors' folder, give it its name, and drop older ones.

    A checkpoint of this step that is there already (a run resumed at its end) makes way, and goes when this one has its
    name.
    """
    beside, target = _beside(run, step), run / FOLDER / f"step-{step:08d}"
    paths = [path for path in beside.iterdir() if path.name.endswith(_TENSORS)]
    files = {path.name: (path.stat().st_size, _crc(path)) for path in paths}
    if sum(size for size, _ in files.values()) < num_bytes:
        raise OSError("files of other processes are not there: all machines of a run need the same file system")
    (beside / STATE).write_text(json.dumps({**json.loads(state), "files": files}), "utf-8")
    for path in (beside / STATE, beside):
        _flush(path)
    before = target.with_name(".writing-before")
    if target.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(target, before)
    try:
        os.replace(beside, target)
    except OSError:
        if before.exists():
            os.replace(before, target)
        raise
    _flush(target.parent)
    if before.exists():
        shutil.rmtree(before, ignore_errors=True)
    for old in complete(run)[:-keep] if keep else []:
        # Under another name first: a run that is killed meanwhile must not leave half of one under this.
        os.replace(old, gone := old.with_name(f".writing-{old.name}"))
        shutil.rmtree(gone, ignore_errors=True)


def _crc(path: Path) -> int:
    """CRC-32 of a file's bytes: it finds damage, and is no protection against malice."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def _beside(run: Path, step: int) -> Path:
    return run / FOLDER / f".writing-{step:08d}"


@contextmanager
def _quiet() -> Iterator[None]:
    """One process without a process group is what is meant, not a mistake to warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _plain_errors() -> Iterator[None]:
    """torch wraps what goes wrong in an exception that is no Exception; the first cause is raised instead."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        if isinstance(cause, OSError | SafetensorError):
            raise cause from error
        raise _RemoteError(f"rank {rank}: {type(cause).__name__}: {cause}") from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
