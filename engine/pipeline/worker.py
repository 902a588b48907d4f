"""The embedding actor: builds its model once, and turns parcels of texts into parcels of vectors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.commits import Usage
from engine.errors import EngineError, ProviderError, Refused
from engine.former_vectors import FormerVectors
from engine.ledger import Ledger
from engine.model_config import ModelConfig
from engine.models import registry
from engine.models.api.prices import dollars
from engine.models.base import BaseEmbeddingModel
from engine.models.embeddings import Chunks, Embeddings, Vectors
from engine.models.loop_thread import LoopThread
from engine.pipeline import process
from engine.pipeline.answered import Answered
from engine.pipeline.budget import Shared, join
from engine.pipeline.parcel import Item, pack, unpack
from engine.pipeline.part_rows import rejects_of, with_chunks, with_vectors
from engine.pipeline.publish import Commits
from engine.quantization import VectorFormat, quantize
from engine.repeated_ids import num_repeated
from engine.reuse import ReuseIndex
from engine.schema import SOURCE_ROW, Job, utc_now
from engine.sources import texts as text_checks
from engine.sources.rows import Rows, Selection
from engine.stored_vectors import Found
from engine.text_hashes import numbers_of, text_hashes

logger = logging.getLogger(__name__)

MADE_ID = "id"


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
    num_gpus: float = 0.0
    """Of the actor: with a share of one, it has that share of its memory."""
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

    def __init__(self, work: Work, driver: tuple[str, int] = process.ENGINE) -> None:
        self._thread = LoopThread("model-loop")
        self._failure: EngineError | None = None
        try:
            process.check_engine(driver)  # before anything of `work` is believed
            process.show_logs(work.log_level)
            self._work = work
            self._model = _built(work)
            # Ray Data lets go of the worker, and the worker of its thread, as its actor ends (not if it is killed).
            self._thread.at_end(self._model.close)
            self._model.remember()
            if work.budget is not None:
                join(self._model, work.budget)
            self._gate = asyncio.Semaphore(self._model.shards_at_once)
            self._former = FormerVectors.of_model(work.reuse, work.output_dtype, work.scale, self._slug())
        except EngineError as error:
            self._failure = error  # for the first call: of an error in a constructor Ray passes on the text alone

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the block's parcels with `embedding` in place of the text, or what becomes of them here."""
        if self._failure is not None:
            raise self._failure
        try:
            parcels = [self._embed(items) for items in unpack(block)]
        except EngineError:
            raise
        except Exception as error:
            raise _failed(self._work, error) from None
        return pa.concat_tables([self._handed_over(items) for items in parcels])

    def _handed_over(self, items: Sequence[Item]) -> pa.Table:
        """Return what leaves the actor for a parcel: here all of it, for a publisher."""
        return pack(items)

    def _embed(self, items: Sequence[Item]) -> list[Item]:
        """Embed the texts of all items together, so that batches fill up however small the shards are."""
        found = [text_checks.texts_in(Rows(item.table, item.faults)) for item in items]
        texts = [text for of_item, _, _ in found for text in of_item]
        hashes = text_hashes(texts)
        former = self._former.find(numbers_of(hashes)) if self._former else Found.nothing(len(texts))
        new_texts = [texts[at] for at in former.missing.tolist()]
        logger.debug("embedding started: %d texts, %d others have vectors", len(new_texts), former.num_texts)
        try:
            answer = self._embedded(new_texts)
        except ProviderError:
            if self._work.budget is None:
                raise
            return [self._left(item) for item in items]  # the budget knows, and ends the run
        logger.debug("embedding done: %d embeddings, %d rejects", len(answer.vectors), len(answer.rejects))
        answered = Answered.of(texts, hashes, former, answer, self._kind_of(answer.vectors))
        stops = np.cumsum([len(of_item) for of_item, _, _ in found]).tolist()
        return [
            self._item(item, positions, reasons, answered, slice(stop - len(of_item), stop))
            for item, (of_item, positions, reasons), stop in zip(items, found, stops, strict=True)
        ]

    def _item(self, item: Item, positions: list[int], reasons: dict[int, str], answered: Answered, span: slice) -> Item:
        """
        Make a shard's part of what there is of the texts of all.

        Args:
            item: The shard.
            positions: Of its texts among its rows.
            reasons: Of rows that have no text, by position.
            answered: Of the texts of all shards.
            span: Of its texts among them.
        """
        good = np.flatnonzero(answered.is_good[span])
        stored = answered.stored.taken(answered.places[span][good])
        numbers = range(span.start, span.stop)
        reasons |= {
            positions[at]: answered.failed[number] for at, number in enumerate(numbers) if number in answered.failed
        }
        rows = self._kept_columns(item)
        survivors = rows if len(good) == rows.num_rows else rows.take(pa.array(np.array(positions, np.int64)[good]))
        usage = self._usage(answered, span, survivors)
        hashed = answered.hashes.slice(span.start, len(numbers)).take(pa.array(good))
        if stored.chunks is not None:
            texts = [answered.texts[span.start + at] for at in good.tolist()]
            survivors = with_chunks(survivors, texts, stored.chunks, self._text_column)
            usage = replace(usage, num_vectors=survivors.num_rows)
            hashed = hashed.take(pa.array(np.repeat(np.arange(len(good)), stored.chunks.counts)))
        table = with_vectors(survivors, hashed, stored.rows, answered.kind)
        return Item(item.shard, table, rejects=rejects_of(rows, reasons), usage=usage, vectors=answered.kind)

    def _embedded(self, texts: list[str]) -> Embeddings:
        """Embed texts; the model is not asked if there are none, and former parts say what its vectors are like."""
        if not texts and self._former is not None:
            nothing = np.empty((0, self._former.vectors.dimension), np.float32)
            return Embeddings(nothing, chunks=Chunks.none() if self._former.has_chunks else None)
        try:
            answer = self._thread.submit(self._answer(texts)).result()
        except Exception as error:
            if self._model.is_lost():  # one GPU of many: the run goes on
                process.end(f"the device of {self._work.model.model} is lost ({type(error).__name__})")
            raise
        if self._former is not None and answer.vectors.shape[1] != self._former.vectors.dimension:
            raise Refused(
                f"the model answers with {answer.vectors.shape[1]} dimensions, and the vectors to be reused have "
                f"{self._former.vectors.dimension}: leave --reuse out, or use another output folder"
            )
        return answer

    def _slug(self) -> str:
        return self._model.slug() if self._work.model.provider == registry.CUSTOM else ""

    def _usage(self, answered: Answered, span: slice, survivors: pa.Table) -> Usage:
        """Return what a shard cost: its share of the model's answer, by the texts that went through the model."""
        counts, share = answered.counts(span)
        price = self._work.price
        return Usage(
            **counts,
            cost=None if price is None else round(dollars(counts["num_tokens"], price), 9),
            embed_s=round(answered.answer.held_s * share, 6),
            busy_s=round(answered.answer.busy_s * share, 6),
            device=getattr(self._model, "device", ""),
            backend=getattr(self._model, "backend", ""),
            slug=self._slug(),
            created_at=utc_now(),
            num_repeated_ids=num_repeated(survivors.column(0)) if self._work.id_column else 0,
            num_reused=int(np.count_nonzero(answered.former.is_there[span])),
        )

    @property
    def _text_column(self) -> str | None:
        """The column that is embedded; None if the text is made of several."""
        selection = self._work.selection
        return selection.text_column if selection.text_template is None else None

    def _left(self, item: Item) -> Item:
        rows, vectors = self._kept_columns(item).slice(0, 0), np.empty((0, 1), np.float32)
        kind = self._kind_of(vectors)
        table = with_vectors(rows, text_hashes([]), quantize(vectors, kind), kind)
        return Item(item.shard, table, is_left=True, vectors=kind)

    def _kind_of(self, vectors: Vectors) -> VectorFormat:
        """Return how vectors are stored: they become that here, so that no more travels to the publisher."""
        return VectorFormat(self._work.output_dtype, vectors.shape[1], self._work.scale)

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


class CommittingWorker(EmbedWorker):
    """An embedding actor that commits its shards itself: where cores compute, a publisher would only take its time from them."""

    def __init__(
        self, work: Work, ledger: Ledger, job: Job, epoch: int | None = None, driver: tuple[str, int] = process.ENGINE
    ) -> None:
        super().__init__(work, driver)
        self._commits = Commits(ledger, job, epoch)

    def _handed_over(self, items: Sequence[Item]) -> pa.Table:
        return self._commits.receipts(items)


def _built(work: Work) -> BaseEmbeddingModel:
    if work.num_threads:
        process.set_threads(work.num_threads)
    if work.num_gpus:
        process.switch_threads_soon()
    if registry.identity(work.model) != work.identity:
        raise Refused(
            f"the model {work.model.model} on the node of an actor is not the one on the driver's: "
            "make both the same, then run the same command again"
        )
    try:
        model = registry.build(work.model)
    except EngineError:
        raise
    except Exception as error:
        raise _failed(work, error) from None
    process.warn_of_unseen_gpu(work.num_gpus, getattr(model, "device", ""))
    process.keep_to_share_of_gpu(work.num_gpus)
    return model


def _failed(work: Work, error: Exception) -> ProviderError:
    """Name an error without its message, which comes from the model's libraries and could quote a text."""
    return ProviderError(f"the model {work.model.model} failed: {type(error).__name__}; what was committed is kept")
