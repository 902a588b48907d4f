"""Arrow IPC as a source, files (Feather) and streams: record batches, counted by their headers, and the rows of shards."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from engine.errors import SourceError
from engine.schema import InputFile, Shard
from engine.sources.columns import check_column
from engine.sources.opening import check_unchanged, open_input, readable
from engine.sources.rows import Rows, Selection
from engine.sources.shape import FileShape

KIND = "Arrow IPC"
_FILE_MAGIC = b"ARROW1"
_FEATHER_1 = b"FEA1"
_MAGIC_BYTES = 8
_CONTINUATION = 0xFFFFFFFF
_RECORD_BATCH = 3
"""Of the kinds of messages in Arrow's Message.fbs, whose fields are, in this order: version, kind, header, length of the body."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Where the message of a record batch begins, and how many rows it has."""

    offset: int
    num_rows: int


def shape(file: InputFile, selection: Selection) -> FileShape:
    """
    Read the schema of a file, the headers of its record batches, and the texts of the first of these.

    Raises:
        SourceError: If it is unreadable, or lacks a column.
    """
    with readable(file, KIND), open_input(file) as opened:
        source = _Source(file, opened)
        for column in selection.columns:
            check_column(file, source.schema.names, column, selection.advice_on(column))
        selection.check_types(source.schema, file.location)
        filled = next((number for number, batch in enumerate(source.batches) if batch.num_rows), None)
        row_bytes = 0.0
        if filled is not None:
            source.select(selection.text_columns)
            batch = source.batch(filled)
            row_bytes = batch.nbytes / batch.num_rows
    num_rows = tuple(batch.num_rows for batch in source.batches)
    return FileShape(
        file=file,
        row_groups=num_rows,
        text_bytes=round(row_bytes * sum(num_rows)),
        kept_types=tuple((name, str(source.schema.field(name).type)) for name in selection.kept),
    )


def read(shards: Sequence[Shard], selection: Selection) -> Iterator[Rows]:
    """
    Read shards of one file in one pass; a record batch is held whole, with the columns that are asked for.

    Args:
        shards: In the order of their rows, all of one file.
        selection: What to read.

    Raises:
        SourceChanged: If the file is not what was planned, before or after its rows were read.
        SourceError: If it cannot be read.
    """
    file = shards[0].file
    check_unchanged(file)
    with readable(file, KIND), open_input(file) as opened:
        source = _Source(file, opened)
        source.select(selection.columns)
        number = first = 0
        for shard in shards:
            pieces: list[pa.RecordBatch] = []
            row = shard.start
            while row < shard.stop:
                if number >= len(source.batches):
                    raise pa.ArrowInvalid("fewer rows than were counted")
                stop = first + source.batches[number].num_rows
                if row < stop:
                    piece = source.batch(number).slice(row - first, min(stop, shard.stop) - row)
                    pieces.append(piece)
                    row += piece.num_rows
                if row >= stop:
                    number, first = number + 1, stop
            check_unchanged(file)
            yield Rows(pa.Table.from_batches(pieces))


class _Source:
    """The record batches of an open file."""

    _reader: Any

    def __init__(self, file: InputFile, opened: pa.NativeFile) -> None:
        self._opened = opened
        magic = opened.read(_MAGIC_BYTES)
        if magic.startswith(_FEATHER_1):
            raise SourceError(
                f"the input {file.location} is of the first version of Feather, which Arrow reads no more in pieces: "
                "write it again with pyarrow.feather.write_feather"
            )
        self._is_file = magic.startswith(_FILE_MAGIC)
        self._number = -1
        """Of the batch that was read last."""
        self._batch: pa.RecordBatch = None
        self._open(None)
        self.schema: pa.Schema = self._reader.schema
        self.batches = list(self._find(file.size))
        self._has_dictionaries = any("dictionary<" in str(field.type) for field in self.schema)

    def select(self, columns: Sequence[str]) -> None:
        """Read these columns alone from now on."""
        self._open(sorted({self.schema.get_field_index(name) for name in columns}))

    def batch(self, number: int) -> pa.RecordBatch:
        """Return a record batch; in a stream none that is before the last."""
        if number == self._number:
            return self._batch
        if self._is_file:
            self._batch = self._reader.get_batch(number)
        else:
            if not self._has_dictionaries:  # which lie between the batches
                self._opened.seek(self.batches[number].offset)
                self._number = number - 1
            while self._number < number:
                self._batch = self._reader.read_next_batch()
                self._number += 1
        self._number = number
        for column in self._batch.columns:
            _check(column)
        return self._batch

    def _open(self, fields: list[int] | None) -> None:
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        self._opened.seek(0)
        self._reader = (pa.ipc.open_file if self._is_file else pa.ipc.open_stream)(self._opened, options=options)
        self._number = -1

    def _find(self, size: int) -> Iterator[_Batch]:
        """Go from message to message, and read no body."""
        missing = self._reader.num_record_batches if self._is_file else -1
        at = _MAGIC_BYTES if self._is_file else 0
        while missing and at < size:
            self._opened.seek(at)
            first, second = struct.unpack("<II", self._opened.read(8).ljust(8, b"\0"))
            length, start = (second, at + 8) if first == _CONTINUATION else (first, at + 4)  # before Arrow 0.15
            if not length:
                break
            self._opened.seek(start)
            kind, body, num_rows = _header(self._opened.read(length))
            if kind == _RECORD_BATCH:
                yield _Batch(at, num_rows)
                missing -= 1
            at = start + length + body
        if missing > 0 or at > size:
            raise pa.ArrowInvalid("truncated")


def _header(message: bytes) -> tuple[int, int, int]:
    """Return a message's kind, the bytes of its body, and the rows of its record batch, from its flatbuffer."""

    def number(code: str, table: int, field: int) -> tuple[int, int]:
        """Return where a field lies, and what it says; zeros if it is not there."""
        table_fields = table - struct.unpack_from("<i", message, table)[0]
        at = 4 + 2 * field
        if at >= struct.unpack_from("<H", message, table_fields)[0]:
            return 0, 0
        offset = struct.unpack_from("<H", message, table_fields + at)[0]
        return (table + offset, struct.unpack_from(code, message, table + offset)[0]) if offset else (0, 0)

    try:
        root = struct.unpack_from("<I", message, 0)[0]
        _, kind = number("<B", root, 1)
        where, header = number("<I", root, 2)
        _, body = number("<q", root, 3)
        _, num_rows = number("<q", where + header, 0) if kind == _RECORD_BATCH else (0, 0)
    except struct.error:
        raise pa.ArrowInvalid("a damaged message") from None
    if body < 0 or num_rows < 0:
        raise pa.ArrowInvalid("a damaged message")
    return kind, body, num_rows


def _check(column: pa.Array) -> None:
    """Raise ArrowInvalid where a damaged file would make a reader of the column crash; texts that are not UTF-8 are found later."""
    if pa.types.is_string(column.type):
        column = column.cast(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    column.validate(full=not pa.types.is_string_view(column.type))
