"""S3 on loopback: moto behind a proxy that loses answers, refuses, and cuts bodies short when a test asks for it."""

from __future__ import annotations

import http.client
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

KEYS = {
    "AWS_ACCESS_KEY_ID": "CANARYKEYID",
    "AWS_SECRET_ACCESS_KEY": "canary-secret",
    "AWS_SESSION_TOKEN": "canary-session-token",
}
BUCKET = "texts-and-vectors"


@dataclass
class Fault:
    """What happens to some requests."""

    method: str
    part: str
    what: str | tuple[int, str]
    """lost: done, and not answered; unsent: not done, and not answered; cut: half of the answer; or a status and the store's name for it."""
    times: int
    after: int

    def takes(self, method: str, path: str) -> bool:
        if self.method not in (method, "") or self.part not in path or self.times <= 0:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Failing:
    """A server, and what is to go wrong with it."""

    url: str
    seen: list[str] = field(default_factory=list)
    """Method and path of every request so far."""
    faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(
        self, what: str | tuple[int, str], method: str = "", part: str = "", times: int = 1, after: int = 0
    ) -> None:
        """Let the next requests of that method, with that in their path, go wrong."""
        self.faults.append(Fault(method, part, what, times, after))

    def heal(self) -> None:
        """Let all go well again."""
        self.faults.clear()

    def fault_of(self, method: str, path: str) -> str | tuple[int, str] | None:
        """Note a request, and return what is to happen to it."""
        with self._lock:
            self.seen.append(f"{method} {path}")
            return next((fault.what for fault in self.faults if fault.takes(method, path)), None)


@dataclass
class Store(Failing):
    """A bucket of that S3."""

    is_conditional: bool = True
    """Whether the store knows If-None-Match."""
    num_connections: int = 0
    """That clients have opened so far."""

    def connect(self) -> None:
        """Note that a client has connected."""
        with self._lock:
            self.num_connections += 1

    def heal(self) -> None:
        """Let all go well again."""
        super().heal()
        self.is_conditional = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    """Or the end of an answer waits 40 ms until its beginning is acknowledged."""
    store: Store
    behind: tuple[str, int]
    putting = threading.Lock()
    """moto looks and puts in two steps; S3 does both in one."""

    def setup(self) -> None:
        super().setup()
        self.store.connect()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.store.fault_of(self.command, self.path)
        if isinstance(fault, tuple):
            status, code = fault
            said = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no {KEYS['AWS_ACCESS_KEY_ID']}</Message></Error>"
            self.send(status, {"Content-Type": "application/xml"}, said.encode())
        elif fault == "unsent":
            self.close_connection = True
        else:
            self.forward(body, fault)

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def do_DELETE(self) -> None:
        self.answer()

    def forward(self, body: bytes, fault: str | None) -> None:
        headers = dict(self.headers)
        if not self.store.is_conditional:
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        connection = http.client.HTTPConnection(*self.behind)
        with self.putting if self.command == "PUT" else nullcontext():
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        connection.close()
        if fault == "lost":
            self.close_connection = True
            return
        hop = ("connection", "transfer-encoding", "content-length", "server", "date")
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in hop}
        length = int(answer.getheader("Content-Length") or len(data)) if self.command == "HEAD" else len(data)
        self.send(answer.status, kept, data, length, cut=fault == "cut")

    def send(
        self, status: int, headers: dict[str, str], data: bytes, length: int | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """One thread a connection, and no word of those that break off."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:  # a client that was killed
        pass


def keys() -> dict[str, Any]:
    """Return the objects of the bucket, by key, past the server."""
    versions = s3_backends[DEFAULT_ACCOUNT_ID]["global"].buckets[BUCKET].keys
    return {key: of_key[-1] for key, of_key in dict(versions).items()}


@contextmanager
def serving() -> Iterator[Store]:
    """Have an S3 with one empty bucket, that this process and those that it starts are pointed at."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    handler = type("Handler", (_Handler,), {"behind": moto.get_host_and_port()})
    proxy = Server(("127.0.0.1", 0), handler)
    store = handler.store = Store(f"http://127.0.0.1:{proxy.server_port}")  # type: ignore[attr-defined]
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    settings = KEYS | {
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": store.url,
        "AWS_METADATA_ENDPOINT": "http://127.0.0.1:1",
    }
    connection = http.client.HTTPConnection(*moto.get_host_and_port())
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    connection.close()
    try:
        with patch.dict(os.environ, settings):
            yield store
    finally:
        proxy.shutdown()
        proxy.server_close()
        moto.stop()
