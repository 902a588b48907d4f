"""
A parcel: one shard, or several small ones, as a single row of a Ray dataset.

Each column of the shards' tables becomes one list, and a manifest says which rows are whose. Ray may merge, split or replay
blocks as it likes: it never cuts a row, so a shard stays whole whatever Ray does, and its identity travels with it. Packing copies a column that comes in several pieces, once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from engine.commits import Receipt, Usage
from engine.quantization import VectorFormat
from engine.schema import InputFile, Reject, Shard, canonical_json

MANIFEST = "_manifest"
RECEIPTS = "receipts"
SMALL_OFFSETS_BYTES = 2**31 - 1


@dataclass(slots=True)
class Item:
    """One shard on its way: its table, and what has become of its rows so far."""

    shard: Shard
    table: pa.Table
    faults: Mapping[int, str] = field(default_factory=dict)
    """Position and reason of rows that are malformed; they are in `rejects` once the texts are embedded."""
    rejects: list[Reject] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    is_left: bool = False
    """It was not embedded, since the run is ending: nothing of it is committed."""
    vectors: VectorFormat | None = None
    """How the table's vectors are stored; None as long as it has none."""


def pack(items: Sequence[Item]) -> pa.Table:
    """Return the items as a table of one row; their tables have the same columns."""
    manifest = [
        asdict(item.shard)
        | {
            "num_rows": item.table.num_rows,
            "faults": dict(item.faults),
            "rejects": [reject.as_json() for reject in item.rejects],
            "usage": asdict(item.usage),
            "is_left": item.is_left,
            "vectors": item.vectors and item.vectors.as_json(),
        }
        for item in items
    ]
    table = pa.concat_tables(_alike([item.table for item in items]))
    columns = {MANIFEST: pa.array([canonical_json(manifest)], pa.large_string())}
    for name in table.column_names:
        values = _joined(table.column(name))
        columns[name] = pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)
    return pa.table(columns)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array; texts of 2 GiB and more need the large kinds of strings for it."""
    if column.nbytes >= SMALL_OFFSETS_BYTES:
        if pa.types.is_string(column.type):
            column = column.cast(pa.large_string())
        elif pa.types.is_binary(column.type):
            column = column.cast(pa.large_binary())
    joined = column.combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


def _alike(tables: list[pa.Table]) -> list[pa.Table]:
    """Bring a column that files hold as other kinds of text (strings, bytes, dictionaries, nulls alone) to one: bytes."""
    for name in tables[0].column_names:
        if len({table.schema.field(name).type for table in tables}) > 1:
            at = tables[0].column_names.index(name)
            tables = [table.set_column(at, name, _as_bytes(table.column(name))) for table in tables]
    return tables


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_binary())


def unpack(block: pa.Table) -> Iterator[list[Item]]:
    """Yield the items of each parcel in a block, however many Ray has put there."""
    for row in range(block.num_rows):
        manifest = json.loads(block.column(MANIFEST)[row].as_py())
        names = [name for name in block.column_names if name != MANIFEST]
        table = pa.table({name: block.column(name)[row].values for name in names})
        items = []
        start = 0
        for entry in manifest:
            shard = Shard(entry["id"], InputFile(**entry["file"]), entry["start"], entry["stop"])
            rejects = [Reject(**reject) for reject in entry["rejects"]]
            rows = table.slice(start, entry["num_rows"])
            faults = {int(position): reason for position, reason in entry["faults"].items()}
            vectors = entry["vectors"] and VectorFormat(**entry["vectors"])
            items.append(Item(shard, rows, faults, rejects, Usage(**entry["usage"]), entry["is_left"], vectors))
            start += entry["num_rows"]
        yield items


def pack_receipts(receipts: Iterable[Receipt]) -> pa.Table:
    """Return a parcel's receipts as a table of one row, since Ray's cost is per row for them too."""
    line = canonical_json([asdict(receipt) for receipt in receipts])
    return pa.table({RECEIPTS: pa.array([line], pa.large_string())})


def unpack_receipts(block: pa.Table) -> Iterator[list[Receipt]]:
    """Yield the receipts of each parcel in a block."""
    for line in block.column(RECEIPTS).to_pylist():
        yield [Receipt(**fields) for fields in json.loads(line)]
