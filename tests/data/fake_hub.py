"""A server on the loopback that speaks the hub's protocol, and goes wrong on command.

Two addresses: the hub (commits, listing in pages, resolving names) redirects to a store (byte ranges), as the real one
does. `faults` are used up one by one by the requests they apply to.
"""

import hashlib
import json
import socket
import struct
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO, COMMIT = "someone/shards", "c0ffee" + 34 * "0"
API_FAULTS = ("429", "500", "503", "reset", "not json")
STORE_FAULTS = (
    "429", "500", "503", "reset", "cut", "short", "long", "flipped byte", "other range", "no ranges", "page", "stall",
    "slow", "expired", "endless",
)  # fmt: skip
ALTERING = {"short", "long", "flipped byte", "other range", "page", "endless"}  # bytes come that are not the file's
WRONG_LENGTH = {"short", "long", "endless"}  # those that a client mends by itself


class FakeHub:
    """Serves `files` (path in the repository to contents) of one dataset repository; a context manager.

    large: paths whose SHA-256 is stated, as for files in large-file storage; for others git's hash. requests: a line
    for each. faults: names from STORE_FAULTS for the store, API_FAULTS for the hub itself.
    """

    def __init__(self, files: dict[str, bytes], *, page_entries: int = 3, token: str | None = None) -> None:
        self.files, self.page_entries, self.token = files, page_entries, token
        self.api_faults: deque[str] = deque()
        self.store_faults: deque[str] = deque()
        self.used: list[str] = []
        self.requests: list[str] = []
        self.wrong_hashes: set[str] = set()  # paths whose stated hash is a lie
        self.stated: dict[str, str] = {}  # other hashes that the listing states
        self.stall_s = 1.0
        self._lock = threading.Lock()

    def __enter__(self) -> "FakeHub":
        self._store = _Server(self, _Store)
        self._hub = _Server(self, _Hub)
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()
        self._hub.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def store(self) -> str:
        return f"http://127.0.0.1:{self._store.server_port}"

    def next_fault(self, faults: "deque[str]", line: str) -> str | None:
        with self._lock:
            self.requests.append(line)
            if not faults:
                return None
            self.used.append(faults.popleft())
            return self.used[-1]

    def sha256(self, path: str) -> str:
        lie = b"another" if path in self.wrong_hashes else b""
        return hashlib.sha256(self.files[path] + lie).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        contents = self.files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()
        entry: dict[str, Any] = {"type": "file", "oid": blob, "size": len(contents), "path": path}
        if Path(path).suffix != ".md":
            entry["lfs"] = {"oid": self.stated.get(path, self.sha256(path)), "size": len(contents), "pointerSize": 134}
        return entry


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: FakeHub, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients hang up on purpose

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def general_fault(self, fault: str | None) -> bool:
        """Faults that any request can meet; whether this was one."""
        if fault in ("429", "500", "503"):
            headers = {"Retry_After": "0"} if fault == "429" else {}
            self.answer(int(fault), b"busy", **headers)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            return False
        self.close_connection = True
        return True


class _Hub(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        fault = hub.next_fault(hub.api_faults, f"{self.command} {self.path}") if parts[0] == "api" else None
        if self.general_fault(fault):
            return
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, b"{}", X_Error_Code="RepoNotFound", Content_Type="application/json")
            return
        if fault == "not json":
            self.answer(200, b"<html>a proxy's page</html>", Content_Type="application/json")
            return
        if "/".join(parts[2:4] if parts[0] == "api" else parts[1:3]) != REPO:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            return
        if parts[0] == "api" and parts[4:5] == ["tree"]:
            self.listing(unquote("/".join(parts[6:])), parse_qs(url.query))
            return
        if parts[0] == "api":
            body = {"id": REPO, "sha": COMMIT, "private": False, "downloads": 0, "likes": 0, "tags": []}
            self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            return
        self.resolve("/".join(parts[5:]))

    def listing(self, folder: str, query: dict[str, list[str]]) -> None:
        hub = self.server.hub
        paths = [path for path in sorted(hub.files) if not folder or path.startswith(folder + "/")]
        start = int(query.get("cursor", ["0"])[0])
        page = [hub.entry(path) for path in paths[start : start + hub.page_entries]]
        headers = {"Content_Type": "application/json"}
        if start + hub.page_entries < len(paths):
            place = self.path.split("?")[0]
            following = f"{hub.endpoint}{place}?recursive=True&cursor={start + hub.page_entries}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.answer(200, json.dumps(page).encode(), **headers)

    def resolve(self, path: str) -> None:
        hub = self.server.hub
        if path not in hub.files:
            self.answer(404, b"", X_Error_Code="EntryNotFound")
            return
        self.answer(
            302,
            Location=f"{hub.store}/{path}",
            X_Repo_Commit=COMMIT,
            X_Linked_Etag=f'"{hub.sha256(path)}"',
            X_Linked_Size=str(len(hub.files[path])),
        )


class _Store(_Handler):
    def do_GET(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path.lstrip("/"))
        asked = self.headers.get("Range")
        fault = hub.next_fault(hub.store_faults, f"{self.command} {path} {asked or ''}".strip())
        if self.general_fault(fault):
            return
        if "authorization" in self.headers:  # a token must not reach the store
            self.answer(400)
            return
        if fault == "expired":
            self.answer(504, b"expired")
            return
        contents = hub.files[path]
        first, end = 0, len(contents)
        if asked and fault != "no ranges":
            low, _, high = asked.removeprefix("bytes=").partition("-")
            first, end = int(low), int(high) + 1 if high else end
            if first >= len(contents):
                self.answer(416)
                return
        self.send(contents, first, end, bool(asked) and fault != "no ranges", fault)

    def endless(self, body: bytes) -> None:
        """A reply of no stated length that goes on until nobody listens."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self.wfile.write(body)
        for _ in range(10_000):  # 640 MB: far more than should be taken
            self.wfile.write(bytes(1 << 16))

    def send(self, contents: bytes, first: int, end: int, ranged: bool, fault: str | None) -> None:
        body = contents[first:end]
        if fault == "flipped byte":
            body = bytes([body[0] ^ 1]) + body[1:]
        elif fault == "other range":
            body = (contents[7:] + contents)[: len(body)]
        elif fault == "page":
            body = (b"<html>please log in</html>" * (len(body) // 26 + 1))[: len(body)]
        elif fault == "short":
            body = body[: len(body) // 2]
        elif fault == "long":
            body += b"more"
        elif fault == "endless":
            self.endless(body)
            return
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(contents)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        if fault == "cut":
            self.wfile.write(body[:half])
            self.close_connection = True
        elif fault == "stall":
            self.wfile.write(body[:half])
            self.wfile.flush()
            time.sleep(self.server.hub.stall_s)
            self.close_connection = True
        elif fault == "slow":
            for start in range(0, len(body), max(len(body) // 5, 1)):
                self.wfile.write(body[start : start + max(len(body) // 5, 1)])
                self.wfile.flush()
                time.sleep(0.01)
        else:
            self.wfile.write(body)
