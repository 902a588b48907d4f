"""Parquet as a source: what a footer tells the planner, and the rows of its shards, read in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from engine.schema import InputFile, Shard
from engine.sources.columns import check_column
from engine.sources.opening import check_unchanged, open_input, readable
from engine.sources.rows import Rows, Selection
from engine.sources.shape import FileShape

KIND = "Parquet"
READ_BUFFER_BYTES = 8 * 1024**2
READ_ROWS = 4096
"""Rows decoded at a time: a shard is put together from such pieces, so that a giant row group is never held whole."""


def shape(file: InputFile, selection: Selection) -> FileShape:
    """
    Read the footer of a file.

    Raises:
        SourceError: If it is unreadable, or lacks a column.
    """
    with readable(file, KIND), open_input(file) as opened, pq.ParquetFile(opened) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        for column in selection.columns:
            check_column(file, schema.names, column, selection.advice_on(column))
        selection.check_types(schema, file.location)
        texts = selection.text_columns
        columns = [number for number in range(metadata.num_columns) if metadata.schema.column(number).path in texts]
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        return FileShape(
            file=file,
            row_groups=tuple(group.num_rows for group in groups),
            text_bytes=sum(group.column(number).total_uncompressed_size for group in groups for number in columns),
            kept_types=tuple((column, str(schema.field(column).type)) for column in selection.kept),
        )


def read(shards: Sequence[Shard], selection: Selection) -> Iterator[Rows]:
    """
    Read shards of one file in one pass.

    Args:
        shards: In the order of their rows, all of one file.
        selection: What to read.

    Raises:
        SourceChanged: If the file is not what was planned, before or after its rows were read.
        SourceError: If it cannot be read.
    """
    file = shards[0].file
    check_unchanged(file)
    with readable(file, KIND), open_input(file) as opened, _open(opened) as parquet:
        pieces = _pieces(parquet, shards, selection.columns)
        for shard in shards:
            table = _take(pieces, len(shard))
            check_unchanged(file)
            yield Rows(table)


def _open(opened: pa.NativeFile) -> pq.ParquetFile:
    """Open a file so that its column chunks are read a buffer at a time: by default Arrow would hold a whole one."""
    return pq.ParquetFile(opened, page_checksum_verification=True, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)


def _take(pieces: Iterator[pa.RecordBatch], num_rows: int) -> pa.Table:
    """Put the next `num_rows` rows together; pieces never straddle shards."""
    taken: list[pa.RecordBatch] = []
    missing = num_rows
    while missing > 0:
        piece = next(pieces, None)
        if piece is None:
            raise pa.ArrowInvalid("fewer rows than the footer says")
        taken.append(piece)
        missing -= piece.num_rows
    return pa.Table.from_batches(taken)


def _pieces(parquet: pq.ParquetFile, shards: Sequence[Shard], columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of `shards` in order, cut where a shard ends; row groups that hold none of them are not read."""
    waiting = iter(shards)
    shard = next(waiting, None)
    position = 0
    for group in range(parquet.metadata.num_row_groups):
        end = position + parquet.metadata.row_group(group).num_rows
        if shard is None:
            return
        if shard.start >= end:
            position = end
            continue
        for batch in parquet.iter_batches(READ_ROWS, row_groups=[group], columns=columns):
            stop = position + batch.num_rows
            while shard is not None and shard.start < stop:
                start = max(shard.start, position)
                yield batch.slice(start - position, min(shard.stop, stop) - start)
                if shard.stop > stop:
                    break
                shard = next(waiting, None)
            position = stop
            if shard is None or shard.start >= end:
                break
        position = end
