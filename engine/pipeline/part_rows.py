"""The rows of a part: what is kept of a shard, and what was made of its texts, put together as a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from engine.errors import ConfigError
from engine.models.embeddings import Chunks
from engine.quantization import Stored, VectorFormat, to_arrow, usable
from engine.schema import CHUNK_END, CHUNK_INDEX, CHUNK_START, EMBEDDING, SOURCE_ROW, TEXT_HASH, Reject
from engine.sources import texts as text_checks
from engine.stored_vectors import StoredVectors

UNFIT = "its vector is too large or too small for {dtype}"


def fitting(stored: StoredVectors, kind: VectorFormat) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """
    Tell the texts whose vectors are all usable from those with one that is lost: too large for float16, or all zeros in it or in int8.

    Args:
        stored: The vectors of the texts.
        kind: How they are stored.

    Returns:
        Shape (texts,).

    Raises:
        ConfigError: If none of several is usable: then it is the model that does not suit the type.
    """
    fits = usable(stored.rows, kind)
    if stored.chunks is not None and len(fits):
        fits = np.logical_and.reduceat(fits, stored.chunks.firsts[:-1])
    if len(fits) > 1 and not fits.any():
        raise ConfigError(
            f"output_dtype: the model's vectors are too large or too small for {kind.dtype}: store them as float32, in another output "
            "folder"
        )
    return fits


def with_chunks(rows: pa.Table, texts: Sequence[str], chunks: Chunks, text_column: str | None) -> pa.Table:
    """
    Put a row for each chunk of a text in place of the text's.

    Args:
        rows: One for each text; `_source_row` is the last column.
        texts: Of the rows.
        chunks: Of the texts.
        text_column: The column that is embedded, if it is one; if it is kept, it has the chunk's text then.
    """
    numbers = np.repeat(np.arange(len(texts)), chunks.counts)
    spans = list(zip(numbers.tolist(), chunks.starts.tolist(), chunks.stops.tolist(), strict=True))
    is_cut = len(spans) > len(texts) or any(stop - start < len(texts[number]) for number, start, stop in spans)
    if text_column in rows.column_names and is_cut:
        at, kind = rows.column_names.index(text_column), rows.schema.field(text_column).type
        of_chunks = pa.array([texts[number][start:stop] for number, start, stop in spans], kind)
        rows = rows.drop_columns([text_column]).take(numbers).add_column(at, text_column, of_chunks)
    else:
        rows = rows.take(numbers)
    columns = {
        CHUNK_INDEX: pa.array(chunks.indices, pa.int32()),
        CHUNK_START: pa.array(chunks.starts, pa.int64()),
        CHUNK_END: pa.array(chunks.stops, pa.int64()),
    }
    for column, values in columns.items():
        rows = rows.add_column(rows.num_columns - 1, column, values)
    return rows


def with_vectors(rows: pa.Table, hashes: pa.Array, stored: Stored, kind: VectorFormat) -> pa.Table:
    """Put `embedding` and `_text_hash` before `_source_row`, which is the last column of a part."""
    hashed = rows.add_column(rows.num_columns - 1, TEXT_HASH, hashes)
    return hashed.add_column(rows.num_columns - 1, EMBEDDING, to_arrow(stored, kind))


def rejects_of(rows: pa.Table, reasons: dict[int, str]) -> list[Reject]:
    """Return the rejects of a shard: of some of its rows, by position."""
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
