"""
Sources in memory: copied into the output, block by block, so that every node and every later process can read them.

    OUT/_engine/inputs/<hash of its content>.parquet   a block of rows: the columns that the job reads, and no others
    OUT/_engine/inputs/<hash of all blocks>.json       a manifest: which blocks a source consists of
    OUT/_engine/inputs/current.json                    which manifest the last run went by

All but the last are named by their content and created once. A source that is the same again is the same blocks, so the same
shards, in any process; of one that grew, the blocks before the new rows stay what they were.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from engine.commits import CommitRecord
from engine.errors import SourceError
from engine.schema import FAULT, InputFile, canonical_json, content_hash
from engine.sources.content import canonical, content_of
from engine.sources.inventory import Inventory
from engine.sources.opening import INPUTS, MEMORY, is_staged_source
from engine.sources.rows import Selection

logger = logging.getLogger(__name__)

CURRENT = f"{INPUTS}/current.json"
BLOCK_ROWS = 65_536
"""Most rows of a block; blocks end at multiples of it, so that rows that change move no others."""
BLOCK_BYTES = 64 * 1024**2
"""Most content of a block of more than one row."""
PIECE_ROWS = 1024
"""A block of large rows ends at a multiple of this."""
ROW_GROUP_ROWS = 8192


class Store(Protocol):
    """What staging needs of a storage."""

    root: str

    def create(self, name: str, data: bytes) -> bool:
        """Create `name`, or return False if it is there."""

    def read(self, name: str) -> bytes:
        """Return the bytes of `name`; raise FileNotFoundError if it is not there."""

    def names(self, folder: str) -> Iterator[str]:
        """Yield the names below `folder`."""

    def replace(self, name: str, data: bytes) -> None:
        """Put `data` under `name`, whatever was there."""


@dataclass(slots=True)
class _Piece:
    """Some neighbouring rows, and their content in canonical form."""

    batch: pa.RecordBatch
    content: list[memoryview]
    num_bytes: int


@dataclass(slots=True)
class Block:
    """Neighbouring rows that are stored as one file."""

    start: int
    """Its first row, of those that it was cut from."""
    pieces: list[_Piece] = field(default_factory=list)
    num_rows: int = 0
    num_bytes: int = 0

    def add(self, piece: _Piece) -> None:
        """Put rows behind those that are there."""
        self.pieces.append(piece)
        self.num_rows += piece.batch.num_rows
        self.num_bytes += piece.num_bytes

    def version(self) -> str:
        """Return the hash of its content, which depends on no library, nor on how the rows came."""
        schema = self.pieces[0].batch.schema
        hashed = xxhash.xxh3_128(
            canonical_json([[name, str(schema.field(name).type)] for name in schema.names]).encode()
        )
        for piece in self.pieces:
            hashed.update(f"|{piece.batch.num_rows}|".encode())
            for data in piece.content:
                hashed.update(data)
        return str(hashed.hexdigest())

    def to_bytes(self) -> bytes:
        """Return the rows as Parquet."""
        sink = pa.BufferOutputStream()
        table = pa.Table.from_batches([piece.batch for piece in self.pieces])
        try:
            pq.write_table(
                table,
                sink,
                compression="zstd",
                row_group_size=ROW_GROUP_ROWS,
                use_dictionary=False,
                write_page_checksum=True,
            )
        except pa.ArrowException:
            kinds = ", ".join(f"{name} {table.schema.field(name).type}" for name in table.column_names if name != FAULT)
            raise SourceError(
                f"one of the columns has a type that Parquet cannot hold ({kinds}): convert it, or do not keep it"
            ) from None
        return bytes(sink.getvalue())


def stage(tables: Iterable[pa.Table], store: Store, selection: Selection, *, is_ordered: bool = True) -> str:
    """
    Copy a source into an output.

    Args:
        tables: Its rows, with the columns of the selection and `_fault`; no more of them than a block is held at once.
        store: Of the output; what is there already is not written again.
        selection: What the job reads.
        is_ordered: The tables come in the order of the source's rows; otherwise each is named by its content alone.

    Returns:
        What the config calls the source: `memory:` and the hash of its manifest.

    Raises:
        SourceError: If a column is no text, or cannot be stored.
    """
    there = set(store.names(INPUTS))
    counts: Counter[str] = Counter()
    files: list[dict[str, Any]] = []
    cut = (
        blocks(tables, selection) if is_ordered else (block for table in tables for block in blocks([table], selection))
    )
    empty: Block | None = None
    for block in cut:
        if not block.num_rows:
            empty = empty or block
            continue
        files.append(_staged(block, store, there, counts, is_ordered=is_ordered))
    if not files and empty:
        files.append(_staged(empty, store, there, counts, is_ordered=is_ordered))  # its columns have types
    files.sort(key=lambda file: str(file["path"]))
    data = canonical_json(files).encode()
    name = content_hash(data)
    store.create(f"{INPUTS}/{name}.json", data)
    logger.info("staged %d blocks of a source in memory", len(files))
    return MEMORY + name


def blocks(tables: Iterable[pa.Table], selection: Selection) -> Iterator[Block]:
    """
    Cut rows that come in any pieces into blocks, by what they are alone.

    A block has at most `BLOCK_ROWS` rows and, unless it is one row, `BLOCK_BYTES` of content. Of no rows at all there is one without any.
    """
    block = Block(0)
    position = 0
    for piece in _pieces(tables, selection):
        is_full = block.num_bytes + piece.num_bytes > BLOCK_BYTES or position % BLOCK_ROWS == 0
        if block.num_rows and is_full:
            yield block
            block = Block(position)
        block.add(piece)
        position += piece.batch.num_rows
    if block.pieces:
        yield block


def listed(sources: Sequence[str], store: Store) -> Inventory:
    """
    List the blocks of a staged source.

    Args:
        sources: One `memory:HASH`; without a hash it is the source of the last run.
        store: Where it is staged.

    Raises:
        SourceError: If it is not there, or not alone.
    """
    if len(sources) > 1:
        raise SourceError("a source that was in memory cannot be joined with others: give each its own output")
    name = (sources[0] if sources[0] != MEMORY else current(store) or "").removeprefix(MEMORY)
    try:
        files = json.loads(store.read(f"{INPUTS}/{name}.json")) if name.isalnum() else None
    except FileNotFoundError:
        files = None
    if files is None:
        raise SourceError(
            f"the source {sources[0]} was in memory, and its copy is not in {store.root}/{INPUTS}: give the table again, from Python"
        )
    return Inventory(MEMORY, tuple(_file(store.root, **file) for file in files))


def file_of(root: str, record: CommitRecord) -> InputFile:
    """Return the block that a committed shard was made of; `root` is the output."""
    return _file(root, record.path, record.size, record.version)


def current(store: Store) -> str | None:
    """Return the source that the last run went by; None if there was none that was in memory."""
    try:
        return str(json.loads(store.read(CURRENT))["source"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def is_new(store: Store, sources: Sequence[str]) -> bool:
    """Say whether a run's source is in memory, and another than the last run went by."""
    return is_staged_source(sources) and sources[0] not in (MEMORY, current(store))


def remember(store: Store, sources: Sequence[str]) -> None:
    """Note which source a run goes by: once it has the lease, since one that is refused does not say what the output is of."""
    if is_new(store, sources):
        store.replace(CURRENT, canonical_json({"source": sources[0]}).encode())


def _staged(block: Block, store: Store, there: set[str], counts: Counter[str], *, is_ordered: bool) -> dict[str, Any]:
    """Store a block, if it is not there yet; return its line of the manifest."""
    version = block.version()
    name = f"{version}.parquet"
    if name not in there:
        store.create(f"{INPUTS}/{name}", block.to_bytes())
        there.add(name)
    counts[version] += 1
    path = f"rows-{block.start:012}" if is_ordered else f"rows-{version}-{counts[version]:06}"
    return {"path": path, "size": block.num_bytes, "version": version}


def _file(root: str, path: str, size: int, version: str) -> InputFile:
    """Return a block as an input. Its size is that of its content: the file's may change with the version of a library."""
    return InputFile(path, f"{root}/{INPUTS}/{version}.parquet", size, version)


def _pieces(tables: Iterable[pa.Table], selection: Selection) -> Iterator[_Piece]:
    """Cut rows into pieces of `PIECE_ROWS`, whatever they come in; the first piece may have no rows."""
    waiting: list[pa.Table] = []
    num_waiting = num_rows = 0
    first: pa.Table | None = None
    for table in tables:
        num_rows += table.num_rows
        if first is None:
            first = table
            selection.check_types(table.schema, "the table")
        start = 0
        while num_waiting + table.num_rows - start >= PIECE_ROWS:
            stop = start + PIECE_ROWS - num_waiting
            yield from _halved([*waiting, table.slice(start, stop - start)])
            waiting, num_waiting, start = [], 0, stop
        if start < table.num_rows:
            waiting.append(table.slice(start))
            num_waiting += table.num_rows - start
    if waiting:
        yield from _halved(waiting)
    elif first is not None and not num_rows:
        yield _piece([first])


def _halved(tables: Sequence[pa.Table]) -> Iterator[_Piece]:
    """Make a piece, or several of one that is too large."""
    piece = _piece(tables)
    if piece.num_bytes <= BLOCK_BYTES or piece.batch.num_rows == 1:
        yield piece
        return
    table = pa.Table.from_batches([piece.batch])
    half = table.num_rows // 2
    yield from _halved([table.slice(0, half)])
    yield from _halved([table.slice(half)])


def _piece(tables: Sequence[pa.Table]) -> _Piece:
    """Bring rows to their canonical form."""
    names = tables[0].column_names
    arrays = []
    for name in names:
        try:
            chunks = [chunk for table in tables for chunk in table.column(name).chunks]
            arrays.append(canonical(pa.chunked_array(chunks, tables[0].schema.field(name).type)))
        except (pa.ArrowException, TypeError):
            raise SourceError(
                f"the column {name!r} cannot be stored: it is {tables[0].schema.field(name).type}, or its type changes between rows; "
                "convert it, or do not keep it"
            ) from None
    content = [data for array in arrays for data in content_of(array)]
    return _Piece(pa.RecordBatch.from_arrays(arrays, names=names), content, sum(data.nbytes for data in content))
