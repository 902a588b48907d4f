"""CSV and TSV: a header, and a row a record; all columns are strings, as they stand in the file."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Sequence

import pyarrow as pa

from engine.errors import SourceError
from engine.schema import InputFile
from engine.sources.columns import STRING, check_column
from engine.sources.lines import LineFormat, Look, first_record
from engine.sources.records import Chunk, Quoted
from engine.sources.rows import Selection
from engine.sources.texts import INVALID_UTF8

MALFORMED = "malformed CSV"
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,40}")
"""What a message shows of a header: in a file without one that is a row, and may be a text."""


class Parser:
    """
    Makes a table of records.

    Args:
        header: The names of the columns.
        selection: Which of them to keep.
        delimiter: Between fields.
    """

    def __init__(self, header: Sequence[str], selection: Selection, delimiter: str) -> None:
        self._width = len(header)
        self._places = [(name, header.index(name)) for name in selection.columns]
        self._delimiter = delimiter

    def __call__(self, chunk: Chunk) -> tuple[pa.RecordBatch, dict[int, str]]:
        """Return the columns of the selection, and why each malformed record is null in them, by position."""
        faults = dict(chunk.faults)
        rows: list[Sequence[str | None]] | None = self._all_at_once(chunk) if not faults else None
        if rows is None:
            rows = [self._row(record, at, faults) for at, record in enumerate(chunk.records())]
        if {*map(len, rows)} != {self._width}:
            for at, row in enumerate(rows):
                if len(row) != self._width:
                    faults.setdefault(at, f"{len(row)} fields where the header has {self._width}")
                    rows[at] = [None] * self._width
        columns = [pa.array([row[place] for row in rows], pa.string()) for _, place in self._places]
        return pa.record_batch(columns, names=[name for name, _ in self._places]), faults

    def _all_at_once(self, chunk: Chunk) -> list[Sequence[str | None]] | None:
        """Read all records in one go; None if they have to be read one by one."""
        try:
            text = chunk.data[int(chunk.starts[0]) : int(chunk.ends[-1])].decode()
            if "\r" in text and text.count("\r") != text.count("\r\n"):  # `csv` would end records there
                return None
            rows: list[Sequence[str | None]] = [
                row for row in csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter) if row
            ]
        except (UnicodeDecodeError, csv.Error):
            return None
        return rows if len(rows) == len(chunk) else None

    def _row(self, record: bytes, at: int, faults: dict[int, str]) -> Sequence[str | None]:
        if at in faults:
            return []
        try:
            rows = list(csv.reader([record.decode()], delimiter=self._delimiter))
        except UnicodeDecodeError:
            faults[at] = INVALID_UTF8
            return []
        except csv.Error:
            faults[at] = MALFORMED
            return []
        return rows[0] if rows else []


def delimited(name: str, delimiter: str) -> LineFormat:
    """Return the format of files with a delimiter."""
    csv.field_size_limit(sys.maxsize)  # records have a limit of their own

    def header(file: InputFile) -> list[str] | None:
        record = first_record(file, kind)
        if record is None:
            return None
        try:
            return next(csv.reader([record.decode()], delimiter=delimiter), [])
        except (UnicodeDecodeError, csv.Error):
            raise SourceError(
                f"the first line of {file.location} is no header of {name} in UTF-8: convert the file, or take it out"
            ) from None

    def look(file: InputFile, head: Sequence[Chunk], selection: Selection) -> Look:
        names = header(file)
        if names is not None:
            shown = ", ".join(column if _NAME.fullmatch(column) else "…" for column in names)
            for column in selection.columns:
                advice = selection.advice_on(column)
                check_column(file, names, column, advice, shown=f"{shown} (its first line has to be a header)")
        text_bytes = all_bytes = 0
        for chunk in head if names else ():
            batch, _ = Parser(names or [], selection, delimiter)(chunk)
            texts = (text for name in selection.text_columns for text in batch.column(name).to_pylist())
            text_bytes += sum(len(text.encode()) for text in texts if text)
            all_bytes += int((chunk.ends - chunk.starts).sum())
        return Look(dict.fromkeys(selection.columns, STRING), text_bytes / all_bytes if all_bytes else 1.0)

    def parser(file: InputFile, selection: Selection) -> Parser:
        return Parser(header(file) or [], selection, delimiter)

    kind = LineFormat(name, Quoted(delimiter), look, parser, num_headers=1)
    return kind


CSV = delimited("CSV", ",")
TSV = delimited("TSV", "\t")
