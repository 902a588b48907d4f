"""The datasource: read tasks that yield parcels of shards, one row each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from engine.pipeline.parcel import Item, pack
from engine.schema import Shard
from engine.sources.parquet import read_shards

MAX_READ_TASKS = 1000
"""Each costs the driver about 50 KB for as long as the run lasts, so large jobs have more parcels in each, not more tasks."""

Parcel = tuple[Shard, ...]


class ShardDatasource(Datasource):  # type: ignore[misc] # Ray's classes are untyped
    """
    Reads pending shards.

    Args:
        parcels: Shards that travel together.
        columns: What to read of each row.
    """

    def __init__(self, parcels: Sequence[Parcel], columns: Sequence[str]) -> None:
        super().__init__()
        self._parcels = list(parcels)
        self._columns = list(columns)

    @property
    def num_read_tasks(self) -> int:
        """How many read tasks there will be."""
        return min(len(self._parcels), MAX_READ_TASKS)

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: Ray then goes by what it sees."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """Return tasks over neighbouring parcels, which often share a file, in the order of the plan."""
        count = self.num_read_tasks
        total = len(self._parcels)
        bounds = [total * number // count for number in range(count + 1)]
        return [self._task(self._parcels[start:stop], self._columns) for start, stop in pairwise(bounds)]

    @staticmethod
    def _task(parcels: list[Parcel], columns: list[str]) -> ReadTask:
        metadata = BlockMetadata(num_rows=len(parcels), size_bytes=None, exec_stats=None, input_files=None)
        return ReadTask(lambda: _read(parcels, columns), metadata)


def _read(parcels: Sequence[Parcel], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read each file once, from its first pending shard to its last, and yield parcels as they fill."""
    shards = [shard for parcel in parcels for shard in parcel]
    tables = (
        table for _, group in groupby(shards, lambda shard: shard.file) for table in read_shards(list(group), columns)
    )
    for parcel in parcels:
        yield pack([Item(shard, next(tables)) for shard in parcel])
