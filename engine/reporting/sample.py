"""The sample: some rows of an output, the same ones each time, read from a bounded number of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.part import format_of, vectors_of
from engine.schema import EMBEDDING, SOURCE_ROW
from engine.sources.texts import Undecodable, values_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.config import JobConfig
    from engine.ledger import Ledger

MAX_READ_BYTES = 1 << 29
"""Of vectors, that are read for a sample: of parts that hold more, the beginning is read."""
BATCH_BYTES = 1 << 24
"""Of vectors, that are in memory at once beside the sample."""
SHOWN_CHARACTERS = 280
"""Of a text."""


@dataclass(slots=True)
class Sample:
    """Rows of an output: vectors, and what is shown beside them."""

    vectors: np.ndarray[Any, np.dtype[np.float32]]
    """Shape (rows, dimensions)."""
    ids: list[str] = field(default_factory=list)
    texts: list[str] | None = None
    """Their beginnings; None if the output does not keep the texts."""
    lengths: list[int] = field(default_factory=list)
    """Of the texts, in characters; empty if the output does not keep them."""
    colors: list[Any] | None = None
    """Values of the column to colour by, if one was asked for."""
    num_parts: int = 0
    is_beginning: bool = False
    """Only the beginnings of parts were read."""
    num_unreadable: int = 0
    """Parts that were chosen, and are gone or damaged."""

    def __len__(self) -> int:
        return len(self.ids)


def sample_of(
    ledger: Ledger, config: JobConfig, parts: Sequence[tuple[str, int]], *, num_rows: int, color_by: str | None
) -> Sample:
    """
    Sample rows of some parts, from each as its share of their rows is.

    Args:
        ledger: Of the output.
        config: Of the job.
        parts: Shard ids and their rows.
        num_rows: How many to sample at most.
        color_by: A column of the parts whose values are wanted too.
    """
    has_text = config.text_template is None and config.text_column in config.keep
    text_column = config.text_column if has_text else None
    asked = _Asked(config.id_column or "id", text_column, color_by)
    total = sum(rows for _, rows in parts)
    share = min(1.0, num_rows / max(total, 1))
    found = Sample(np.empty((0, 0), np.float32), texts=[] if text_column else None, colors=[] if color_by else None)
    vectors = []
    carried = 0.0
    for number, (shard_id, rows) in enumerate(parts):
        carried += rows * share
        wanted, carried = int(carried + 1e-9), carried - int(carried + 1e-9)
        if not wanted:
            continue
        try:
            vectors.append(asked.read(ledger, shard_id, wanted, MAX_READ_BYTES // len(parts), number, found))
            found.num_parts += 1
        except (pa.ArrowException, OSError, KeyError, ValueError, AttributeError):
            found.num_unreadable += 1
    if vectors:
        found.vectors = np.concatenate(vectors)
    return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """Which columns of a part are read."""

    id_column: str
    text_column: str | None
    color_by: str | None

    def read(self, ledger: Ledger, shard_id: str, wanted: int, max_bytes: int, seed: int, into: Sample) -> Any:
        """Add `wanted` rows of a part to a sample, all or none; return their vectors."""
        columns = {self.id_column, EMBEDDING, SOURCE_ROW} | {self.text_column, self.color_by} - {None}
        with (
            ledger.open_part(shard_id) as file,
            pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet,
        ):
            num_rows = parquet.metadata.num_rows
            vectors = format_of(parquet.schema_arrow)
            row_bytes = vectors.dimension * 4  # as they are looked at, however they are stored
            readable = min(num_rows, max(wanted, max_bytes // row_bytes))
            chosen = np.sort(np.random.default_rng(seed).choice(readable, min(wanted, readable), replace=False))
            batches = parquet.iter_batches(max(1, min(8192, BATCH_BYTES // row_bytes)), columns=sorted(columns))  # type: ignore[type-var]
            table = pa.Table.from_batches(list(_rows(batches, chosen)))
        self._describe(table, into)
        into.is_beginning |= readable < num_rows
        return vectors_of(table, vectors)

    def _describe(self, table: pa.Table, into: Sample) -> None:
        ids = [shown(value) for value in values_of(table.column(self.id_column))]
        texts = values_of(table.column(self.text_column)) if self.text_column else []
        colors = values_of(table.column(self.color_by)) if self.color_by else []
        into.ids += ids
        if into.texts is not None:
            into.texts += [shown(text) for text in texts]
            into.lengths += [len(text) if isinstance(text, str) else 0 for text in texts]
        if into.colors is not None:
            into.colors += colors


def shown(value: Any) -> str:
    """Return the beginning of a value, as text."""
    if isinstance(value, Undecodable):
        return f"({value.reason})"
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _rows(batches: Iterator[pa.RecordBatch], chosen: Any) -> Iterator[pa.RecordBatch]:
    """Yield the chosen rows of each batch, and read no batch behind the last of them."""
    start = 0
    for batch in batches:
        here = chosen[(chosen >= start) & (chosen < start + batch.num_rows)] - start
        if len(here):
            yield batch.take(pa.array(here))
        start += batch.num_rows
        if start > chosen[-1]:
            return
