"""The datasource: read tasks that yield parcels of shards, one row each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from engine.pipeline import process
from engine.pipeline.parcel import Item, pack
from engine.schema import Shard
from engine.sources.formats import is_splittable, read_shards
from engine.sources.rows import Selection

MAX_READ_TASKS = 1000
"""Each costs the driver about 50 KB for as long as the run lasts, so large jobs have more parcels in each, not more tasks."""
TASKS_PER_READER = 4
"""Ray ends workers that are idle for a second, and a new one takes seconds of CPU to start: few long tasks, not many short."""
MAX_READ_TASKS_PER_FILE = 32
"""A task that begins inside a row group decodes it from its start, so the more tasks share a giant group, the more is decoded
for nothing: at 32, less than 1% of what the fastest model needs for the same rows."""

Parcel = tuple[Shard, ...]


class ShardDatasource(Datasource):  # type: ignore[misc] # Ray's classes are untyped
    """
    Reads pending shards.

    Args:
        parcels: Shards that travel together.
        selection: What to read of each row.
        num_readers: How many tasks read at once.
    """

    def __init__(self, parcels: Sequence[Parcel], selection: Selection, num_readers: int) -> None:
        super().__init__()
        self._passes = list(passes(parcels, min(TASKS_PER_READER * num_readers, MAX_READ_TASKS)))
        self._selection = selection

    @property
    def num_read_tasks(self) -> int:
        """How many read tasks there will be."""
        return len(self._passes)

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: Ray then goes by what it sees."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """Return a task for each pass, in the order of the plan."""
        return [self._task(parcels, self._selection) for parcels in self._passes]

    @staticmethod
    def _task(parcels: list[Parcel], selection: Selection) -> ReadTask:
        metadata = BlockMetadata(num_rows=len(parcels), size_bytes=None, exec_stats=None, input_files=None)
        driver = process.ENGINE

        def read() -> Iterator[pa.Table]:
            process.check_engine(driver)
            return _read(parcels, selection)

        return ReadTask(read, metadata)


def passes(parcels: Sequence[Parcel], most: int) -> Iterator[list[Parcel]]:
    """
    Put neighbours together that one task reads in one pass: about `most` passes in all, and not too many a file.

    A file that cannot be read from its middle is read in one pass.
    """
    parcels_of = Counter(parcel[0].file.path for parcel in parcels)
    at_least = -(-len(parcels) // most)
    taken: list[Parcel] = []
    for parcel in parcels:
        path = parcel[0].file.path
        of_file = -(-parcels_of[taken[0][0].file.path] // MAX_READ_TASKS_PER_FILE) if taken else 0
        goes_on = bool(taken) and taken[-1][-1].file.path == path and not is_splittable(path)
        if taken and not goes_on and len(taken) >= max(at_least, of_file):
            yield taken
            taken = []
        taken.append(parcel)
    if taken:
        yield taken


def _read(parcels: Sequence[Parcel], selection: Selection) -> Iterator[pa.Table]:
    """Read each file once, from its first pending shard to its last, and yield parcels as they fill."""
    found = read_shards((shard for parcel in parcels for shard in parcel), selection)
    for parcel in parcels:
        yield pack(
            [Item(shard, rows.table, rows.faults) for shard, rows in zip(parcel, found, strict=False)]
        )  # the parcel ends it
