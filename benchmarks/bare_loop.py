"""What an actor of the engine does, and nothing else: no Ray, no writing. The engine's own cost is what it takes beside this."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

from engine.config import load_config
from engine.models import registry
from engine.pipeline import process, resources
from engine.sources import texts
from engine.sources.formats import read_shards
from engine.sources.rows import Selection
from engine.survey import survey

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.models.base import Embeddings


class BareLoop:
    """
    The shards of a job and its model, built with the threads that an actor of this machine would have.

    Args:
        job: Options of `engine.run`; nothing is written to its output.
        num_gpus: That the actor would see.
    """

    def __init__(self, job: dict[str, Any], num_gpus: int = 0) -> None:
        self._config = load_config(**job)
        plan = survey(self._config).standing.plan
        self._pending = plan.pending
        node = {"CPU": float(os.cpu_count() or 1), "GPU": float(num_gpus)}
        if num_threads := resources.decide(self._config, [node], len(plan.pending)).num_threads:
            process.set_threads(num_threads)
        self.model = registry.build(registry.suited(self._config.of_model(), plan.pending_bytes))
        self.model.remember()

    def answers(self) -> Iterator[tuple[Embeddings, float]]:
        """Yield the model's answer to each shard, read as a reader of the engine reads it, and when it was there."""
        events = asyncio.new_event_loop()
        for rows in read_shards(self._pending, Selection.of(self._config)):
            found, _, _ = texts.texts_in(rows)
            yield events.run_until_complete(self.model.embed_rows(found)), time.perf_counter()
