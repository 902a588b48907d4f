"""Rows: what is read of a source, and how a text is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from engine.config import JobConfig
from engine.schema import SOURCE_ROW, TEXT, Shard


@dataclass(frozen=True, slots=True)
class Selection:
    """Which columns of a source are read. It travels to the readers, so it is small."""

    text_column: str
    kept: tuple[str, ...] = ()
    """Columns that go to the parts as they are, the id first."""
    kept_types: Mapping[str, str] = field(default_factory=dict)
    """Their Arrow types, as the first run found them: what files that have no types of their own are read as."""

    text_rows: str = "line"
    """Of plain text: `line` or `file`."""

    @classmethod
    def of(cls, config: JobConfig, kept_types: Mapping[str, str] | None = None) -> Selection:
        """Return what a job reads; `kept_types` are the job's, once they are known."""
        return cls(config.text_column, config.kept_columns, dict(kept_types or {}), config.text_rows)

    @property
    def columns(self) -> list[str]:
        """What to read of a file, each once."""
        return list(dict.fromkeys((self.text_column, *self.kept)))

    def finished(self, rows: Rows, shard: Shard) -> Rows:
        """Return a shard's rows as all above the sources know them: the text as `_text`, the kept columns, and `_source_row`."""
        source_rows = np.arange(shard.start, shard.stop, dtype=np.int64)
        table = rows.table
        arrays = [table.column(self.text_column), *(table.column(name) for name in self.kept), pa.array(source_rows)]
        return Rows(pa.Table.from_arrays(arrays, names=[TEXT, *self.kept, SOURCE_ROW]), rows.faults)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a shard, all of them and in order."""

    table: pa.Table
    faults: Mapping[int, str] = field(default_factory=dict)
    """Position in the table and reason of each row that is malformed: a reject, whatever the table holds for it (nulls)."""
