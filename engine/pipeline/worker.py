"""The embedding actor: builds its model once, and turns parcels of texts into parcels of vectors."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import ConfigError, EngineError, ProviderError, Refused
from engine.former_vectors import FormerVectors, Found
from engine.model_config import ModelConfig
from engine.models import registry
from engine.models.api.prices import dollars
from engine.models.base import BaseEmbeddingModel, Embeddings, Vectors
from engine.models.loop_thread import LoopThread
from engine.pipeline.budget import Shared, join
from engine.pipeline.parcel import Item, pack, unpack
from engine.quantization import Stored, VectorFormat, quantize, to_arrow, usable
from engine.repeated_ids import num_repeated
from engine.reuse import ReuseIndex
from engine.schema import EMBEDDING, SOURCE_ROW, TEXT_HASH, Reject, Usage, utc_now
from engine.sources import texts as text_checks
from engine.sources.rows import Rows, Selection
from engine.text_hashes import numbers_of, text_hashes

logger = logging.getLogger(__name__)

MADE_ID = "id"
CLOSE_S = 2.0
"""For which an actor that ends waits for its model: what it has to close is connections and threads."""
COUNTS = (
    "num_tokens", "num_padded_tokens", "num_requests", "num_refusals", "num_retries", "num_duplicates", "num_long",
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
    output_dtype: str = "float32"
    """What vectors are stored as."""
    scale: float | None = None
    """Of int8."""
    reuse: ReuseIndex | None = None
    """Of parts that may have vectors of the texts already."""


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
            self._former = FormerVectors.of_model(work.reuse, work.output_dtype, work.scale, self._slug())
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
        hashes = text_hashes(all_texts)
        former = self._former.find(numbers_of(hashes)) if self._former else Found.nothing(len(all_texts))
        new_texts = [all_texts[at] for at in former.missing.tolist()]
        logger.debug("embedding started: %d texts, %d others have vectors", len(new_texts), len(former.stored))
        try:
            answer = self._embedded(new_texts)
        except ProviderError:
            if self._work.budget is None:
                raise
            return [self._left(item) for item in items]  # the budget knows, and ends the run
        logger.debug("embedding done: %d embeddings, %d rejects", len(answer.vectors), len(answer.rejects))

        all_failed = {int(former.missing[at]): why for at, why in answer.rejects.items()}
        every, kind = self._stored(answer.vectors)
        every = former.with_new(every, sorted(all_failed))
        embedded = []
        first_text = first_vector = 0
        for item, (texts, positions, reasons) in zip(items, found, strict=True):
            stop = first_text + len(texts)
            failed = {at - first_text: why for at, why in all_failed.items() if first_text <= at < stop}
            kept = [position for number, position in enumerate(positions) if number not in failed]
            reasons |= {positions[number]: why for number, why in failed.items()}
            stored = every[first_vector : first_vector + len(kept)]
            first_vector += len(kept)
            kept, stored, unfit = _fitting(kept, stored, kind)
            rows = self._kept_columns(item)
            survivors = rows if len(kept) == rows.num_rows else rows.take(pa.array(kept, pa.int64()))
            rejects = _rejects(rows, reasons | unfit)
            usage = self._usage(answer, former.shares(first_text, stop), survivors)
            usage = replace(usage, num_reused=former.num_between(first_text, stop))
            of_rows = hashes.slice(first_text, len(texts)).take(pa.array(np.searchsorted(positions, kept)))
            table = _with_vectors(survivors, of_rows, stored, kind)
            embedded.append(Item(item.shard, table, rejects=rejects, usage=usage, vectors=kind))
            first_text = stop
        return embedded

    def _embedded(self, texts: list[str]) -> Embeddings:
        """Embed texts; the model is not asked if there are none, and former parts say what its vectors are like."""
        if not texts and self._former is not None:
            return Embeddings(np.empty((0, self._former.vectors.dimension), np.float32))
        answer = self._thread.submit(self._answer(texts)).result()
        if self._former is not None and answer.vectors.shape[1] != self._former.vectors.dimension:
            raise Refused(
                f"the model answers with {answer.vectors.shape[1]} dimensions, and the vectors to be reused have "
                f"{self._former.vectors.dimension}: leave --reuse out, or use another output folder"
            )
        return answer

    def _slug(self) -> str:
        return self._model.slug() if self._work.model.provider == registry.CUSTOM else ""

    def _usage(self, answer: Embeddings, share: tuple[float, float], survivors: pa.Table) -> Usage:
        """Return what a shard cost: its share of an answer, from where it begins to where it ends."""
        counts = {name: _share(getattr(answer, name), *share) for name in COUNTS}
        price = self._work.price
        return Usage(
            **counts,
            cost=None if price is None else round(dollars(counts["num_tokens"], price), 9),
            embed_s=round(answer.held_s * (share[1] - share[0]), 6),
            busy_s=round(answer.busy_s * (share[1] - share[0]), 6),
            device=getattr(self._model, "device", ""),
            backend=getattr(self._model, "backend", ""),
            slug=self._slug(),
            created_at=utc_now(),
            num_repeated_ids=num_repeated(survivors.column(0)) if self._work.id_column else 0,
        )

    def _left(self, item: Item) -> Item:
        rows = self._kept_columns(item).slice(0, 0)
        stored, kind = self._stored(np.empty((0, 1), np.float32))
        return Item(item.shard, _with_vectors(rows, text_hashes([]), stored, kind), is_left=True, vectors=kind)

    def _stored(self, vectors: Vectors) -> tuple[Stored, VectorFormat]:
        """Return vectors as they are stored: here, so that no more than that travels to the publisher."""
        kind = VectorFormat(self._work.output_dtype, vectors.shape[1], self._work.scale)
        return quantize(vectors, kind), kind

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


def _fitting(kept: list[int], stored: Stored, kind: VectorFormat) -> tuple[list[int], Stored, dict[int, str]]:
    """
    Take out rows whose vector is lost in what it is stored as: too large for float16, or all zeros in it or in int8.

    Raises:
        ConfigError: If that is so of all of several: then it is the model that does not suit the type.
    """
    fits = usable(stored, kind)
    if fits.all():
        return kept, stored, {}
    if len(kept) > 1 and not fits.any():
        raise ConfigError(
            f"output_dtype: the model's vectors are too large or too small for {kind.dtype}: store them as float32, in another output "
            "folder"
        )
    lost = {
        row: f"its vector is too large or too small for {kind.dtype}"
        for row, fit in zip(kept, fits, strict=True)
        if not fit
    }
    return [row for row in kept if row not in lost], stored[fits], lost


def _with_vectors(rows: pa.Table, hashes: pa.Array, stored: Stored, kind: VectorFormat) -> pa.Table:
    """Put `embedding` and `_text_hash` before `_source_row`, which is the last column of a part."""
    hashed = rows.add_column(rows.num_columns - 1, TEXT_HASH, hashes)
    return hashed.add_column(rows.num_columns - 1, EMBEDDING, to_arrow(stored, kind))


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
