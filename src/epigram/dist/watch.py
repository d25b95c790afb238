"""When one process of a run fails, all learn which and why, and all end soon.

Every process keeps a connection to rank 0 open. One that fails says so there, and rank 0 passes the first such message
on to all; one that is killed says nothing, but its connection closes, or falls silent when its machine is gone. Whoever
learns of a failure has some seconds to end in good order, for it may be waiting for the lost process in a collective
that never returns; then a thread ends it. Nothing of this is sent while all is well.
"""

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from epigram.errors import LostPeerError

GRACE_S = 10.0
"""From the news of a failure to the end of a process that does not end by itself."""

FAILED = 2  # exit code
_NEWS_S = 5.0  # a connection that broke is explained by then, or never
_KEY_BYTES = 16
_MAX_LINE = 65536
_MAX_CAUSE = 5_000  # characters, each of which JSON may write as twelve


class Failure:
    """The first failure of a run. cause: None when the process was killed. reporter: the rank whose terminal tells."""

    def __init__(self, rank: int, cause: str | None) -> None:
        self.rank, self.cause = rank, cause
        self.reporter = rank if cause is not None else int(rank == 0)

    def __str__(self) -> str:
        if self.cause is None:
            return f"rank {self.rank} was killed or lost: it left no message (the system ends a process without memory)"
        return f"rank {self.rank}: {self.cause}"


class Watch:
    """One for each process of several; made by all of them at a time, after the process group.

    host: where rank 0 can be reached.
    """

    def __init__(self, rank: int, world_size: int, host: str) -> None:
        self.rank = rank
        self.failure: Failure | None = None
        self.last_words: Callable[[str], None] | None = None  # called with the cause before a process is ended
        self._known = threading.Event()
        self._lock = threading.Lock()
        self._peers: dict[socket.socket, int] = {}  # and their ranks; -1 until they said who they are
        self._buffers: dict[socket.socket, bytes] = {}
        self._gone: set[int] = set()  # who left in good order
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        local = host in ("localhost", "127.0.0.1")
        if rank == 0:
            self._server = socket.create_server(("127.0.0.1" if local else "", 0), backlog=world_size)
            self._selector.register(self._server, selectors.EVENT_READ)
        port, self._key = _announced(self._server)
        if rank != 0:
            self._add(socket.create_connection((host, port), timeout=60), 0)
            self._send(next(iter(self._peers)), {"key": self._key, "rank": rank})
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._thread.start()

    def report(self, cause: str) -> Failure:
        """This process fails; returns the failure that came first, which may be another's."""
        cause = cause[:_MAX_CAUSE]
        if self.rank == 0:
            self._fail(0, cause)
        else:
            for peer in list(self._peers):
                self._send(peer, {"failed": cause})
            if not self._known.wait(_NEWS_S):  # rank 0 does not answer
                self._fail(self.rank, cause)
        assert self.failure is not None
        return self.failure

    def explain(self) -> Failure | None:
        """The failure behind a broken connection, if there is one to be learned of."""
        self._known.wait(_NEWS_S)
        return self.failure

    def lost(self) -> LostPeerError:
        """The failure, which is known, as what a process raises that did not cause it."""
        assert self.failure is not None
        return LostPeerError(str(self.failure), told=self.failure.reporter != self.rank)

    def leave(self) -> None:
        """This process ends in good order: that it is gone is no failure."""
        for peer in list(self._peers):
            self._send(peer, {"left": self.rank})
        self._closing = True

    def _work(self) -> None:
        deadline_s = None
        while not self._closing:
            for key, _ in self._selector.select(timeout=0.5):
                if key.fileobj is self._server:
                    self._add(self._server.accept()[0], -1)
                elif isinstance(key.fileobj, socket.socket):
                    self._read(key.fileobj)
            if self.failure is not None:
                deadline_s = deadline_s or time.monotonic() + GRACE_S
                if time.monotonic() >= deadline_s:
                    self._end()

    def _end(self) -> None:
        """The main thread waits for something that will not come, or is stuck on its way out."""
        if self.last_words is not None:
            with suppress(Exception):
                self.last_words(str(self.failure))
        if self.failure is not None and self.failure.reporter == self.rank:
            print(f"epigram: {self.failure}", file=sys.stderr, flush=True)
        os._exit(FAILED)

    def _fail(self, rank: int, cause: str | None) -> None:
        """The first to come here is the failure of the run."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = Failure(rank, cause)
        if self.rank == 0:
            for peer in list(self._peers):
                self._send(peer, {"rank": rank, "cause": cause})
        self._known.set()

    def _add(self, peer: socket.socket, rank: int) -> None:
        """A machine that is gone closes nothing: silence is noticed after 15 seconds."""
        peer.settimeout(5)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._peers[peer], self._buffers[peer] = rank, b""
        self._selector.register(peer, selectors.EVENT_READ)

    def _send(self, peer: socket.socket, message: dict[str, object]) -> None:
        with suppress(OSError):  # whoever is gone need not know
            peer.sendall(json.dumps(message).encode() + b"\n")

    def _read(self, peer: socket.socket) -> None:
        try:
            received = peer.recv(_MAX_LINE)
        except OSError:
            received = b""
        *lines, rest = (self._buffers[peer] + received).split(b"\n")
        self._buffers[peer] = rest
        try:
            for line in lines:
                self._take(peer, json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # somebody who looks for open ports
            received = b""
        if not received or len(rest) > _MAX_LINE:
            self._drop(peer)

    def _take(self, peer: socket.socket, message: dict) -> None:
        if self._peers[peer] == -1:  # a stranger until it gives the key
            if message.get("key") == self._key:
                self._peers[peer] = message["rank"]
                if self.failure is not None:
                    self._send(peer, {"rank": self.failure.rank, "cause": self.failure.cause})
        elif "left" in message:
            self._gone.add(self._peers[peer])
        elif "failed" in message:
            self._fail(self._peers[peer], message["failed"])
        elif "cause" in message:
            self._fail(message["rank"], message["cause"])

    def _drop(self, peer: socket.socket) -> None:
        rank = self._peers.pop(peer)
        self._selector.unregister(peer)
        peer.close()
        if rank != -1 and rank not in self._gone:
            self._fail(rank, None)


def _announced(server: socket.socket | None) -> tuple[int, str]:
    """Rank 0's port, and a key by which it knows its own, sent to all; server: rank 0's, None in the others."""
    import torch  # here, since commands that only read run folders do without it
    import torch.distributed as dist

    words = torch.zeros(1 + _KEY_BYTES, dtype=torch.int64)
    if server is not None:
        words[0] = server.getsockname()[1]
        words[1:] = torch.tensor(list(secrets.token_bytes(_KEY_BYTES)))
    dist.broadcast(words, src=0)
    port, *key = words.tolist()
    return port, bytes(key).hex()


current: Watch | None = None
"""That of this process while its process group is open, None with one process: there is one of it, as of the group."""
