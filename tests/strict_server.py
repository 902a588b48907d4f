"""A strict embeddings server for loopback tests: as OpenAI, Azure and Cohere answer, with limits, a bill and faults."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import bpe_openai
import numpy as np
from aiohttp import web

ROOT = Path(__file__).parent.parent
MAX_INPUTS, MAX_TEXTS, MAX_REQUEST_TOKENS, WINDOW_S = 2048, 96, 300_000, 60.0
INVALID = "'$.{}' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."
HTML = "<!DOCTYPE html><html><head><title>Please wait</title></head><body>One moment</body></html>"
ENCODING = bpe_openai.get_encoding("cl100k_base")
Vectors = list[np.ndarray]


@dataclass
class Settings:
    """What a server does: each is an option of the command, and POST /_control changes it while it serves."""

    rpm: int | None = None
    tpm: int | None = None
    burst_s: float = 60.0  # of a limit, that may be spent at once
    latency_s: float = 0.0
    limit_headers: bool = True
    no_base64: bool = False
    no_usage: bool = False
    compat: str | None = None  # "tei": words and status of text-embeddings-inference for inputs that are too long
    too_long_status: int = 413  # of "tei"
    key: str | None = None  # None accepts any that is not empty
    dimension: int = 1536
    max_input_tokens: int = 8192
    max_inputs: int = MAX_INPUTS
    texts_per_s: float | None = (
        None  # one request after the other; what a client does not wait for is computed all the same
    )
    constant: bool = False  # one vector for all texts, and bodies from a cache
    faults: list[dict[str, Any]] = field(default_factory=list)


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.type, self.param = more.get("type", "invalid_request_error"), more.get("param")
        self.headers: dict[str, str] = more.get("headers") or {}
        self.body: dict[str, Any] | None = more.get("body")


@dataclass
class Query:
    """A request that was understood."""

    model: str
    texts: list[str]
    dimension: int
    base64: bool
    tokens: int
    odd: int = 0
    """The text whose vector a fault of one vector spoils."""


class Bucket:
    """A limit per minute: full at the start, with what may be taken at once, and refilled without pause."""

    def __init__(self, limit: int, burst_s: float) -> None:
        self.limit, self.most = limit, limit * burst_s / WINDOW_S
        self.level, self._at = self.most, time.monotonic()

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` can be taken."""
        now = time.monotonic()
        self.level = min(self.most, self.level + (now - self._at) * self.limit / WINDOW_S)
        self._at = now
        return max(0.0, amount - self.level) * WINDOW_S / self.limit


@lru_cache(maxsize=100_000)
def num_tokens(text: str) -> int:
    # Half a million characters at a time: it refuses a million.
    return sum(len(ENCODING.encode_ordinary(text[at : at + 500_000])) for at in range(0, len(text), 500_000))


def vector(text: str, dimension: int) -> np.ndarray:
    """The vector of a text: float32, of norm 1."""
    seed = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
    values = np.random.default_rng(seed).standard_normal(dimension)
    return (values / np.linalg.norm(values)).astype(np.float32)


def encoded(values: np.ndarray, base64: bool) -> bytes:
    return b'"%b"' % b64encode(values.astype("<f4").tobytes()) if base64 else json.dumps(values.tolist()).encode()


@lru_cache(maxsize=8192)
def embedded(text: str, dimension: int, base64: bool) -> bytes:
    return encoded(vector(text, dimension), base64)


def listed(rows: Sequence[tuple[int, bytes]]) -> bytes:
    return b",".join([b'{"object":"embedding","index":%d,"embedding":%b}' % row for row in rows])


@lru_cache(maxsize=8)
def constant_list(num_texts: int, dimension: int, base64: bool) -> bytes:
    return listed(list(enumerate([embedded("", dimension, base64)] * num_texts)))


def go_duration(seconds: float) -> str:
    """As Go writes it: 6m0s, 1.5s, 120ms."""
    if (num_ms := math.ceil(seconds * 1000)) < 1000:
        return f"{num_ms}ms" if num_ms else "0s"
    minutes, num_ms = divmod(num_ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{num_ms / 1000:g}s"


def busiest(accepted: Sequence[tuple[float, int]]) -> tuple[int, int]:
    """The most requests, and the most tokens, in any window of a minute."""
    events, start, tokens, most = sorted(accepted), 0, 0, (0, 0)
    for position, (at, amount) in enumerate(events):
        tokens += amount
        while at - events[start][0] >= WINDOW_S:
            tokens -= events[start][1]
            start += 1
        most = max(most[0], position + 1 - start), max(most[1], tokens)
    return most


def spoiled(kind: str, vectors: Vectors, odd: int) -> Vectors:
    """Vectors with the fault, in one of them or in all; those kinds that are no fault of vectors leave them alone."""
    one = vectors[odd].copy()
    if kind == "nan":
        one[0] = np.nan
    replaced = {"nan": one, "zero": one * 0, "one_wrong_dimension": one[:-1]}
    if kind in replaced:
        return [*vectors[:odd], replaced[kind], *vectors[odd + 1 :]]
    of_all = {"short": vectors[:-1], "wrong_dimension": [v[:-1] for v in vectors], "not_unit": [v * 3 for v in vectors]}
    return of_all.get(kind, vectors)


class OpenAI:
    """POST /v1/embeddings."""

    def check_key(self, request: web.Request, key: str | None) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not given:
            raise Refusal(401, "You didn't provide an API key. You need to provide it in an Authorization header.")
        if key is not None and given != key:
            raise Refusal(401, f"Incorrect API key provided: {given[:3]}***{given[-4:]}.", "invalid_api_key")

    def read(self, request: web.Request, body: dict[str, Any], settings: Settings) -> Query:
        model = request.match_info.get("name") or body.get("model")
        if not model:
            raise Refusal(400, "you must provide a model parameter")
        dimension, form = body.get("dimensions", settings.dimension), body.get("encoding_format", "float")
        if type(dimension) is not int or not 0 < dimension <= settings.dimension:
            raise Refusal(400, INVALID.format("dimensions"), param="dimensions")
        if form not in ("float", "base64"):
            raise Refusal(400, INVALID.format("encoding_format"), param="encoding_format")
        texts = self._texts(body.get("input"), settings)
        return Query(
            model, texts, dimension, form == "base64" and not settings.no_base64, self._tokens(texts, settings)
        )

    def _texts(self, given: Any, settings: Settings) -> list[str]:
        """The inputs as texts: one or many, each a string or the numbers of its tokens."""
        inputs = (
            [given]
            if isinstance(given, str) or (given and isinstance(given, list) and type(given[0]) is int)
            else given
        )
        if not isinstance(inputs, list) or not inputs:
            raise Refusal(400, INVALID.format("input"), param="input")
        if len(inputs) > settings.max_inputs and settings.compat == "tei":
            message = f"batch size {len(inputs)} > maximum allowed batch size {settings.max_inputs}"
            raise Refusal(422, message, body={"error": message, "error_type": "Validation"})
        if len(inputs) > settings.max_inputs:
            message = f"Invalid 'input': array too long. Expected an array with maximum length {settings.max_inputs}, but got an array with length {len(inputs)} instead."
            raise Refusal(400, message, "array_above_max_length", param="input")
        is_tokens = isinstance(inputs[0], list)
        if any(not isinstance(text, list if is_tokens else str) or not text for text in inputs):
            raise Refusal(400, INVALID.format("input"), param="input")
        return [ENCODING.decode(tokens) for tokens in inputs] if is_tokens else inputs

    def _tokens(self, texts: list[str], settings: Settings) -> int:
        counts, limit, is_tei = (
            [num_tokens(text) for text in texts],
            settings.max_input_tokens,
            settings.compat == "tei",
        )
        most = max(counts)
        if most > limit and is_tei:
            message = f"Input validation error: `inputs` must have less than {limit} tokens. Given: {most}"
            raise Refusal(settings.too_long_status, message, body={"error": message, "error_type": "Validation"})
        if most > limit:
            message = f"This model's maximum context length is {limit} tokens, however you requested {most} tokens ({most} in your prompt; 0 for the completion). Please reduce your prompt; or completion length."
            raise Refusal(400, message)
        weight = sum(max(num, -(-len(text.encode()) // 4)) for num, text in zip(counts, texts, strict=True))
        if weight > MAX_REQUEST_TOKENS and not is_tei:
            message = f"Requested {weight} tokens, max {MAX_REQUEST_TOKENS} tokens per request"
            raise Refusal(400, message, "max_tokens_per_request", type="max_tokens_per_request")
        return sum(counts)

    def error(self, refusal: Refusal) -> dict[str, Any]:
        return {
            "error": {"message": refusal.message, "type": refusal.type, "param": refusal.param, "code": refusal.code}
        }

    def parts(self, query: Query, settings: Settings, kind: str | None) -> tuple[bytes, bytes, bytes]:
        """The body's head, vectors and tail."""
        usage = {} if settings.no_usage else {"usage": {"prompt_tokens": query.tokens, "total_tokens": query.tokens}}
        head = json.dumps({"object": "list", "model": query.model, **usage}).encode()[:-1] + b',"data":['
        if settings.constant and kind is None:
            return head, constant_list(len(query.texts), query.dimension, query.base64), b"]}"
        rows = list(enumerate(self._vectors(query, settings, kind)))
        if kind == "shuffle":
            rows = rows[1:] + rows[:1] if len(rows) < 3 else random.sample(rows, len(rows))
        if kind == "duplicate_index":
            rows = [*rows[:-1], (0, rows[-1][1])]
        return head, listed(rows), b"]}"

    def _vectors(self, query: Query, settings: Settings, kind: str | None) -> list[bytes]:
        texts = [""] * len(query.texts) if settings.constant else query.texts
        if kind is None:
            return [embedded(text, query.dimension, query.base64) for text in texts]
        vectors = spoiled(kind, [vector(text, query.dimension) for text in texts], query.odd)
        return [encoded(v, query.base64) for v in vectors]


class Azure(OpenAI):
    """POST /openai/deployments/{name}/embeddings?api-version=..."""

    def check_key(self, request: web.Request, key: str | None) -> None:
        given = request.headers.get("api-key", "")
        if not given or (key is not None and given != key):
            raise Refusal(401, "Access denied due to invalid subscription key or wrong API endpoint.", "401")
        if not request.query.get("api-version"):
            raise Refusal(404, "Resource not found", "404")


class Cohere(OpenAI):
    """POST /v2/embed. It cuts texts that are too long, and bills them whole; or refuses them, if it is told not to cut."""

    def check_key(self, request: web.Request, key: str | None) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not given or (key is not None and given != key):
            raise Refusal(401, "invalid api token")

    def read(self, request: web.Request, body: dict[str, Any], settings: Settings) -> Query:
        texts, dimension = body.get("texts"), body.get("output_dimension", settings.dimension)
        for name in ("model", "input_type", "embedding_types"):
            if not body.get(name):
                raise Refusal(400, f"invalid request: {name} is required")
        if (
            body["embedding_types"] != ["float"]
            or type(dimension) is not int
            or not 0 < dimension <= settings.dimension
        ):
            raise Refusal(400, "invalid request: embedding_types must be [float], output_dimension one of the model's")
        if not isinstance(texts, list) or not texts or any(not isinstance(text, str) or not text for text in texts):
            raise Refusal(400, "invalid request: texts must be a list of strings that are not empty")
        if len(texts) > MAX_TEXTS:
            message = f"invalid request: total number of texts must be at most {MAX_TEXTS} - received {len(texts)}"
            raise Refusal(400, message)
        counts, limit = list(map(num_tokens, texts)), settings.max_input_tokens
        if max(counts) > limit and body.get("truncate") == "NONE":
            raise Refusal(400, f"invalid request: text is too long, it must have at most {limit} tokens")
        return Query(body["model"], texts, dimension, False, sum(counts))

    def error(self, refusal: Refusal) -> dict[str, Any]:
        return {"message": refusal.message}

    def parts(self, query: Query, settings: Settings, kind: str | None) -> tuple[bytes, bytes, bytes]:
        meta: dict[str, Any] = {"api_version": {"version": "2"}}
        if not settings.no_usage:
            meta["billed_units"] = {"input_tokens": query.tokens}
        head = (
            json.dumps({"id": "strict", "texts": query.texts, "meta": meta}).encode()[:-1] + b',"embeddings":{"float":['
        )
        return head, b",".join(self._vectors(query, settings, kind)), b"]}}"


class StrictServer:
    """The server: its settings, what it has left of its limits, and what was paid."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.running = settings, 0
        self.reset()

    def reset(self) -> None:
        self.counts, self.statuses, self.paid = Counter[str](), Counter[int](), Counter[int]()
        self.accepted: list[tuple[float, int]] = []
        self.max_inputs = self.concurrent_max = 0
        self.random = random.Random(0)
        self.busy_until = 0.0
        self.fill()

    def fill(self) -> None:
        limits = {"requests": self.settings.rpm, "tokens": self.settings.tpm}
        self.buckets = {name: Bucket(limit, self.settings.burst_s) for name, limit in limits.items() if limit}

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**28)
        for path, api in {
            "/v1/embeddings": OpenAI(),
            "/openai/deployments/{name}/embeddings": Azure(),
            "/v2/embed": Cohere(),
        }.items():
            app.router.add_post(path, lambda request, api=api: self._serve(request, api))
        app.router.add_post("/_control", self._control)
        app.router.add_post("/_texts", self._texts)
        app.router.add_post("/_reset", self._reset)
        app.router.add_get("/_stats", self._stats)
        return app

    async def _control(self, request: web.Request) -> web.Response:
        changes = await request.json()
        if unknown := changes.keys() - vars(self.settings).keys():
            return web.json_response({"unknown": sorted(unknown)}, status=400)
        vars(self.settings).update(changes)
        if changes.keys() & {"rpm", "tpm"}:
            self.fill()
        return web.json_response({})

    async def _reset(self, request: web.Request) -> web.Response:
        self.reset()
        return web.json_response({})

    async def _texts(self, request: web.Request) -> web.Response:
        return web.json_response([self.paid[hash(text)] for text in await request.json()])

    async def _stats(self, request: web.Request) -> web.Response:
        requests, tokens = busiest(self.accepted)
        times = [at for at, _ in self.accepted] or [None]
        counted = {name: self.counts[name] for name in ("num_requests", "num_ok", "num_embedded", "tokens_paid")}
        return web.json_response(
            {
                **counted,
                "num_refused": self.statuses[429],
                "max_inputs": self.max_inputs,
                "statuses": self.statuses,
                "requests_per_minute_max": requests,
                "tokens_per_minute_max": tokens,
                "first_s": times[0],
                "last_s": times[-1],
                "texts_paid": len(self.paid),
                "times_paid_max": max(self.paid.values(), default=0),
                "concurrent_max": self.concurrent_max,
            }
        )

    async def _serve(self, request: web.Request, api: OpenAI) -> web.StreamResponse:
        self.counts["num_requests"] += 1
        self.running += 1
        self.concurrent_max = max(self.concurrent_max, self.running)
        try:
            return await self._answer(request, api)
        except Refusal as refusal:
            self.statuses[refusal.status] += 1
            body, headers = refusal.body or api.error(refusal), self._limit_headers() | refusal.headers
            return web.json_response(body, status=refusal.status, headers=headers)
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request, api: OpenAI) -> web.StreamResponse:
        api.check_key(request, self.settings.key)
        try:
            query = api.read(request, json.loads(await request.read()), self.settings)
        except (ValueError, AttributeError):  # no JSON, no object, or half a surrogate pair
            raise Refusal(400, "We could not parse the JSON body of your request.") from None
        self.max_inputs = max(self.max_inputs, len(query.texts))
        self._admit(query)
        admitted_s, fault = time.monotonic(), self._next_fault(query)
        await asyncio.sleep(self.settings.latency_s + self._busy_s(query))
        kind = fault.get("kind")
        query.odd = next((at for at, text in enumerate(query.texts) if fault.get("containing", "") in text), 0)
        if kind == "status":
            message = fault.get("message", "The server had an error while processing your request.")
            status, code = fault.get("status", 500), fault.get("code")
            raise Refusal(status, message, code, type=fault.get("type", "server_error"), headers=fault.get("headers"))
        if kind == "html":
            self.statuses[200] += 1
            return web.Response(text=HTML, content_type="text/html", headers=self._limit_headers())
        if kind in ("reset", "hang", "raw"):
            await self._say_nothing(request, fault)
        parts = api.parts(query, self.settings, kind)
        self._pay(query, admitted_s)
        return await self._send(request, parts, fault)

    def _admit(self, query: Query) -> None:
        """Take a request and its tokens from what is left of the limits, or refuse."""
        amounts = {"requests": 1, "tokens": query.tokens}
        for name, bucket in self.buckets.items():
            amount, wait_s = amounts[name], bucket.wait_s(amounts[name])
            words = f"for {query.model} in organization org-strict on {name} per min ({name[0].upper()}PM): Limit {bucket.limit}"
            if amount > bucket.limit:
                message = f"Request too large {words}, Requested {amount}. The input must be reduced in order to run successfully."
                raise Refusal(429, message, "rate_limit_exceeded", type=name)
            if wait_s:
                used = math.ceil(bucket.limit - bucket.level)
                message = f"Rate limit reached {words}, Used {used}, Requested {amount}. Please try again in {go_duration(wait_s)}."
                headers = {"retry-after-ms": str(math.ceil(wait_s * 1000)), "retry-after": str(math.ceil(wait_s))}
                raise Refusal(429, message, "rate_limit_exceeded", type=name, headers=headers)
        for name, bucket in self.buckets.items():
            bucket.level -= amounts[name]

    def _busy_s(self, query: Query) -> float:
        """Seconds until a request is computed, after all that came before."""
        if not self.settings.texts_per_s:
            return 0.0
        now = time.monotonic()
        self.busy_until = max(self.busy_until, now) + len(query.texts) / self.settings.texts_per_s
        return self.busy_until - now

    def _limit_headers(self) -> dict[str, str]:
        headers = {}
        for name, bucket in self.buckets.items() if self.settings.limit_headers else ():
            full_s = bucket.wait_s(bucket.most)
            values = {"limit": bucket.limit, "remaining": int(bucket.level), "reset": go_duration(full_s)}
            headers |= {f"x-ratelimit-{word}-{name}": str(value) for word, value in values.items()}
        return headers

    def _next_fault(self, query: Query) -> dict[str, Any]:
        """The first fault with times left that concerns a request, by chance, by its texts or as it asks for base64; or {}."""
        for fault in self.settings.faults:
            part = fault.get("containing")
            if fault.get("base64") and not query.base64:
                continue
            if self.random.random() >= fault.get("share", 1):
                continue
            if fault.setdefault("times", 1) and (part is None or any(part in text for text in query.texts)):
                fault["times"] -= fault["times"] > 0
                return fault
        return {}

    async def _say_nothing(self, request: web.Request, fault: dict[str, Any]) -> None:
        """Close the connection, after what is no HTTP or after nothing, or leave it open; the client's going away cancels this."""
        if fault["kind"] == "raw" and request.transport:
            request.transport.write(fault["said"].encode())
            request.transport.close()
        if fault["kind"] == "reset" and request.transport:
            request.transport.abort()
        await asyncio.sleep(fault.get("seconds", 3600))

    def _pay(self, query: Query, admitted_s: float) -> None:
        self.statuses[200] += 1
        self.counts.update(num_ok=1, num_embedded=len(query.texts), tokens_paid=query.tokens)
        self.paid.update(map(hash, query.texts))
        self.accepted.append((admitted_s, query.tokens))

    async def _send(self, request: web.Request, parts: Sequence[bytes], fault: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers=self._limit_headers())
        response.content_type, response.content_length = "application/json", sum(map(len, parts))
        await response.prepare(request)
        kind, pause_s = fault.get("kind"), 0.0
        if kind == "truncated":
            parts = parts[:1]
        if kind == "slow":
            whole = b"".join(parts)
            step = -(-len(whole) // 50)
            parts, pause_s = [whole[at : at + step] for at in range(0, len(whole), step)], fault.get("seconds", 1) / 50
        for part in parts:
            await response.write(part)
            await asyncio.sleep(pause_s)
        if kind == "truncated" and request.transport:
            request.transport.close()
        else:
            await response.write_eof()
        return response


class Server:
    """A server in a process of its own, as `serving` yields it."""

    def __init__(self, root: str) -> None:
        self.root, self.url = root, f"{root}/v1"

    def behave(self, **settings: Any) -> None:
        """Change settings; new limits start full."""
        self._call("/_control", settings)

    def stats(self) -> dict[str, Any]:
        return self._call("/_stats")

    def texts(self, texts: list[str]) -> list[int]:
        """How often each was paid."""
        return self._call("/_texts", texts)

    def reset(self) -> None:
        """Forget what was paid, and fill the limits."""
        self._call("/_reset", {})

    def _call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.root + path, data), timeout=30) as answer:
            return json.load(answer)


@contextmanager
def serving(**options: Any) -> Iterator[Server]:
    """A server with these settings, in a process of its own that ends with the block."""
    command = [sys.executable, "-m", "tests.strict_server", "--settings", json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the server did not start: {line!r}")
        yield Server(line.split()[-1])
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


async def serve(port: int, settings: Settings) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        StrictServer(settings).app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.2
    )
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=2048).start()
    sys.stdout.write(f"listening on http://127.0.0.1:{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await stop.wait()
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={}, help="settings as JSON, under the options")
    for option in fields(Settings):
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(option.default, bool) else {"type": json.loads}
        kind = {"type": str} if option.name in ("key", "compat") else kind
        parser.add_argument("--" + option.name.replace("_", "-"), default=argparse.SUPPRESS, **kind)
    options = vars(parser.parse_args())
    port, settings = options.pop("port"), options.pop("settings")
    asyncio.run(serve(port, Settings(**settings | options)))


if __name__ == "__main__":
    main()
