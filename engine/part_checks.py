"""What a part has to be: the rows of its shard, each once and in order, with vectors that can be used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import CorruptOutput
from engine.quantization import BITS, Stored, VectorFormat, from_arrow, usable
from engine.schema import (
    CHUNK_END,
    CHUNK_INDEX,
    CHUNK_START,
    EMBEDDING,
    SOURCE_ROW,
    TEXT_HASH,
    Reject,
    Shard,
)
from engine.text_hashes import numbers_of


def check(
    table: pa.Table,
    *,
    shard: Shard,
    rejects: Sequence[Reject],
    name: str,
    vectors: VectorFormat | None = None,
    num_vectors: int = 0,
) -> None:
    """
    Check that a table and its rejects are the rows of `shard`, each once and in order, with vectors that can be used.

    Args:
        table: Of the part.
        shard: Whose rows it should have.
        rejects: The rows that it should lack.
        name: Of the part, for messages.
        vectors: How they are stored; by default what the type of their column tells.
        num_vectors: Rows of a table that has one for each chunk of a text, in order; 0 if each text has one.

    Raises:
        CorruptOutput: Says what is wrong.
    """
    if num_vectors:
        problem = _chunk_problem(table, num_vectors) or _row_problem(_texts_alone(table), shard, rejects)
    else:
        problem = _row_problem(table, shard, rejects)
    problem = problem or _hash_problem(table) or _vector_problem(table, vectors)
    if problem:
        raise CorruptOutput(f"the part {name} of rows {shard.start} to {shard.stop} of {shard.file.path}: {problem}")


def _row_problem(table: pa.Table, shard: Shard, rejects: Sequence[Reject]) -> str | None:
    if SOURCE_ROW not in table.column_names or table.schema.field(SOURCE_ROW).type != pa.int64():
        return f"it has no column {SOURCE_ROW} of int64"
    if table.num_rows + len(rejects) != len(shard):
        return f"{table.num_rows} rows and {len(rejects)} rejects are not {len(shard)} rows"
    rows = np.asarray(table.column(SOURCE_ROW))
    if np.any(np.diff(rows) <= 0):
        return "its rows are not in the order of the input"
    every = np.sort(np.concatenate([rows, np.fromiter((reject.source_row for reject in rejects), np.int64)]))
    if not np.array_equal(every, np.arange(shard.start, shard.stop)):
        return "its rows and rejects are not the rows of its shard"
    return None


def _hash_problem(table: pa.Table) -> str | None:
    if TEXT_HASH not in table.column_names:
        return f"it has no column {TEXT_HASH}"
    try:
        numbers_of(table.column(TEXT_HASH))
    except ValueError:
        return f"its column {TEXT_HASH} does not have 16 bytes for each row"
    return None


def _chunk_problem(table: pa.Table, num_vectors: int) -> str | None:
    """Say what is wrong with the order of chunks; whether each text is there is another question."""
    if table.num_rows != num_vectors:
        return f"it has {table.num_rows} rows instead of {num_vectors}"
    kinds = {CHUNK_INDEX: pa.int32(), CHUNK_START: pa.int64(), CHUNK_END: pa.int64(), SOURCE_ROW: pa.int64()}
    for name, kind in kinds.items():
        if name not in table.column_names or table.schema.field(name).type != kind:
            return f"it has no column {name} of {kind}"
        if table.column(name).null_count:
            return f"a {name} is missing"
    index, start, end, row = (np.asarray(table.column(name)) for name in kinds)
    is_next = np.concatenate([[False], np.diff(row) == 0])
    if not np.array_equal(index, np.where(is_next, np.concatenate([[0], index[:-1] + 1]), 0)):
        return f"its {CHUNK_INDEX} does not count the chunks of each row from 0"
    if np.any(start < 0) or np.any(start >= end) or np.any(np.diff(start)[is_next[1:]] < 0):
        return "its chunks are not in the order of their text"
    return None


def _texts_alone(table: pa.Table) -> pa.Table:
    """Return the source rows of the first chunks: each text's, once."""
    return table.select([SOURCE_ROW]).filter(pc.equal(table.column(CHUNK_INDEX), 0))


def _vector_problem(table: pa.Table, vectors: VectorFormat | None) -> str | None:
    kind = table.schema.field(EMBEDDING).type if EMBEDDING in table.column_names else pa.null()
    expected = vectors or VectorFormat.of_type(kind) or VectorFormat("float32", 0)
    wanted = expected.arrow_type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != wanted.value_type:
        name = "uint8" if expected.dtype == "binary" else expected.dtype
        return f"it has no column {EMBEDDING} of fixed-size lists of {name}"
    if kind.list_size < 1:
        return "its vectors have no dimensions"
    if kind.list_size != wanted.list_size:
        return f"its vectors have {kind.list_size} numbers instead of {wanted.list_size}"
    if table.column(EMBEDDING).null_count or table.column(EMBEDDING).combine_chunks().flatten().null_count:
        return "a vector is missing"
    return _value_problem(from_arrow(table.column(EMBEDDING)), expected)


def _value_problem(stored: Stored, of: VectorFormat) -> str | None:
    if of.dtype == "binary":
        unused = of.width * BITS - of.dimension
        return "a vector has bits beyond its dimensions" if (stored[:, -1] & ((1 << unused) - 1)).any() else None
    if of.dtype == "int8" and not of.scale:
        return "its vectors are int8, and nothing says what a step of them stands for"
    if not np.isfinite(stored).all():
        return "a vector is not finite"
    if not usable(stored, of).all():
        return "a vector is zero"
    return None
