"""
A snapshot: the parts that an output consists of at one instant, by its records, in the order of input file and row.

What is read and exported of an output goes through it: never a listing of files, where a part without a record may lie, or one
that others have taken the place of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.disk import cannot, is_trouble
from engine.errors import ConfigError, CorruptOutput
from engine.ledger import part_name
from engine.schema import EMBEDDING, canonical_json, content_hash

if TYPE_CHECKING:
    from engine.ledger import Ledger
    from engine.schema import Job

BATCH_BYTES = 1 << 24
"""Of vectors, in a batch."""
MAX_BATCH_ROWS = 8192
BUFFER_BYTES = 1 << 20
"""A part is read by pieces of this size, not whole."""
ADVICE = "`engine verify {root} --set-aside` tells all that is missing or damaged, and the next run makes it again"


@dataclass(frozen=True, slots=True)
class LivePart:
    """What a record says of a part, as far as a reader needs it."""

    path: str
    """Of the input file, relative to the source's base."""
    start: int
    """The first row of its shard."""
    shard_id: str
    num_rows: int
    """Of the part: those of its shard, less the rejects; more where each chunk of a text has one."""


class Snapshot:
    """
    The parts of an output, in order. It pickles: tasks read it where they run.

    Args:
        ledger: Of the output.
        job: Of the output.
        parts: In the order in which they are read.
    """

    def __init__(self, ledger: Ledger, job: Job, parts: Sequence[LivePart]) -> None:
        self._ledger = ledger
        self._job = job
        self.parts = tuple(parts)

    @classmethod
    def of(cls, ledger: Ledger, job: Job) -> Snapshot:
        """
        Take the parts that the output consists of now.

        Raises:
            ConfigError: If nothing is committed yet.
            CorruptOutput: If a record cannot be read.
        """
        parts = sorted(
            (LivePart(record.path, record.start, record.shard_id, record.num_vectors) for record in ledger.records()),
            key=lambda part: (part.path, part.start, part.shard_id),
        )
        if not parts:
            raise ConfigError(
                f"nothing is committed in {ledger.root} yet: there are no vectors to read; run its job first"
            )
        return cls(ledger, job, parts)

    @property
    def root(self) -> str:
        """Where the output is."""
        return self._ledger.root

    @property
    def id_column(self) -> str:
        """The column of the rows' ids."""
        return self._job.config.get("id_column") or "id"

    @property
    def job_key(self) -> str:
        """What tells this output from all others, wherever it lies: a hash of its job.json, which is written once."""
        return content_hash(canonical_json(asdict(self._job)))

    @cached_property
    def num_rows(self) -> int:
        """Of all parts."""
        return sum(part.num_rows for part in self.parts)

    @cached_property
    def digest(self) -> str:
        """A hash of which rows there are, in which order: shards never change, so equal digests are equal rows."""
        return content_hash(canonical_json([[part.shard_id, part.num_rows] for part in self.parts]))

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns, as the first part has them, without the part's own metadata."""
        with self._opened(self.parts[0]) as parquet:
            return parquet.schema_arrow.remove_metadata()

    @property
    def width(self) -> int:
        """How many numbers are stored of a vector."""
        return int(self.schema.field(EMBEDDING).type.list_size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored numbers."""
        stored: np.dtype[Any] = np.dtype(self.schema.field(EMBEDDING).type.value_type.to_pandas_dtype())
        return stored

    def only(self, parts: Sequence[LivePart]) -> Snapshot:
        """Return the same output with some of its parts."""
        return Snapshot(self._ledger, self._job, parts)

    def check_columns(self, columns: Sequence[str] | None) -> None:
        """Raise ConfigError if the output lacks one of `columns`."""
        unknown = [name for name in columns or () if name not in self.schema.names]
        if unknown:
            raise ConfigError(f"{self.root} has no column {unknown[0]!r}; it has {', '.join(self.schema.names)}")

    def batches(self, columns: Sequence[str] | None = None, *, from_row: int = 0) -> Iterator[pa.RecordBatch]:
        """
        Yield the rows in order, a few thousand at a time. However many there are, one batch and a piece of its part are in memory.

        Args:
            columns: Which, in which order; by default all.
            from_row: Of all rows, the first to yield.

        Raises:
            CorruptOutput: If a part is missing or damaged, or has not the rows that its record says.
        """
        for batch in self.stored(columns, from_row=from_row):
            yield batch.replace_schema_metadata(None)

    def stored(self, columns: Sequence[str] | None = None, *, from_row: int = 0) -> Iterator[pa.RecordBatch]:
        """Yield what `batches` does, each with the metadata of its part, which says how the vectors are stored."""
        skipped = 0
        for part in self.parts:
            if skipped + part.num_rows <= from_row:
                skipped += part.num_rows
                continue
            yield from self._rows(part, columns, from_row - skipped)
            skipped = from_row = 0

    def _rows(self, part: LivePart, columns: Sequence[str] | None, skip: int) -> Iterator[pa.RecordBatch]:
        name = part_name(part.shard_id)
        with self._opened(part) as parquet:
            if parquet.metadata.num_rows != part.num_rows:
                raise self._corrupt(
                    f"the part {name} has {parquet.metadata.num_rows} rows, and its record says {part.num_rows}"
                )
            found = parquet.iter_batches(self._batch_rows(columns), columns=None if columns is None else list(columns))
            while True:
                try:
                    batch = next(found, None)
                except (pa.ArrowException, OSError) as error:
                    raise self._corrupt(f"the part {name} cannot be read ({type(error).__name__})") from None
                if batch is None:
                    return
                if columns is not None:
                    batch = batch.select(list(columns))
                if skip < batch.num_rows:
                    yield batch.slice(skip)
                skip = max(0, skip - batch.num_rows)

    def _batch_rows(self, columns: Sequence[str] | None) -> int:
        if columns is not None and EMBEDDING not in columns:
            return MAX_BATCH_ROWS
        return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // (self.width * self.dtype.itemsize)))

    @contextmanager
    def _opened(self, part: LivePart) -> Iterator[pq.ParquetFile]:
        """Open a part for a while."""
        name = part_name(part.shard_id)
        try:
            file = self._ledger.open_part(part.shard_id)
        except FileNotFoundError:
            raise self._corrupt(f"the part {name} is missing, and its record is there") from None
        with file:
            try:
                parquet = pq.ParquetFile(
                    file, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
                )
            except (pa.ArrowException, OSError) as error:
                if is_trouble(error):
                    raise cannot("read", self.root, error) from None
                raise self._corrupt(f"the part {name} cannot be read ({type(error).__name__})") from None
            with parquet:
                yield parquet

    def _corrupt(self, problem: str) -> CorruptOutput:
        return CorruptOutput(f"{problem}: {ADVICE.format(root=quote(self.root))}")


def numbers_of(batch: pa.RecordBatch) -> np.ndarray[Any, Any]:
    """Return a batch's vectors as they are stored: shape (rows, numbers of a vector), of the dtype of the output."""
    column = batch.column(EMBEDDING)
    return np.asarray(column.flatten()).reshape(batch.num_rows, column.type.list_size)
