"""Parts as a Ray Dataset: read tasks over exactly those that an output consists of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

if TYPE_CHECKING:
    from engine.snapshot import LivePart, Snapshot

MAX_READ_TASKS = 1000
"""More cost the driver memory, and are not needed: each reads its parts one after the other."""


def dataset_of(snapshot: Snapshot, columns: Sequence[str] | None = None) -> ray.data.Dataset:
    """
    Return a Ray Dataset of the rows of `snapshot`, a block for each batch. It is read when it is used.

    Args:
        snapshot: Of the output, at a place that all nodes of the cluster can read.
        columns: Which to read; by default all.
    """
    return ray.data.read_datasource(PartDatasource(snapshot, columns))


class PartDatasource(Datasource):  # type: ignore[misc] # Ray's classes are untyped
    """
    Reads committed parts.

    Args:
        snapshot: Which parts.
        columns: Which to read; None for all.
    """

    def __init__(self, snapshot: Snapshot, columns: Sequence[str] | None) -> None:
        super().__init__()
        self._snapshot = snapshot
        self._columns = columns

    def estimate_inmemory_data_size(self) -> int | None:
        """Return the bytes of the vectors: little else is in a part, unless it keeps the texts."""
        return self._snapshot.num_rows * self._snapshot.width * self._snapshot.dtype.itemsize

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """Return about `parallelism` tasks, each for neighbours in the order of input file and row."""
        parts = self._snapshot.parts
        num_tasks = max(1, min(parallelism, len(parts), MAX_READ_TASKS))
        cuts = [len(parts) * number // num_tasks for number in range(num_tasks + 1)]
        return [self._task(parts[start:stop]) for start, stop in pairwise(cuts)]

    def _task(self, parts: Sequence[LivePart]) -> ReadTask:
        snapshot, columns = self._snapshot.only(parts), self._columns
        metadata = BlockMetadata(num_rows=snapshot.num_rows, size_bytes=None, exec_stats=None, input_files=None)

        def read() -> Iterator[pa.Table]:
            for batch in snapshot.batches(columns):
                yield pa.Table.from_batches([batch])

        return ReadTask(read, metadata)
