"""Spot checks: texts of stored rows read again, and new vectors of them held against the stored ones."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

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
