"""What an actor of the engine does, and nothing else: no Ray, no writing. The engine's own cost is what it takes beside this."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.measure import num_cores
from engine.config import load_config
from engine.models import registry
from engine.models.loop_thread import LoopThread
from engine.pipeline import process, resources
from engine.sources import texts
from engine.sources.formats import read_shards
from engine.sources.rows import Selection
from engine.survey import survey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from engine.models.base import BaseEmbeddingModel, Embeddings
    from engine.schema import Shard


@dataclass(frozen=True, slots=True)
class Done:
    """A shard's answer, and when it was there."""

    shard: Shard
    answer: Embeddings
    at: float


@dataclass(frozen=True, slots=True)
class Loops:
    """What the loops of all actors did, each with its shards in order, and what ran the model."""

    done: list[list[Done]]
    backend: str


class BareLoop:
    """
    The shards of a job, or one actor's share of them, and its model, with the threads that an actor of this machine would have.

    Args:
        job: Options of `engine.run`; nothing is written to its output.
        num_gpus: That the actor would see.
        actor: Which of the actors this is.
    """

    def __init__(self, job: dict[str, Any], num_gpus: int = 0, actor: int = 0) -> None:
        self._config = load_config(**job)
        plan = survey(self._config).standing.plan
        node = {"CPU": float(num_cores()), "GPU": float(num_gpus)}
        decided = resources.decide(self._config, [node], len(plan.pending))
        self.num_actors = decided.min_actors
        self._num_threads = decided.num_threads
        self._pending = plan.pending[actor :: self.num_actors]
        self._suited = registry.suited(self._config.of_model(), plan.pending_bytes // decided.max_actors)
        self.backend = ""

    def answers(self) -> Iterator[Done]:
        """
        Yield the model's answer to each shard, in order, read as a reader of the engine reads it.

        As many shards are inside the model at once as in an actor, and the next one is read meanwhile.
        """
        if self._num_threads:
            process.set_threads(self._num_threads)
        model = registry.build(self._suited)
        model.remember()
        self.backend = getattr(model, "backend", "")
        thread = LoopThread("model-loop")
        thread.at_end(model.close)
        gate = asyncio.Semaphore(model.shards_at_once)
        calls: deque[Future[Done]] = deque()
        for shard, rows in zip(self._pending, read_shards(self._pending, Selection.of(self._config)), strict=True):
            found, _, _ = texts.texts_in(rows)
            calls.append(thread.submit(_done(gate, model, shard, found)))
            if len(calls) > model.shards_at_once:
                yield calls.popleft().result()
        while calls:
            yield calls.popleft().result()
        thread.stop()


async def _done(gate: asyncio.Semaphore, model: BaseEmbeddingModel, shard: Shard, found: list[str]) -> Done:
    async with gate:
        answer = await model.embed_rows(found)
        return Done(shard, answer, time.perf_counter())


def loops(job: dict[str, Any], num_gpus: int = 0) -> Loops:
    """Run a loop for each actor that the engine would have here: in this process, or each in one of its own."""
    first = BareLoop(job, num_gpus)
    count = first.num_actors
    if count == 1:
        return Loops([list(first.answers())], first.backend)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=spawn, max_tasks_per_child=1) as pool:
        ended = list(pool.map(_loop, [job] * count, [num_gpus] * count, range(count)))
    return Loops([done for done, _ in ended], ended[0][1])


def _loop(job: dict[str, Any], num_gpus: int, actor: int) -> tuple[list[Done], str]:
    own = BareLoop(job, num_gpus, actor)
    return list(own.answers()), own.backend
