"""The Hub on loopback: as much of it as a listing and a read need, of one data set, which fails when a test asks for it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

DATA_SET = "hf://datasets/owner/name"


@dataclass
class Hub:
    """Its commits, and what is to go wrong."""

    url: str
    commits: dict[str, dict[str, bytes]]
    """Files by path, of each commit by its 40 digits."""
    head: str
    """The commit that `main` is at."""
    faults: list[tuple[str, int | str]] = field(default_factory=list)
    """For the next requests with that in their path, one each: a status, or `cut` for half of the answer."""
    seen: list[str] = field(default_factory=list)
    """The path of every request that went wrong."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def settings(self) -> dict[str, str]:
        """What the environment of a process needs to ask it."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0"}

    def fault_of(self, path: str) -> int | str | None:
        """Return what is to go wrong with a request."""
        with self._lock:
            for number, (part, what) in enumerate(self.faults):
                if part in path:
                    del self.faults[number]
                    self.seen.append(path)
                    return what
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        steps = unquote(urlsplit(self.path).path).strip("/").split("/")
        if steps[:4] == ["api", "datasets", "owner", "name"]:
            commit = self._commit(steps[5] if len(steps) > 5 else "main")
            if len(steps) > 4 and steps[4] == "tree":
                below, files = "/".join(steps[6:]), self.hub.commits[commit]
                return self._json([self._entry(commit, path) for path in files if path.startswith(below)])
            return self._json({"id": "owner/name", "sha": commit, "siblings": []})
        if steps[:4] == ["datasets", "owner", "name", "resolve"]:
            data = self.hub.commits[self._commit(steps[4])]["/".join(steps[5:])]
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            piece = data[int(first) : int(last or len(data)) + 1]
            return self._send(206, piece, {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        commit = self._commit(self.path.rpartition("/")[2])
        self._json([self._entry(commit, path) for path in body["paths"] if path in self.hub.commits[commit]])

    def do_HEAD(self) -> None:
        self._send(404, b"", {})

    def _commit(self, revision: str) -> str:
        return self.hub.head if revision == "main" else revision

    def _entry(self, commit: str, path: str) -> dict[str, object]:
        data = self.hub.commits[commit][path]
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        fault = self.hub.fault_of(self.path)
        if isinstance(fault, int):
            status, data, headers = fault, b"{}", {}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:  # a client that was killed
        pass


@contextmanager
def serving(commits: dict[str, dict[str, bytes]], head: str) -> Iterator[Hub]:
    """Have a Hub with one data set, `DATA_SET`."""
    handler = type("Handler", (_Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    hub = handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", commits, head)  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
