"""Ways to ask an embeddings API for many vectors, each a process of its own: ours and what people do without it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import psutil
from aiolimiter import AsyncLimiter
from openai import AsyncOpenAI

from engine.models.openai import OpenAIEmbeddingModel

MODEL = "text-embedding-3-small"
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
RETRIES = 8


def text_of(number: int, num_words: int) -> str:
    """Make a text that is like no other, of about so many tokens."""
    return f"{number} " + " ".join(WORDS[(number >> at) % 8] for at in range(num_words))


def requests_of(args: argparse.Namespace) -> Iterator[list[str]]:
    """Cut this worker's texts into requests."""
    for start in range(args.first, args.first + args.texts, args.batch):
        stop = min(start + args.batch, args.first + args.texts)
        yield [text_of(number, args.words) for number in range(start, stop)]


async def gathered(args: argparse.Namespace, limiter: AsyncLimiter | None = None, amount: float = 1.0) -> None:
    """Send all requests at once, as plain `asyncio.gather` does, and leave the rest to the SDK's retries."""
    client = AsyncOpenAI(base_url=args.url, max_retries=RETRIES)

    async def send(texts: list[str]) -> None:
        if limiter is not None:
            await limiter.acquire(amount)
        answer = await client.embeddings.create(model=MODEL, input=texts)
        assert len(answer.data) == len(texts)

    outcomes = await asyncio.gather(*(send(texts) for texts in requests_of(args)), return_exceptions=True)
    errors = [type(outcome).__name__ for outcome in outcomes if outcome is not None]
    if errors:
        sys.stderr.write(f"{len(errors)} of {len(outcomes)} requests were given up: {errors[0]}\n")
    await client.close()


async def static_split(args: argparse.Namespace) -> None:
    """Pace this worker at its share of the limit, as aiolimiter's own example does."""
    if args.bound == "requests":
        await gathered(args, AsyncLimiter(args.limit / args.workers, 60), 1)
    else:
        await gathered(args, AsyncLimiter(args.limit / args.workers, 60), args.limit_per_request)


async def kura(args: argparse.Namespace) -> None:
    """Use Kura's own class as Kura does: all texts in one call."""
    os.environ["OPENAI_BASE_URL"] = args.url
    from kura.embedding import OpenAIEmbeddingModel as KuraModel

    model = KuraModel(MODEL, model_batch_size=args.batch, n_concurrent_jobs=5)
    await model.embed([text for texts in requests_of(args) for text in texts])


async def daft(args: argparse.Namespace) -> None:
    """Have Daft's `embed_text` ask, one request for as many texts as the others put into theirs."""
    await asyncio.to_thread(_daft, args)  # it has a loop of its own


def _daft(args: argparse.Namespace) -> None:
    from daft import col, from_pydict, set_provider
    from daft.functions import embed_text

    set_provider("openai", base_url=args.url, max_retries=RETRIES)
    texts = from_pydict({"text": [text for texts in requests_of(args) for text in texts]})
    texts.with_column("embedding", embed_text(col("text"), model=MODEL, batch_size=args.batch)).collect()


async def client_ours(args: argparse.Namespace) -> dict[str, float]:
    """Embed orders of 2,048 texts, eight requests at a time; the texts are made before the clock starts."""
    model = OpenAIEmbeddingModel(MODEL, n_concurrent_jobs=8, base_url=args.url)
    await model.embed_rows(["warm up"])

    async def one(texts: list[str]) -> None:
        answer = await model.embed_rows(texts)
        assert answer.vectors.shape == (len(texts), 1536)

    spent = await _timed(args, one)
    await model.close()
    return spent


async def client_sdk(args: argparse.Namespace, **options: str) -> dict[str, float]:
    """Do the same by the SDK's default path, and make an array of its lists."""
    client = AsyncOpenAI(base_url=args.url)
    await client.embeddings.create(model=MODEL, input=["warm up"])

    async def one(texts: list[str]) -> None:
        answer = await client.embeddings.create(model=MODEL, input=texts, **options)  # type: ignore[call-overload]
        vectors = np.array([item.embedding for item in answer.data], np.float32)
        assert vectors.shape == (len(texts), 1536)

    spent = await _timed(args, one)
    await client.close()
    return spent


async def client_float(args: argparse.Namespace) -> dict[str, float]:
    """Ask for floats, as servers without base64 answer."""
    return await client_sdk(args, encoding_format="float")


async def memory(args: argparse.Namespace) -> dict[str, float]:
    """Embed orders, ten at a time, forget the vectors, and say how much memory the process has on the way."""
    model = OpenAIEmbeddingModel(MODEL, base_url=args.url)
    process, seen, num_done = psutil.Process(), {}, 0
    marks = [0.1, 0.25, 0.5, 0.75, 1.0]
    slots = asyncio.Semaphore(10)

    async def one(texts: list[str]) -> None:
        nonlocal num_done
        try:
            await model.embed_rows(texts)
        finally:
            slots.release()
        num_done += len(texts)
        while marks and num_done >= marks[0] * args.texts:
            seen[f"{marks.pop(0):.0%}"] = process.memory_info().rss / 2**20

    tasks = set()
    for texts in requests_of(args):
        await slots.acquire()
        tasks = {task for task in tasks if not task.done()} | {asyncio.create_task(one(texts))}
    await asyncio.gather(*tasks)
    await model.close()
    return seen


async def _timed(args: argparse.Namespace, one: Callable[[list[str]], Awaitable[None]]) -> dict[str, float]:
    orders = list(requests_of(args))
    slots = asyncio.Semaphore(8)

    async def slotted(texts: list[str]) -> None:
        async with slots:
            await one(texts)

    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    await asyncio.gather(*map(slotted, orders))
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": args.texts / wall_s, "core": args.texts / cpu_s}


WAYS = {
    "gather": gathered,
    "static": static_split,
    "kura": kura,
    "daft": daft,
    "ours": client_ours,
    "sdk": client_sdk,
    "float": client_float,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--url", required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--texts", type=int, required=True)
    parser.add_argument("--words", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--bound", default="requests")
    parser.add_argument("--limit", type=float, default=0.0)
    parser.add_argument("--limit-per-request", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    sys.stdout.write(json.dumps(asyncio.run(WAYS[args.way](args))) + "\n")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
