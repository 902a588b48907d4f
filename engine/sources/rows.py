"""Rows: what is read of a source, and how a text is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from engine.config import JobConfig
from engine.errors import SourceError
from engine.schema import FAULT, SOURCE_ROW, TEXT, Shard
from engine.sources.columns import is_text
from engine.sources.opening import is_staged_source
from engine.sources.template import filled, is_piece
from engine.template import parse


@dataclass(frozen=True, slots=True)
class Selection:
    """Which columns of a source are read. It travels to the readers, so it is small."""

    text_column: str
    kept: tuple[str, ...] = ()
    """Columns that go to the parts as they are, the id first."""
    kept_types: Mapping[str, str] = field(default_factory=dict)
    """Their Arrow types, as the first run found them: what files that have no types of their own are read as."""
    text_template: str | None = None
    """Makes the text of several columns, in place of `text_column`."""
    has_faults: bool = False
    """A column says of malformed rows why they are: of sources that were in memory, which knew."""
    text_rows: str = "line"
    """Of plain text: `line` or `file`."""

    @classmethod
    def of(cls, config: JobConfig, kept_types: Mapping[str, str] | None = None) -> Selection:
        """Return what a job reads; `kept_types` are the job's, once they are known."""
        return cls(
            config.text_column,
            config.kept_columns,
            dict(kept_types or {}),
            text_template=config.text_template,
            has_faults=is_staged_source(config.source),
            text_rows=config.text_rows,
        )

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that the text is made of."""
        return parse(self.text_template).columns if self.text_template is not None else (self.text_column,)

    @property
    def columns(self) -> list[str]:
        """What to read of a file, each once."""
        return list(dict.fromkeys((*self.text_columns, *self.kept, *((FAULT,) if self.has_faults else ()))))

    def advice_on(self, column: str) -> str:
        """Say what to do if there is no such column: which option names it."""
        if column not in self.text_columns:
            return "It is named by --id-column or --keep: correct that"
        return "Name the text with --text-column" if self.text_template is None else "Correct --text-template"

    def check_types(self, schema: pa.Schema, location: str) -> None:
        """Raise SourceError if a column that the text is made of cannot be: `location` says whose schema it is."""
        for name in self.text_columns:
            kind = schema.field(name).type
            if self.text_template is None and not is_text(kind):
                raise SourceError(
                    f"the column {name!r} of {location} is {kind}, not text; convert it, or name another with --text-column"
                )
            if not is_piece(kind):
                raise SourceError(
                    f"the column {name!r} of {location} is {kind}: a text template takes texts, numbers, truth values and dates; "
                    "convert it to text"
                )

    def finished(self, rows: Rows, shard: Shard) -> Rows:
        """Return a shard's rows as all above the sources know them: the text as `_text`, the kept columns, and `_source_row`."""
        source_rows = np.arange(shard.start, shard.stop, dtype=np.int64)
        table, faults = rows.table, dict(rows.faults)
        if self.has_faults:
            reasons = enumerate(table.column(FAULT).to_pylist())
            faults |= {position: reason for position, reason in reasons if reason is not None}
        if self.text_template is None:
            texts = table.column(self.text_column)
        else:
            texts, found = filled(parse(self.text_template), table)
            faults = found | faults
        arrays = [texts, *(table.column(name) for name in self.kept), pa.array(source_rows)]
        return Rows(pa.Table.from_arrays(arrays, names=[TEXT, *self.kept, SOURCE_ROW]), faults)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a shard, all of them and in order."""

    table: pa.Table
    faults: Mapping[int, str] = field(default_factory=dict)
    """Position in the table and reason of each row that is malformed: a reject, whatever the table holds for it (nulls)."""
