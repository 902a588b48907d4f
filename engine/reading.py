"""Reading: an output as Arrow, pandas, polars, numpy or a Ray Dataset, by its records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import ConfigError
from engine.exporting.story import export
from engine.schema import EMBEDDING
from engine.snapshot import Snapshot, numbers_of
from engine.survey import opened

Form = Literal["arrow", "pandas", "polars", "numpy", "ray"]
POLARS_MISSING = "as_='polars' needs the package polars: pip install polars"


def read(
    output: str, columns: Sequence[str] | None = None, as_: Form = "arrow", *, mapped: str | Path | None = None
) -> Any:
    """
    Read what is committed, in the order of input file and row.

    Args:
        output: The folder.
        columns: Which to read; by default all. Of `numpy`, which gives ids and vectors, none may be chosen.
        as_: The form:
            `arrow`: a `pyarrow.Table`, in memory.
            `pandas`, `polars`: a DataFrame, in memory.
            `numpy`: a pair of arrays, ids of shape (rows,) and vectors of shape (rows, numbers of a vector), of the dtype of the output.
            `ray`: a Ray Dataset over exactly the committed parts, read when it is used, on the Ray that is there. Its order is Ray's.
        mapped: Of `numpy`: a `.npy` file on a local disk. It is made, if it is not this output as it stands, as `engine export` makes
            it, and the vectors are a `numpy.memmap` of it. Without it they are in memory: Parquet is compressed, and cannot be mapped.

    Raises:
        ConfigError: There is no output, nothing is committed in it yet, or an argument does not fit it.
        CorruptOutput: A part or a record is missing or damaged.
    """
    if as_ not in get_args(Form):
        raise ConfigError(f"as_ {as_!r}: choose {', '.join(get_args(Form))}")
    if mapped is not None and as_ != "numpy":
        raise ConfigError("mapped is for as_='numpy' alone: leave it out")
    if as_ == "numpy" and columns is not None:
        raise ConfigError("as_='numpy' gives ids and vectors: leave columns out, or read them as arrow")
    if mapped is not None:
        return _mapped(output, Path(mapped))
    snapshot = _snapshot(output)
    snapshot.check_columns(columns)
    if as_ == "numpy":
        return _in_memory(snapshot)
    if as_ == "ray":
        from engine.pipeline.parts import dataset_of

        return dataset_of(snapshot, columns)
    table = _table(snapshot, columns)
    if as_ == "pandas":
        return table.to_pandas()
    return _polars(table) if as_ == "polars" else table


def read_batches(output: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """
    Yield what is committed as record batches, in the order of input file and row, for outputs that memory does not hold.

    A batch has 16 MB of vectors, or 8,192 rows, at most. Which parts there are is decided by the call; each is opened when its turn
    comes.

    Args:
        output: The folder.
        columns: Which to read; by default all.

    Raises:
        ConfigError: There is no output, nothing is committed in it yet, or it has no such column.
        CorruptOutput: A part or a record is missing or damaged.
    """
    snapshot = _snapshot(output)
    snapshot.check_columns(columns)
    return snapshot.batches(columns)


def _snapshot(output: str) -> Snapshot:
    return Snapshot.of(*opened(output))


def _table(snapshot: Snapshot, columns: Sequence[str] | None) -> pa.Table:
    schema = snapshot.schema if columns is None else pa.schema([snapshot.schema.field(name) for name in columns])
    return pa.Table.from_batches(list(snapshot.batches(columns)), schema)


def _polars(table: pa.Table) -> Any:
    try:
        import polars
    except ImportError:
        raise ConfigError(POLARS_MISSING) from None
    return polars.from_arrow(table)


def _in_memory(snapshot: Snapshot) -> tuple[Any, Any]:
    """Read ids and vectors into arrays; beside them, one batch is in memory."""
    vectors = np.empty((snapshot.num_rows, snapshot.width), snapshot.dtype)
    ids: list[pa.Array] = []
    at = 0
    for batch in snapshot.batches([snapshot.id_column, EMBEDDING]):
        vectors[at : at + batch.num_rows] = numbers_of(batch)
        ids.append(batch.column(0))
        at += batch.num_rows
    return pa.chunked_array(ids, snapshot.schema.field(snapshot.id_column).type).to_numpy(), vectors


def _mapped(output: str, path: Path) -> tuple[Any, Any]:
    """Make the export at `path` this output, if it is not, and map it."""
    made = export(output, path, format="npy")
    vectors = np.load(made.to, mmap_mode="r") if made.num_rows else np.load(made.to)  # what is empty cannot be mapped
    return pq.read_table(made.ids).column(0).to_numpy(), vectors
