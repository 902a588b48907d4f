"""Files of lines as a source: one scan that says how they can be cut, and the rows of their shards, read in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from engine.errors import SourceError
from engine.schema import START, InputFile, Shard
from engine.sources.compression import bare_name, open_decoded
from engine.sources.opening import check_unchanged, readable
from engine.sources.records import MIB, Chunk, Splitter, WrongEncoding, chunks, without_bom
from engine.sources.rows import Rows, Selection
from engine.sources.shape import FileShape

BLOCK_BYTES = MIB
MAX_BLOCKS = 16384
"""Of a file, as long as it is not compressed: larger files have larger blocks."""
HEAD_ROWS = 1000
HEAD_BYTES = 16 * MIB
"""What the types of columns are told from."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the first rows of a file tell."""

    types: dict[str, str]
    """Of each kept column."""
    text_share: float = 1.0
    """Of the bytes of the rows, those that are text."""


class Parser(Protocol):
    """Makes a table of records."""

    def __call__(self, chunk: Chunk) -> tuple[pa.RecordBatch, dict[int, str]]:
        """Return the columns of the selection, and why each malformed record is null in them, by position."""


@dataclass(frozen=True, slots=True)
class LineFormat:
    """A kind of files of lines."""

    name: str
    splitter: Splitter
    look: Callable[[InputFile, Sequence[Chunk], Selection], Look]
    """Looks at the first rows; raises SourceError if a column is not there."""
    parser: Callable[[InputFile, Selection], Parser]
    num_headers: int = 0
    """Records at the start of a file that are no rows."""


def shape(kind: LineFormat, file: InputFile, selection: Selection) -> FileShape:
    """
    Read a file once to its end, and find where its rows can be read from: about every `BLOCK_BYTES`, at the start of a row.

    Raises:
        SourceError: If it is unreadable, or lacks a column.
    """
    blocks = _Blocks(max(BLOCK_BYTES, -(-file.size // MAX_BLOCKS)))
    first = _Head()
    with readable_lines(file, kind.name), open_decoded(file) as stream:
        for chunk in chunks(stream, kind.splitter, START, num_headers=kind.num_headers):
            blocks.add(chunk)
            first.add(chunk)
    look = kind.look(file, first.chunks, selection)
    can_seek = bare_name(file.path)[1] is None
    return FileShape(
        file=file,
        row_groups=tuple(blocks.num_rows),
        text_bytes=round(blocks.num_bytes * look.text_share),
        kept_types=tuple((name, look.types[name]) for name in selection.kept),
        offsets=tuple(blocks.offsets) if can_seek else (),
        lines=tuple(blocks.lines) if can_seek else (),
    )


class _Blocks:
    """The rows of a file, divided by where they begin."""

    def __init__(self, num_bytes: int) -> None:
        self._size = num_bytes
        self._last = -1
        self.num_rows: list[int] = []
        self.offsets: list[int] = []
        self.lines: list[int] = []
        self.num_bytes = 0

    def add(self, chunk: Chunk) -> None:
        """Count the rows of a chunk."""
        numbers = (chunk.offset + chunk.starts) // self._size
        found = (of_each.tolist() for of_each in np.unique(numbers, return_index=True, return_counts=True))
        for block, first, count in zip(*found, strict=True):
            if block == self._last:
                self.num_rows[-1] += count
            else:
                place = chunk.place(first)
                self.num_rows.append(count)
                self.offsets.append(place.offset)
                self.lines.append(place.line)
                self._last = block
        self.num_bytes += int((chunk.ends - chunk.starts).sum())


class _Head:
    """The first rows of a file."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self._num_rows = self._num_bytes = 0

    def add(self, chunk: Chunk) -> bool:
        """Take what is still wanted; return whether it is enough."""
        if self._num_rows < HEAD_ROWS and self._num_bytes < HEAD_BYTES:
            some = chunk.part(0, min(HEAD_ROWS - self._num_rows, len(chunk)))
            self.chunks.append(some)
            self._num_rows += len(some)
            self._num_bytes += int((some.ends - some.starts).sum())
        return self._num_rows >= HEAD_ROWS or self._num_bytes >= HEAD_BYTES


def head(kind: LineFormat, file: InputFile) -> list[Chunk]:
    """Return the first rows of a file."""
    first = _Head()
    with readable_lines(file, kind.name), open_decoded(file) as stream:
        for chunk in chunks(stream, kind.splitter, START, num_headers=kind.num_headers):
            if first.add(chunk):
                break
    return first.chunks


def read(kind: LineFormat, shards: Sequence[Shard], selection: Selection) -> Iterator[Rows]:
    """
    Read shards of one file in one pass.

    Args:
        kind: Of the file.
        shards: In the order of their rows, all of one file.
        selection: What to read.

    Raises:
        SourceChanged: If the file is not what was planned, before or after its rows were read.
        SourceError: If it cannot be read.
    """
    file = shards[0].file
    check_unchanged(file)
    parse = kind.parser(file, selection)
    with readable_lines(file, kind.name), open_decoded(file) as stream:
        cursor = _Cursor(stream, kind, can_seek=bare_name(file.path)[1] is None)
        for shard in shards:
            batches: list[pa.RecordBatch] = []
            faults: dict[int, str] = {}
            position = 0
            for chunk in cursor.rows(shard):
                batch, found = parse(chunk)
                batches.append(batch)
                for at, reason in found.items():
                    faults[position + at] = reason + _line(chunk, at, kind.num_headers)
                position += len(chunk)
            check_unchanged(file)
            yield Rows(pa.Table.from_batches(batches), faults)


def first_record(file: InputFile, kind: LineFormat) -> bytes | None:
    """Return the first record of a file, its header if it has one; None if it has no record."""
    with readable_lines(file, kind.name), open_decoded(file) as stream:
        chunk = next(chunks(stream, kind.splitter, START), None)
        return None if chunk is None else chunk.part(0, 1).records()[0]


def check_encoding(kind: LineFormat, file: InputFile) -> None:
    """Raise SourceError if a file is unreadable, or not UTF-8 by its first bytes."""
    with readable_lines(file, kind.name), open_decoded(file) as stream:
        without_bom(stream.read(4))


@contextmanager
def readable_lines(file: InputFile, kind: str) -> Iterator[None]:
    """Turn what is wrong with a file as a whole into a message that names it."""
    try:
        with readable(file, kind):
            yield
    except WrongEncoding:
        raise SourceError(
            f"the input {file.location} is UTF-16, not UTF-8: convert it, such as with `iconv -f UTF-16 -t UTF-8`"
        ) from None


class _Cursor:
    """The rows of one file, from where they are asked for, onwards."""

    def __init__(self, stream: pa.NativeFile, kind: LineFormat, *, can_seek: bool) -> None:
        self._stream = stream
        self._kind = kind
        self._can_seek = can_seek
        self._chunks: Iterator[Chunk] | None = None
        self._rest: Chunk | None = None
        self._row = 0
        """Up to which all is read."""

    def rows(self, shard: Shard) -> Iterator[Chunk]:
        """Yield the records of a shard, and of no other."""
        if self._chunks is None or (self._can_seek and shard.place.row > self._row):
            place = shard.place if self._can_seek else START
            if place.offset:
                self._stream.seek(place.offset)
            self._rest = None
            self._chunks = chunks(self._stream, self._kind.splitter, place, num_headers=self._kind.num_headers)
        row = shard.start
        while row < shard.stop:
            chunk = self._rest or next(self._chunks, None)
            if chunk is None:
                raise pa.ArrowInvalid("fewer rows than were counted")
            self._row = chunk.stop
            self._rest = chunk if chunk.stop > shard.stop else None
            stop = min(chunk.stop, shard.stop)
            if stop > row:
                yield chunk.part(row - chunk.row, stop - chunk.row)
                row = stop


def _line(chunk: Chunk, at: int, num_headers: int) -> str:
    """Name the line of a row, unless its number tells it: a row a line, behind the header."""
    place = chunk.place(at)
    return "" if place.line == place.row + num_headers else f" (line {place.line + 1})"
