"""Parquet as a source: what a footer tells the planner, and the rows of its shards, read in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import SourceError
from engine.schema import SOURCE_ROW, InputFile, Shard
from engine.sources.inventory import check_unchanged

FOOTER_THREADS = 16
READ_BUFFER_BYTES = 8 * 1024**2
READ_ROWS = 4096
"""Rows decoded at a time: a shard is put together from such pieces, so that a giant row group is never held whole."""


@dataclass(frozen=True, slots=True)
class FileShape:
    """What a footer says of a file: enough to cut it into shards."""

    file: InputFile
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    text_bytes: int
    """Size of the text column's pages, not compressed: a value that a dictionary holds counts once."""
    kept_types: tuple[tuple[str, str], ...]
    """Name and Arrow type of each kept column."""

    @property
    def num_rows(self) -> int:
        """Rows of the whole file."""
        return sum(self.row_groups)


def read_shapes(files: Sequence[InputFile], *, text_column: str, kept: Sequence[str]) -> list[FileShape]:
    """
    Read the footers of `files`, several at a time, and check that all have the columns of the job.

    Raises:
        SourceError: Names the file that is unreadable, lacks a column, or has one of another type than the first.
    """
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        shapes = list(pool.map(lambda file: _shape(file, text_column, kept), files))
    for shape in shapes:
        if shape.kept_types != shapes[0].kept_types:
            raise SourceError(
                f"columns have other types in {shape.file.location} than in {shapes[0].file.location}: "
                f"{_types(shape)} against {_types(shapes[0])}; make them equal, or do not keep these columns"
            )
    return shapes


def read_shards(shards: Sequence[Shard], columns: Sequence[str]) -> Iterator[pa.Table]:
    """
    Read shards of one file in one pass, each as a table of `columns` and `_source_row`.

    Args:
        shards: In the order of their rows, all of one file.
        columns: What to read; repeated names count once.

    Raises:
        SourceChanged: If the file is not what was planned, before or after its rows were read.
        SourceError: If it cannot be read.
    """
    file = shards[0].file
    check_unchanged(file)
    with _readable(file), _open(file) as parquet:
        pieces = _pieces(parquet, shards, list(dict.fromkeys(columns)))
        for shard in shards:
            table = _take(pieces, len(shard))
            check_unchanged(file)
            rows = np.arange(shard.start, shard.stop, dtype=np.int64)
            yield table.append_column(SOURCE_ROW, pa.array(rows))


def read_files(shards: Iterable[Shard], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read shards of several files as `read_shards` does, each file once, from its first shard here to its last."""
    for _, of_file in groupby(shards, lambda shard: shard.file):
        yield from read_shards(list(of_file), columns)


def _open(file: InputFile) -> pq.ParquetFile:
    """Open a file so that its column chunks are read a buffer at a time: by default Arrow would hold a whole one."""
    return pq.ParquetFile(
        file.location, page_checksum_verification=True, pre_buffer=False, buffer_size=READ_BUFFER_BYTES
    )


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


def _shape(file: InputFile, text_column: str, kept: Sequence[str]) -> FileShape:
    with _readable(file), pq.ParquetFile(file.location) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        for column in (text_column, *kept):
            if column not in schema.names:
                raise SourceError(
                    f"{file.location} has no column {column!r}; it has: {', '.join(schema.names)}. "
                    "Name the text with --text-column"
                )
            if schema.names.count(column) > 1:
                raise SourceError(
                    f"{file.location} has {schema.names.count(column)} columns named {column!r}; rename them"
                )
        if not _is_text(schema.field(text_column).type):
            raise SourceError(
                f"the column {text_column!r} of {file.location} is {schema.field(text_column).type}, not text; "
                "convert it, or name another with --text-column"
            )
        index = next(
            number for number in range(metadata.num_columns) if metadata.schema.column(number).path == text_column
        )
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        return FileShape(
            file=file,
            row_groups=tuple(group.num_rows for group in groups),
            text_bytes=sum(group.column(index).total_uncompressed_size for group in groups),
            kept_types=tuple((column, str(schema.field(column).type)) for column in kept),
        )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    raw = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
    return any(is_kind(kind) for is_kind in (*text, *raw))


def _types(shape: FileShape) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in shape.kept_types)


@contextmanager
def _readable(file: InputFile) -> Iterator[None]:
    """Turn what Arrow says of a bad file into a message that names the file and quotes nothing of it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"the input {file.location} cannot be read as Parquet ({type(error).__name__}): "
            "it is empty, truncated or damaged. Restore it or take it out of the source, then run again"
        ) from None
