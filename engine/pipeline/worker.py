"""The embedding actor: builds its model once, and turns parcels of texts into parcels of vectors."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import EngineError, ProviderError, Refused
from engine.model_config import ModelConfig
from engine.models import registry
from engine.models.api.prices import dollars
from engine.models.base import BaseEmbeddingModel
from engine.models.embeddings import Chunks, Embeddings, Ints, Vectors
from engine.models.loop_thread import LoopThread
from engine.pipeline.budget import Shared, join
from engine.pipeline.parcel import Item, pack, unpack
from engine.schema import (
    CHUNK_END,
    CHUNK_INDEX,
    CHUNK_START,
    EMBEDDING,
    SOURCE_ROW,
    Reject,
    Usage,
    utc_now,
    vectors_type,
)
from engine.sources import texts as text_checks
from engine.sources.rows import Rows, Selection

logger = logging.getLogger(__name__)

MADE_ID = "id"
CLOSE_S = 2.0
"""For which an actor that ends waits for its model: what it has to close is connections and threads."""
COUNTS = (
    "num_tokens", "num_padded_tokens", "num_requests", "num_refusals", "num_retries", "num_duplicates", "num_long",
    "num_lost_tokens",
)  # fmt: skip
"""Of an answer, that are divided among its shards."""


@dataclass(frozen=True, slots=True)
class Work:
    """What an actor has to know. It travels to the actors, so it is small, and holds no secret."""

    model: ModelConfig
    identity: dict[str, Any]
    """Of the model, as the driver found it: an actor on another machine must find the same."""
    selection: Selection
    """What the readers read: of it, a part keeps the kept columns, the id first."""
    id_column: str | None
    """If None, an id of file and row is made."""
    num_threads: int
    """For the model, on CPUs; 0 leaves them as they are."""
    log_level: int
    price: float | None = None
    """Dollars per million tokens."""
    budget: Shared | None = None
    """Of a job that asks a provider."""


class EmbedWorker:
    """
    A `map_batches` actor. It has one model and one event loop for its life.

    Ray calls it from several threads: while one shard is on the device, the next is unpacked and tokenized, and the one before
    packed and handed over. How many may be inside the model at once is the model's to say.

    A bad row never leaves it as an exception: Ray would drop its whole block. What does is about the model or the config.
    """

    def __init__(self, work: Work) -> None:
        _show_logs(work.log_level)
        self._work = work
        self._thread = LoopThread("model-loop")
        self._failure: EngineError | None = None
        try:
            self._model = _built(work)
            if work.budget is not None:
                join(self._model, work.budget)
            self._gate = asyncio.Semaphore(self._model.shards_at_once)
        except EngineError as error:
            self._failure = error  # for the first call: of an error in a constructor Ray passes on the text alone

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the block's parcels with `embedding` in place of the text."""
        if self._failure is not None:
            raise self._failure
        try:
            return pa.concat_tables([pack(self._embed(items)) for items in unpack(block)])
        except EngineError:
            raise
        except Exception as error:
            raise _failed(self._work, error) from None

    def __del__(self) -> None:
        """Close the model: Ray Data lets go of the worker as its actor ends (not if it is killed)."""
        with suppress(Exception):  # there may be no model, or no loop any more
            self._thread.submit(self._model.close()).result(CLOSE_S)
            self._thread.stop()

    def _embed(self, items: Sequence[Item]) -> list[Item]:
        """Embed the texts of all items together, so that batches fill up however small the shards are."""
        found = [text_checks.texts_in(Rows(item.table, item.faults)) for item in items]
        all_texts = [text for texts, _, _ in found for text in texts]
        logger.debug("embedding started: %d texts", len(all_texts))
        try:
            answer = self._thread.submit(self._answer(all_texts)).result()
        except ProviderError:
            if self._work.budget is None:
                raise
            return [self._left(item) for item in items]  # the budget knows, and ends the run
        logger.debug("embedding done: %d embeddings, %d rejects", len(answer.vectors), len(answer.rejects))

        embedded = []
        first_text = first_vector = 0
        for item, (texts, positions, reasons) in zip(items, found, strict=True):
            stop = first_text + len(texts)
            failed = {at - first_text: why for at, why in answer.rejects.items() if first_text <= at < stop}
            kept = [position for number, position in enumerate(positions) if number not in failed]
            reasons |= {positions[number]: why for number, why in failed.items()}
            stop_vector = first_vector + len(kept)
            rows = self._kept_columns(item)
            survivors = rows if len(kept) == rows.num_rows else rows.take(pa.array(kept, pa.int64()))
            if answer.chunks is None:
                table = _with_vectors(survivors, answer.vectors[first_vector:stop_vector])
            else:
                some = [text for number, text in enumerate(texts) if number not in failed]
                table = self._with_chunks(
                    survivors, some, answer.vectors, answer.chunks, np.arange(first_vector, stop_vector)
                )
            before, after = (at / max(len(all_texts), 1) for at in (first_text, stop))
            counts = {name: _share(getattr(answer, name), before, after) for name in COUNTS}
            if answer.lost:  # text by text
                lost = [num_tokens for at, num_tokens in answer.lost.items() if first_text <= at < stop]
                counts |= {"num_long": len(lost), "num_lost_tokens": sum(lost)}
            usage = Usage(
                **counts,
                num_vectors=0 if answer.chunks is None else table.num_rows,
                cost=None if self._work.price is None else round(dollars(counts["num_tokens"], self._work.price), 9),
                embed_s=round(answer.held_s * (after - before), 6),
                busy_s=round(answer.busy_s * (after - before), 6),
                device=getattr(self._model, "device", ""),
                backend=getattr(self._model, "backend", ""),
                slug=self._model.slug() if self._work.model.provider == registry.CUSTOM else "",
                created_at=utc_now(),
            )
            embedded.append(Item(item.shard, table, rejects=_rejects(rows, reasons), usage=usage))
            first_text, first_vector = stop, stop_vector
        return embedded

    def _left(self, item: Item) -> Item:
        rows = self._kept_columns(item).slice(0, 0)
        return Item(item.shard, _with_vectors(rows, np.empty((0, 1), np.float32)), is_left=True)

    def _with_chunks(
        self, rows: pa.Table, texts: Sequence[str], vectors: Vectors, chunks: Chunks, taken: Ints
    ) -> pa.Table:
        """Put a row for each chunk of a text in place of the text's; a text column that is kept has the chunk's text then."""
        chunks, of_vectors = chunks.taken(taken)
        numbers = np.repeat(np.arange(len(texts)), chunks.counts)
        kept = self._work.selection.kept
        spans = list(zip(numbers.tolist(), chunks.starts.tolist(), chunks.stops.tolist(), strict=True))
        is_cut = len(spans) > len(texts) or any(stop - start < len(texts[number]) for number, start, stop in spans)
        if (name := self._work.selection.text_column) in kept and is_cut:
            at, kind = rows.column_names.index(name), rows.schema.field(name).type
            of_chunks = pa.array([texts[number][start:stop] for number, start, stop in spans], kind)
            rows = rows.drop_columns([name]).take(numbers).add_column(at, name, of_chunks)
        else:
            rows = rows.take(numbers)
        columns = {
            CHUNK_INDEX: pa.array(chunks.indices, pa.int32()),
            CHUNK_START: pa.array(chunks.starts, pa.int64()),
            CHUNK_END: pa.array(chunks.stops, pa.int64()),
        }
        for column, values in columns.items():
            rows = rows.add_column(rows.num_columns - 1, column, values)
        return _with_vectors(rows, vectors[of_vectors])

    async def _answer(self, texts: list[str]) -> Embeddings:
        """Embed texts; the dimension is known even if there are none."""
        async with self._gate:
            started = time.perf_counter()
            answer = await self._model.embed_rows(texts)
            if not len(answer.vectors):
                answer.vectors = answer.vectors.reshape(0, await self._model.dimension())
            answer.held_s = answer.held_s or time.perf_counter() - started
        return answer

    def _kept_columns(self, item: Item) -> pa.Table:
        """Return the columns that a part keeps, the id first, and `_source_row`; the text only if it is kept."""
        if self._work.id_column:
            return item.table.select([*self._work.selection.kept, SOURCE_ROW])
        rows = item.table.column(SOURCE_ROW)
        ids = pc.binary_join_element_wise(item.shard.file.path, rows.cast(pa.string()), "#")
        return item.table.select([*self._work.selection.kept, SOURCE_ROW]).add_column(0, MADE_ID, ids)


def _share(total: int, before: float, after: float) -> int:
    """Return a shard's part of a count of several: the parts add up exactly."""
    return round(total * after) - round(total * before)


def _built(work: Work) -> BaseEmbeddingModel:
    if work.num_threads:
        _set_threads(work.num_threads)
    if registry.identity(work.model) != work.identity:
        raise Refused(
            f"the model {work.model.model} on the node of an actor is not the one on the driver's: "
            "make both the same, then run the same command again"
        )
    try:
        return registry.build(work.model)
    except EngineError:
        raise
    except Exception as error:
        raise _failed(work, error) from None


def _failed(work: Work, error: Exception) -> ProviderError:
    """Name an error without its message, which comes from the model's libraries and could quote a text."""
    return ProviderError(f"the model {work.model.model} failed: {type(error).__name__}; what was committed is kept")


def _with_vectors(rows: pa.Table, vectors: Vectors) -> pa.Table:
    """Put `embedding` before `_source_row`, which is the last column of a part."""
    flat = pa.array(vectors.reshape(-1), pa.float32())
    embedding = pa.FixedSizeListArray.from_arrays(flat, type=vectors_type(vectors.shape[1]))
    return rows.add_column(rows.num_columns - 1, EMBEDDING, embedding)


def _rejects(rows: pa.Table, reasons: dict[int, str]) -> list[Reject]:
    positions = sorted(reasons)
    some = rows.take(pa.array(positions, pa.int64()))
    ids = text_checks.values_of(some.column(0))
    source_rows = some.column(SOURCE_ROW).to_pylist()
    return [
        Reject(
            source_row, text_checks.INVALID_UTF8 if isinstance(key, text_checks.Undecodable) else key, reasons[position]
        )
        for position, source_row, key in zip(positions, source_rows, ids, strict=True)
    ]


def _set_threads(num_threads: int) -> None:
    """Give the model as many threads as the actor has cores: Ray starts its processes with one."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # what torch goes by when it is imported; not every model needs it
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)  # the tokenizer's
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(num_threads)


def _show_logs(level: int) -> None:
    """Let the engine's log lines out of the actor; Ray carries what a worker prints to the driver."""
    root = logging.getLogger("engine")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
    root.setLevel(level)
