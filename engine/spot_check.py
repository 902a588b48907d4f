"""Spot checks: texts of stored rows read again, and new vectors of them held against the stored ones."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from engine.models import registry
from engine.models.base import Vectors, lowest_cosine
from engine.part import Part, vectors_of
from engine.quantization import dequantize, quantize
from engine.schema import CHUNK_END, CHUNK_START, SOURCE_ROW, START, TEXT, InputFile, Shard
from engine.sources import in_memory, indexes
from engine.sources.formats import read_shards
from engine.sources.inventory import location_of
from engine.sources.opening import MEMORY
from engine.sources.rows import Selection
from engine.sources.texts import split, values_of
from engine.survey import stored_config

if TYPE_CHECKING:
    from engine.ledger import Ledger
    from engine.schema import Job

SAMPLED_SHARDS = 8
LOWEST_COSINE = {"float32": 0.9999, "bfloat16": 0.999, "float16": 0.999}
"""Between a stored vector and the same text embedded again, perhaps on another device and among other neighbours."""
LOWEST_COSINE_AS = {"int8": 0.999, "binary": 0.9}
"""The same of vectors that are stored as other than floats: the new one is quantized too, and numbers beside a step may fall on its other side."""


def embedded_again(
    ledger: Ledger, job: Job, shard_ids: Sequence[str], num_rows: int
) -> Iterator[tuple[str, float, bool]]:
    """
    Embed rows again, spread over a few shards that have vectors.

    Chance chooses, but for the same shards and number the same again: the command that sets aside finds what was found.

    Args:
        ledger: Of the output.
        job: Of the output.
        shard_ids: Of committed shards that are whole, and have their input.
        num_rows: How many.

    Yields:
        A shard, the lowest cosine of its stored vectors to new ones, and whether that is too low.
    """
    chance = random.Random(f"{num_rows} {shard_ids}")  # noqa: S311 - a sample, not a secret
    mixed = chance.sample(shard_ids, len(shard_ids))
    chosen = list(islice((each for each in mixed if ledger.record(each).num_vectors), SAMPLED_SHARDS))
    if not chosen:
        return
    config = stored_config(job, ledger.root)
    selection = replace(Selection.of(config), kept=())
    known = indexes.load(ledger.storage)
    rows_each = -(-num_rows // len(chosen))
    lowest = min(LOWEST_COSINE[config.dtype], LOWEST_COSINE_AS.get(config.output_dtype, 1.0))
    with asyncio.Runner() as loop:
        anywhere = config.of_model().model_copy(update={"device": "auto", "backend": "auto"})
        if config.long_texts == "chunk-rows":  # chunks are looked at one by one, and fit as they are
            anywhere = anywhere.model_copy(update={"long_texts": "truncate", "chunk_overlap": None})
        model = registry.build(registry.suited(anywhere, num_bytes=0))
        for shard_id in chosen:
            stored = ledger.part(shard_id)
            picked = sorted(chance.sample(range(stored.table.num_rows), min(rows_each, stored.table.num_rows)))
            texts = texts_of(stored, picked, ledger.root, job.base, selection, known)
            cosine = lowest_cosine_to(stored, picked, loop.run(model.embed_rows(texts)).vectors)
            yield shard_id, cosine, cosine < lowest
        loop.run(model.close())


def lowest_cosine_to(stored: Part, picked: list[int], again: Vectors) -> float:
    """Return the lowest cosine of stored vectors to others, which are stored and read back for it."""
    wanted = vectors_of(stored.table, stored.vectors)[picked]
    if again.shape != wanted.shape:
        return -1.0
    found = lowest_cosine(wanted, dequantize(quantize(again, stored.vectors), stored.vectors))
    return found if np.isfinite(found) else -1.0  # a vector that is nothing but zeros now


def texts_of(
    stored: Part, picked: list[int], root: str, base: str, selection: Selection, known: indexes.Known
) -> list[str]:
    """Read the texts of some of a part's rows from its input; of a part of chunks, theirs."""
    record = stored.record
    if base == MEMORY:
        file = in_memory.file_of(root, record)
    else:
        file = InputFile(record.path, location_of(base, record.path), record.size, record.version)
    shape = indexes.find(known, file, ())
    place = next(shape.placed([(record.start, record.stop)]))[2] if shape else START
    shard = Shard(record.shard_id, file, record.start, record.stop, place)
    wanted = np.asarray(stored.table.column(SOURCE_ROW))[picked] - record.start
    column = next(read_shards([shard], selection)).table.column(TEXT)
    texts = split(values_of(column.take(pa.array(wanted, pa.int64()))))[0]
    if not record.usage.num_vectors:
        return texts
    starts, stops = (np.asarray(stored.table.column(name))[picked].tolist() for name in (CHUNK_START, CHUNK_END))
    return [text[start:stop] for text, start, stop in zip(texts, starts, stops, strict=True)]
