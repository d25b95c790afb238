"""Training windows from shards, prepared ahead in the background."""

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epigram.data.lanes import Lane, length_groups
from epigram.data.shard_files import ShardFiles
from epigram.data.shards import Shard
from epigram.data.stream import WindowStream
from epigram.errors import DataError, UserError

_STATE_VERSION = 1
_POLL_S = 0.1  # how long a thread that should end may go on waiting


@dataclass(frozen=True)
class _Prepared:
    """A step ready to be handed out: a tensor for each lane asked for, and the streams' states behind it."""

    windows: list[Tensor]
    states: list[dict[str, Any]]


class Loader:
    """Gives the windows of step after step, for all lanes or for those that this process executes.

    shards: of the train split, in order. lanes: all lanes of the recipe; the order of windows depends on
    them, on the lengths of the shards and on `seed`, not on which process asks or where the files lie.
    lane_indices: the lanes wanted, all by default; what the others get is drawn all the same, so every
    process has the same state. prefetch: steps prepared ahead by a thread; 0 prepares each when it is asked
    for. pin: put the windows into page-locked memory, from which a copy to a CUDA device need not wait.
    vocab_size: when given, larger ids are an error.

    Raises UserError or DataError for lanes, a seed or shards that cannot be; what goes wrong in the
    background is raised by `next_step`. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        lanes: Sequence[Lane],
        seed: int,
        prefetch: int = 2,
        *,
        lane_indices: Sequence[int] | None = None,
        pin: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self._shards, self._lanes, self._seed = tuple(shards), tuple(lanes), seed
        self._lane_indices = tuple(range(len(lanes)) if lane_indices is None else lane_indices)
        self._prefetch, self._pin, self._vocab_size = prefetch, pin, vocab_size
        self._check()
        self._groups = length_groups(lanes)
        self._files = ShardFiles(self._shards)
        self._fingerprint = self._files.fingerprint()
        self._streams = self._new_streams()
        self._states = [stream.state() for stream in self._streams]  # of what was handed out
        self._background: _Background | None = None
        self._error: BaseException | None = None
        self._closed = False

    def _check(self) -> None:
        problems = []
        if not self._shards:
            problems.append("there are no shards to read")
        if self._seed < 0:
            problems.append(f"seed = {self._seed} must not be negative")
        if self._prefetch < 0:
            problems.append(f"prefetch = {self._prefetch} must not be negative")
        if unknown := [index for index in self._lane_indices if not 0 <= index < len(self._lanes)]:
            problems.append(f"lanes {unknown} do not exist: there are {len(self._lanes)}")
        if problems:
            raise UserError("; ".join(problems))

    def _new_streams(self) -> list[WindowStream]:
        shard_tokens = [shard.num_tokens for shard in self._shards]
        return [WindowStream(shard_tokens, self._groups, i, self._seed) for i in range(len(self._groups))]

    def next_step(self) -> list[Tensor]:
        """The next step: for each lane asked for an int64 tensor (num_seqs, seq_len + 1).

        Inputs are [:, :-1], targets [:, 1:]. The tensors are the caller's own.
        """
        if self._error is not None:
            raise self._error
        assert not self._closed, "the loader is closed"
        if not self._prefetch:
            prepared = self._prepare()
        else:
            if self._background is None:
                self._background = _Background(self._prepare, self._prefetch)
            prepared = self._from_background(self._background)
        self._states = prepared.states
        return prepared.windows

    def _from_background(self, background: "_Background") -> _Prepared:
        prepared = background.take()
        if isinstance(prepared, BaseException):
            self._error = prepared
            self.close()
            raise prepared
        return prepared

    def _prepare(self) -> _Prepared:
        windows: dict[int, Tensor] = {}
        for group, stream in zip(self._groups, self._streams, strict=True):
            drawn = stream.draw()
            for lane, places in zip(group.lanes, group.deal(), strict=True):
                if lane in self._lane_indices:
                    windows[lane] = self._gather(drawn[list(places)], group.seq_len + 1)
        states = [stream.state() for stream in self._streams]
        return _Prepared([windows[lane] for lane in self._lane_indices], states)

    def _gather(self, windows: NDArray[np.int64], num_tokens: int) -> Tensor:
        """Read windows (N, 2), shard and offset, of `num_tokens` each."""
        tokens = np.empty((len(windows), num_tokens), np.uint16)
        places = windows.tolist()
        for row, (shard, start) in zip(tokens, places, strict=True):
            self._files.read(shard, start, row)
        self._files.verify({shard for shard, _ in places})
        if self._vocab_size is not None and (largest := int(tokens.max())) >= self._vocab_size:
            shard, _ = places[int(np.argmax(tokens.max(axis=1)))]
            raise DataError(
                f"shard {self._shards[shard].path} holds the id {largest}, beyond the vocabulary of "
                f"{self._vocab_size:,}: it was made with another tokenizer"
            )
        gathered = torch.empty(tokens.shape, dtype=torch.int64, pin_memory=self._pin)
        gathered.numpy()[...] = tokens
        return gathered

    @property
    def passes(self) -> dict[int, float]:
        """For each length the passes over its part of the text that the steps handed out have made."""
        streams = self._new_streams()
        for stream, state in zip(streams, self._states, strict=True):
            stream.restore(state)
        return {group.seq_len: stream.passes for group, stream in zip(self._groups, streams, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """State after the last step that was handed out, in plain values: the same in every process."""
        return {"version": _STATE_VERSION, **self._identity(), "streams": self._states}

    def _identity(self) -> dict[str, Any]:
        lanes = [[lane.seq_len, lane.num_seqs] for lane in self._lanes]
        return {"seed": self._seed, "lanes": lanes, "shards": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; UserError when seed, lanes or data are others than then."""
        if state.get("version") != _STATE_VERSION:
            raise UserError(
                f"the loader's state has version {state.get('version')}, not {_STATE_VERSION}: start a new run"
            )
        changed = [name for name, value in self._identity().items() if state[name] != value]
        if changed:
            raise UserError(
                f"the run cannot go on with other data: {', '.join(changed)} changed since the checkpoint "
                "(restore them, or start a new run)"
            )
        self._stop()
        self._streams = self._new_streams()
        for stream, saved in zip(self._streams, state["streams"], strict=True):
            stream.restore(saved)
        self._states = [stream.state() for stream in self._streams]
        self._error = None

    def _stop(self) -> None:
        if self._background is not None:
            self._background.stop()
            self._background = None

    def close(self) -> None:
        """End the thread and close the files."""
        self._stop()
        self._files.close()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Background:
    """A thread that keeps a few results of `prepare` ready; an exception is the last of them."""

    def __init__(self, prepare: Callable[[], _Prepared], depth: int) -> None:
        self._prepare: Callable[[], _Prepared] = prepare
        self._ready: queue.Queue[_Prepared | BaseException] = queue.Queue(depth)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def take(self) -> _Prepared | BaseException:
        return self._ready.get()

    def stop(self) -> None:
        """End the thread; what it prepared is dropped."""
        self._ending.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ending.is_set():
            result: _Prepared | BaseException
            try:
                result = self._prepare()
            except Exception as error:  # raised again by the caller's next_step
                result = error
            self._put(result)
            if isinstance(result, BaseException):
                return

    def _put(self, result: "_Prepared | BaseException") -> None:
        while not self._ending.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(result, timeout=_POLL_S)
                return
