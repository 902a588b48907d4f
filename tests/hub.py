"""The Hugging Face Hub on loopback: a private data set of several commits, that fails when a test asks for it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants  # noqa: F401 - read from the environment once: this process itself stays offline

from tests.object_stores import Failing, Server

TOKEN = "hf_canary"
SET = "hf://datasets/owner/name"
PAGE = 2
"""Entries of a listing's page."""
NO_REPOSITORY, NO_REVISION, NO_ENTRY = "RepoNotFound", "RevisionNotFound", "EntryNotFound"


@dataclass
class Hub(Failing):
    """A data set of that Hub, and what is to go wrong with it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Their files, by hash."""
    head: str = ""
    """The commit that `main` is at."""

    def push(self, files: dict[str, bytes]) -> str:
        """Put files beside those that are there, or in their place, as a new commit; return its hash."""
        self.head, before = f"{len(self.commits) + 1:040x}", self.commits.get(self.head, {})
        self.commits[self.head] = before | files
        return self.head


def blob_of(data: bytes) -> str:
    """Return the hash of a file's content."""
    return hashlib.sha1(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does: a listing in pages, and for a file's content a redirect to where it lies."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._paths_info)

    def _answer(self, act: Any) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        steps = unquote(urlsplit(self.path).path).strip("/").split("/")
        fault = self.hub.fault_of(self.command, self.path)
        self._is_cut = fault == "cut"
        try:
            if isinstance(fault, tuple):
                self._send(fault[0], b"{}", {"RateLimit": fault[1]} if fault[1] else {})
            elif steps[0] == "blobs":
                self._blob(steps[1])
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}" or steps[-3:] == ["datasets", "owner", "none"]:
                self._send(401, b"{}", {"X-Error-Code": NO_REPOSITORY})
            else:
                act(steps, body)
        except KeyError as error:
            self._send(404, b"{}", {"X-Error-Code": str(error.args[0])})

    def _get(self, steps: list[str], _: bytes) -> None:
        if steps[0] == "datasets" and steps[3] == "resolve":
            data = self._file(self._commit(steps[4]), "/".join(steps[5:]))
            self._send(302, b"", {"Location": f"{self.hub.url}/blobs/{blob_of(data)}?signature=x"})
        elif steps[4:5] == ["tree"]:
            self._tree(self._commit(steps[5]), "/".join(steps[6:]))
        elif steps[4:5] in ([], ["revision"]):
            commit = self._commit(steps[5] if len(steps) > 5 else "main")
            self._json({"id": "owner/name", "sha": commit, "siblings": []})
        else:
            raise KeyError(NO_ENTRY)

    def _tree(self, commit: str, below: str) -> None:
        files = [path for path in sorted(self.hub.commits[commit]) if not below or path.startswith(f"{below}/")]
        if not files:
            raise KeyError(NO_ENTRY)
        folders = sorted({path.rpartition("/")[0] for path in files} - {"", below})
        entries = [{"type": "directory", "path": path, "size": 0, "oid": blob_of(path.encode())} for path in folders]
        entries += [self._entry(commit, path) for path in files]
        url = urlsplit(self.path)
        start = int(parse_qs(url.query).get("cursor", ["0"])[0])
        more = f"<{self.hub.url}{url.path}?recursive=True&cursor={start + PAGE}>" + '; rel="next"'
        self._json(entries[start : start + PAGE], {"Link": more} if start + PAGE < len(entries) else {})

    def _paths_info(self, steps: list[str], body: bytes) -> None:
        commit, paths = self._commit(steps[-1]), parse_qs(body.decode())["paths"]
        self._json([self._entry(commit, path) for path in paths if path in self.hub.commits[commit]])

    def _blob(self, name: str) -> None:
        data = next(data for files in self.hub.commits.values() for data in files.values() if blob_of(data) == name)
        if (asked := self.headers.get("Range")) is None:
            return self._send(200, data, {})
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(data)) + 1, len(data))
        return self._send(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _commit(self, revision: str) -> str:
        revision = self.hub.head if revision == "main" else revision
        if revision not in self.hub.commits:
            raise KeyError(NO_REVISION)
        return revision

    def _file(self, commit: str, path: str) -> bytes:
        if path not in self.hub.commits[commit]:
            raise KeyError(NO_ENTRY)
        return self.hub.commits[commit][path]

    def _entry(self, commit: str, path: str) -> dict[str, object]:
        data = self._file(commit, path)
        return {"type": "file", "path": path, "size": len(data), "oid": blob_of(data)}

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self._is_cut else data)
        self.close_connection = self._is_cut

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    """Have a Hub with one data set without a commit, that the processes which are started meanwhile are pointed at."""
    handler = type("Handler", (_Handler,), {})
    server = Server(("127.0.0.1", 0), handler)
    hub = handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with patch.dict(os.environ, {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
