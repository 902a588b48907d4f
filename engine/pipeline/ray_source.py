"""A Ray Dataset as a source: its blocks, one after the other, as Arrow tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import ray.data

from engine.errors import SourceError
from engine.pipeline import cluster
from engine.schema import FAULT
from engine.sources.tables import check_names


def tables_of(dataset: ray.data.Dataset, wanted: Sequence[str]) -> Iterator[pa.Table]:
    """
    Run a dataset, and yield its blocks in whatever order they come: a few of them are held at once.

    Args:
        dataset: Of any blocks.
        wanted: The columns that a job reads, `_fault` among them, which a dataset does not have.

    Raises:
        SourceError: If a column is missing.
        EngineError: What Ray raised while it made the rows.
    """
    columns = [name for name in wanted if name != FAULT]
    with cluster.settings(), cluster.translated():
        schema = dataset.schema()
        if schema is None:
            raise SourceError("the Ray Dataset has no rows, and no columns")
        check_names(schema.names, columns)
        types = dict(zip(schema.names, schema.types, strict=True))
        for table in dataset.select_columns(columns).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=1
        ):
            yield _with_types(table.select(columns), types).append_column(FAULT, pa.nulls(table.num_rows, pa.string()))


def _with_types(table: pa.Table, types: dict[str, object]) -> pa.Table:
    """Give columns that have nothing but nulls in this block the type that they have in others."""
    for number, name in enumerate(table.column_names):
        kind = types[name]
        if pa.types.is_null(table.schema.field(name).type) and isinstance(kind, pa.DataType):
            table = table.set_column(number, name, table.column(name).cast(kind))
    return table
