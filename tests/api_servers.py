"""
Servers on loopback for the tests of API models, and models that keep books on what they send.

It is both a plugin and imported, so pytest cannot rewrite its assertions: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.models.api.answers import Reply
from engine.models.api.model import ApiEmbeddingModel
from engine.models.base import Embeddings
from engine.models.cohere import CohereEmbeddingModel
from engine.models.openai import OpenAIEmbeddingModel
from tests.builders import free_port
from tests.strict_server import Server, Settings, serving, vector

KEY = "sk-canary-5Zq81LwX0vBn27TdRk93"
EXACT = "text-embedding-3-small"
"""Whose limits and tokens the client knows."""
OWN = "all-minilm"
"""Of which only the server knows them."""
DIMENSION = 24
"""Of the strict server's vectors in these tests: small ones are fast ones."""
MANY_A_MINUTE = 60_000.0
"""A limit that makes nobody wait, so that no request has to find out which one there is."""


@dataclass
class Sent:
    """A request as its model sent it."""

    texts: list[str]
    began: float
    ended: float = 0.0
    error: Exception | None = None


@dataclass
class Books:
    """What a model has sent."""

    sent: list[Sent] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """Texts of each request."""
        return [len(sent.texts) for sent in self.sent]

    @property
    def errors(self) -> list[str]:
        """What was raised, by name."""
        return [type(sent.error).__name__ for sent in self.sent if sent.error is not None]

    def watch(self, model: ApiEmbeddingModel) -> None:
        """Keep the books of a model that has sent nothing yet."""
        request = model.request

        async def watched(texts: Sequence[str]) -> Reply:
            sent = Sent(list(texts), time.monotonic())
            self.sent.append(sent)
            try:
                return await request(texts)
            except Exception as error:
                sent.error = error
                raise
            finally:
                sent.ended = time.monotonic()

        model.request = watched  # type: ignore[method-assign]


@dataclass
class Client:
    """A model, its books, and calls from where there is no loop."""

    model: ApiEmbeddingModel
    books: Books = field(default_factory=Books)

    def __post_init__(self) -> None:
        self.books.watch(self.model)

    def rows(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts."""
        return asyncio.run(self.model.embed_rows(texts))

    def at_once(self, *calls: Sequence[str]) -> list[Any]:
        """Embed several lists of texts at the same time; return the answers, or what they raised."""

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*map(self.model.embed_rows, calls), return_exceptions=True)

        return asyncio.run(all_of_them())


def numbered(count: int, word: str = "text") -> list[str]:
    """Make so many texts, of which none is within another."""
    return [f"{word} {number:05d}" for number in range(count)]


def assert_right(answer: Embeddings, texts: Sequence[str], dimension: int = DIMENSION) -> None:
    """Check that each text that is not rejected has the vector that the strict server has for it."""
    expected = [vector(text, dimension) for position, text in enumerate(texts) if position not in answer.rejects]
    np.testing.assert_equal(answer.vectors.shape, (len(expected), dimension))
    np.testing.assert_allclose(answer.vectors, expected, atol=1e-6)


@pytest.fixture(scope="session")
def _strict_server() -> Iterator[Server]:
    with serving(dimension=DIMENSION) as server:
        yield server


@pytest.fixture
def server(_strict_server: Server) -> Server:
    """A strict server without a limit or a fault."""
    _strict_server.behave(**asdict(Settings(dimension=DIMENSION)))
    _strict_server.reset()
    return _strict_server


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """A key that no message may have, in the environment of all providers."""
    for variable in ("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY", "CO_API_KEY"):
        monkeypatch.setenv(variable, KEY)
    for variable in ("OPENAI_BASE_URL", "AZURE_OPENAI_ENDPOINT", "OPENAI_ORG_ID"):
        monkeypatch.delenv(variable, raising=False)
    return KEY


@pytest.fixture
def connect(server: Server, key: str) -> Iterator[Callable[..., Client]]:
    """Makes clients of the strict server, closed at the end; the limits of `requests_per_minute=None` are not known."""
    clients: list[Client] = []

    def connected(name: str = EXACT, **options: Any) -> Client:
        wanted = {"base_url": server.url, "requests_per_minute": MANY_A_MINUTE, **options}
        clients.append(Client(OpenAIEmbeddingModel(name, **wanted)))
        return clients[-1]

    yield connected
    closed(clients)


@pytest.fixture
def cohere(server: Server, key: str) -> Iterator[Callable[..., Client]]:
    """Makes clients of the strict server that speak as Cohere's do, closed at the end."""
    clients: list[Client] = []

    def connected(**options: Any) -> Client:
        wanted = {"base_url": server.root, "requests_per_minute": MANY_A_MINUTE, **options}
        clients.append(Client(CohereEmbeddingModel(**wanted)))
        return clients[-1]

    yield connected
    closed(clients)


def closed(clients: Sequence[Client]) -> None:
    """Close models."""
    for client in clients:
        asyncio.run(client.model.close())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that fails is asked again soon."""
    monkeypatch.setattr("engine.models.api.recovery.BACKOFF_S", (0.02, 0.1))


class LLMock:
    """A server of llmock's, in a process of its own."""

    def __init__(self, root: str) -> None:
        self.root, self.url = root, f"{root}/v1"

    def fail(self, **how: Any) -> None:
        """Refuse the next request, or the next `times`."""
        self.call("scenario", {"behaviors": [{"type": "fail", **how}]})

    def findings(self) -> set[str]:
        """What it finds wrong with the clients it had since the last reset."""
        return {finding["code"] for finding in self.call("verdict")["findings"]}

    def statuses(self) -> list[int]:
        """Of all its answers, in the order in which they were asked for."""
        return [request["status"] for request in self.call("requests")["requests"]]

    def call(self, name: str, body: Any = None) -> Any:
        """Ask its control API."""
        data = None if body is None else json.dumps(body).encode()
        address = f"{self.root}/_llmock/{name}"
        with urllib.request.urlopen(urllib.request.Request(address, data), timeout=30) as answer:
            return json.load(answer)


@contextmanager
def mocking(*options: str) -> Iterator[LLMock]:
    """Run llmock, until the block ends."""
    server = LLMock(f"http://127.0.0.1:{free_port()}")
    program = str(Path(sys.executable).parent / "llmock")
    port = server.root.rpartition(":")[2]
    command = [program, "serve", "--host", "127.0.0.1", "--port", port, "--log-level", "error", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                server.call("scenario")
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError("llmock does not answer within 30 s")
        yield server
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def _llmock() -> Iterator[LLMock]:
    with mocking("--rpm", "1200", "--tpm", "120000") as server:
        yield server


@pytest.fixture
def llmock(_llmock: LLMock) -> LLMock:
    """An llmock that has seen nothing yet, and limits each key to 20 requests a second."""
    _llmock.call("reset", {})
    return _llmock
