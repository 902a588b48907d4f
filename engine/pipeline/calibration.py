"""
Calibrating: before the stream of a job whose vectors become int8, one actor embeds a sample of its texts.

The actor reads the texts itself, and gives back a few numbers: the driver holds neither texts nor vectors here either.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayError

from engine.calibration import Calibration, fix, recovered, stored_calibration
from engine.commits import Usage
from engine.errors import EngineError, ProviderError
from engine.models import registry
from engine.models.api.prices import dollars
from engine.models.base import PROBE, Embeddings, lowest_cosine
from engine.pipeline import cluster
from engine.pipeline.answered import COUNTS
from engine.pipeline.process import ENGINE
from engine.pipeline.stream import MAX_CRASHES, STALL_S
from engine.pipeline.worker import EmbedWorker, Work
from engine.quantization import INT8_MAX, VectorFormat, dequantize, quantize, scale_for
from engine.schema import utc_now
from engine.sources import texts as text_checks
from engine.sources.formats import read_shards
from engine.sources.rows import Rows

if TYPE_CHECKING:
    from engine.pipeline.resources import Resources
    from engine.schema import Shard
    from engine.storage import Storage

logger = logging.getLogger(__name__)

MIN_TEXTS, MAX_TEXTS = 64, 1024
SHARE = 0.02
"""Of a job's texts that are embedded for its calibration, between these two: they are embedded again with their shards."""
MAX_SHARDS = 16
"""That the texts are from."""
HEADROOM = 2.0
"""Of a scale that was found from one sentence: twice its largest number fits."""
POLL_S = 1.0
CLOSE_S = 10.0


def calibrated(
    storage: Storage,
    work: Work,
    pending: Sequence[Shard],
    chosen: Resources,
    *,
    stall_s: float | None,
    still_ours: Callable[[], None],
) -> tuple[Calibration, bool]:
    """
    Return the calibration of an output; make it, if there is none yet.

    Args:
        storage: Of the output.
        work: What an actor has to know.
        pending: Shards to take a sample from.
        chosen: What an actor gets.
        stall_s: Seconds without an answer after which it is given up, as of a run.
        still_ours: Called now and then; raises if the output is not this run's any more.

    Returns:
        The calibration, and whether this call embedded a sample for it.

    Raises:
        EngineError: What the actor raised, or that nothing came of it.
    """
    found = stored_calibration(storage)
    if found is not None:
        return found, False
    if (lost := recovered(storage)) is not None:
        return fix(storage, lost), False
    sample = sample_of(pending)
    num_texts = sum(len(rows) for _, rows in sample)
    logger.info("calibration started: %d texts of %d shards", num_texts, len(sample))
    # A sample is not worth the conversion of a model.
    small = replace(work, model=registry.suited(work.model, 0))
    seconds = stall_s or STALL_S
    with cluster.translated():
        made = _ask_an_actor(small, sample, chosen, seconds, still_ours)
    if made.source == "probe":
        logger.warning(
            "no text of the sample could be embedded: int8 is calibrated on a plain English sentence, with room for numbers %g times as "
            "large",
            HEADROOM,
        )
    logger.info("calibration done: %d texts, a step is %.3g", made.num_texts, made.scale)
    return fix(storage, made), True


def sample_of(pending: Sequence[Shard]) -> list[tuple[Shard, list[int]]]:
    """Choose rows, spread evenly over shards that are spread evenly over a job; of each shard their positions in it."""
    num_rows = sum(map(len, pending))
    wanted = min(MAX_TEXTS, max(MIN_TEXTS, round(num_rows * SHARE)), num_rows)
    shards = _spread(list(pending), MAX_SHARDS)
    each = -(-wanted // max(len(shards), 1))
    return [(shard, _spread(range(len(shard)), each)) for shard in shards]


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return up to `most` items at even distances."""
    count = min(most, len(items))
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]


class Calibrator(EmbedWorker):
    """An actor that embeds a sample."""

    def measure(self, sample: Sequence[tuple[Shard, Sequence[int]]]) -> Calibration:
        """Read the rows of the sample, embed their texts, and choose the scale that suits their vectors."""
        if self._failure is not None:
            raise self._failure
        texts = self._texts(sample)
        answer = (
            self._thread.submit(self._answer(texts)).result() if texts else Embeddings(np.empty((0, 0), np.float32))
        )
        if len(answer.vectors):
            return _calibration("texts", answer.vectors, 1.0, self._usage_of(answer))
        probe = self._thread.submit(self._answer([PROBE])).result()
        if not len(probe.vectors):
            raise ProviderError(
                f"the model {self._work.model.model} embeds neither a text of the sample nor a plain English sentence: mend the model or "
                "its settings, then run the same command again"
            )
        return _calibration("probe", probe.vectors, HEADROOM, self._usage_of(answer, probe))

    def close(self) -> None:
        """Close the model."""
        self._thread.stop()

    def _texts(self, sample: Sequence[tuple[Shard, Sequence[int]]]) -> list[str]:
        """Return the texts of the sample that can be embedded."""
        texts = []
        read = read_shards([shard for shard, _ in sample], self._work.selection)
        for rows, (_, picked) in zip(read, sample, strict=True):
            faults = {at: rows.faults[position] for at, position in enumerate(picked) if position in rows.faults}
            texts += text_checks.texts_in(Rows(rows.table.take(pa.array(list(picked), pa.int64())), faults))[0]
        return texts

    def _usage_of(self, *answers: Embeddings) -> Usage:
        counts = {name: sum(getattr(answer, name) for answer in answers) for name in COUNTS}
        price = self._work.price
        return Usage(**counts, cost=None if price is None else round(dollars(counts["num_tokens"], price), 9))


def _calibration(source: str, vectors: Any, headroom: float, usage: Usage) -> Calibration:
    scale = scale_for(vectors) * headroom
    stored = VectorFormat("int8", vectors.shape[1], scale)
    return Calibration(
        scale=scale,
        source=source,
        num_texts=len(vectors) if source == "texts" else 0,
        clipped_share=round(float((np.abs(vectors) > scale * (INT8_MAX + 0.5)).mean()), 9),
        lowest_cosine=round(lowest_cosine(vectors, dequantize(quantize(vectors, stored), stored)), 6),
        usage=usage,
        created_at=utc_now(),
    )


def _ask_an_actor(
    work: Work,
    sample: Sequence[tuple[Shard, list[int]]],
    chosen: Resources,
    seconds: float,
    still_ours: Callable[[], None],
) -> Calibration:
    """Start an actor with a pool's actor's resources, and let go of it before the pool wants them."""
    actor = (
        ray.remote(Calibrator)
        .options(
            num_cpus=chosen.num_cpus,
            num_gpus=chosen.num_gpus or None,
            max_restarts=MAX_CRASHES,
            max_task_retries=MAX_CRASHES,
        )
        .remote(work, ENGINE)
    )
    until = time.monotonic() + seconds
    try:
        answer = actor.measure.remote(sample)
        while not ray.wait([answer], timeout=POLL_S)[0]:
            still_ours()
            if time.monotonic() > until:
                raise EngineError(
                    f"the sample for int8 was not embedded within {seconds:g} s, and the run was given up (--stall-s): does an actor fit "
                    "on a node, or does the model hang?"
                )
        made: Calibration = ray.get(answer)
        with suppress(RayError, TimeoutError):
            ray.get(actor.close.remote(), timeout=CLOSE_S)
        return made
    finally:
        _end(actor)


def _end(actor: Any) -> None:
    """End an actor, and wait until it is gone: the memory of its GPU is the pool's next."""
    with suppress(RayError, TimeoutError):
        ray.kill(actor)
        ray.get(actor.__ray_ready__.options(max_task_retries=0).remote(), timeout=CLOSE_S)  # raises as it is gone
