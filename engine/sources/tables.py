"""Tables in memory, of whichever library: the columns that a job reads, a few thousand rows at a time, as Arrow tables."""

from __future__ import annotations

import decimal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from engine.errors import SourceError
from engine.schema import FAULT
from engine.sources.rows import Selection
from engine.sources.table_kinds import is_frame, is_of, refuse_others
from engine.sources.texts import INVALID_UTF8, SURROGATE, reject_reason

ROWS = 8192
"""Of a table that are looked at at once."""
MANY_NAMES = 20
NUMBERS = (bool, int, float, decimal.Decimal, np.number, np.bool_)


def tables_of(source: Any, selection: Selection) -> Iterator[pa.Table]:
    """
    Read the columns of a table in memory.

    Args:
        source: A list of texts or of rows as dicts, a dict of columns, a DataFrame or Series of pandas or polars, what Arrow has, a Dataset of
            Hugging Face; or whatever exports itself as a stream of Arrow's.
        selection: What to read.

    Returns:
        Tables of the selection's columns, `_fault` among them, of any numbers of rows; at least one, which may have none.

    Raises:
        SourceError: If it is not one of these, or a column is missing, or its values cannot be kept.
    """
    refuse_others(source)
    wanted = [name for name in selection.columns if name != FAULT]
    batches = _batches(source, wanted)
    if batches is not None:
        return (_selected(batch, wanted) for batch in batches)
    return _read(_columns(source, selection), selection, wanted)


def _batches(source: Any, wanted: Sequence[str]) -> Iterable[pa.Table] | None:
    """Return the tables that a source of Arrow's kind consists of, and None for others."""
    if isinstance(source, pa.Table):
        return (source.slice(start, ROWS) for start in range(0, source.num_rows or 1, ROWS))
    if isinstance(source, pa.RecordBatch):
        return [pa.Table.from_batches([source])]
    if isinstance(source, pa.RecordBatchReader):
        return _of_reader(source)
    if is_of(source, "datasets", "Dataset"):
        check_names(source.column_names, wanted)
        return (
            source.select_columns(list(wanted)).with_format("arrow").iter(ROWS) if len(source) else [source.data.table]
        )
    if is_frame(source) or is_of(source, "pandas", "Series") or is_of(source, "polars", "Series"):
        return None
    if hasattr(source, "__arrow_c_stream__") and not isinstance(source, (pa.ChunkedArray, pa.Array)):
        return _of_reader(pa.RecordBatchReader.from_stream(source))
    return None


def _of_reader(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    yield reader.schema.empty_table()
    yield from (pa.Table.from_batches([batch]) for batch in reader)


def _selected(table: pa.Table, wanted: Sequence[str]) -> pa.Table:
    check_names(table.column_names, wanted)
    return table.select(list(wanted)).append_column(FAULT, pa.nulls(table.num_rows, pa.string()))


class _Column(Protocol):
    """A column of which pieces can be had."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> tuple[pa.Array | pa.ChunkedArray, dict[int, str]]:
        """Return some rows, and the reason for each position of them that is malformed."""


@dataclass(frozen=True, slots=True)
class _Typed:
    """A column of one type: of Arrow, polars, pandas or numpy."""

    values: Any

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, start: int, stop: int) -> tuple[pa.Array | pa.ChunkedArray, dict[int, str]]:
        """Return some rows; none is malformed."""
        if isinstance(self.values, (pa.Array, pa.ChunkedArray)):
            return self.values.slice(start, stop - start), {}
        if is_of(self.values, "polars", "Series"):
            return self.values.slice(start, stop - start).to_arrow(), {}
        piece = self.values.iloc[start:stop] if is_of(self.values, "pandas", "Series") else self.values[start:stop]
        return pa.array(piece, from_pandas=True), {}


@dataclass(frozen=True, slots=True)
class _Texts:
    """A column of Python's objects that texts are made of: what is no text is a fault of its row."""

    values: Any
    with_numbers: bool
    """A template takes numbers too."""

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, start: int, stop: int) -> tuple[pa.Array | pa.ChunkedArray, dict[int, str]]:
        """Return some rows as strings."""
        values = self.values[start:stop]
        try:
            return pa.array(values, pa.string(), from_pandas=True), {}
        except (pa.ArrowException, UnicodeError, TypeError, ValueError):
            pass
        faults: dict[int, str] = {}
        texts = [self._text(value, position, faults) for position, value in enumerate(values)]
        return pa.array(texts, pa.string()), faults

    def _text(self, value: Any, position: int, faults: dict[int, str]) -> str | None:
        if _is_missing(value):
            return None
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError:
                faults[position] = INVALID_UTF8
                return None
        if self.with_numbers and isinstance(value, NUMBERS):
            return str(value)
        reason = reject_reason(value)
        if not isinstance(value, str) or reason == SURROGATE:
            faults[position] = str(reason)
            return None
        return value


class _Kept:
    """A column of Python's objects that goes to the parts as it is: all of one type."""

    def __init__(self, name: str, values: Any) -> None:
        self._name, self._values = name, values
        with _one_type(name):
            self._kind = pa.infer_type(values, from_pandas=True)

    def __len__(self) -> int:
        return len(self._values)

    def rows(self, start: int, stop: int) -> tuple[pa.Array | pa.ChunkedArray, dict[int, str]]:
        """Return some rows; strings that are not Unicode are null, and faults of their rows."""
        values = self._values[start:stop]
        faults: dict[int, str] = {}
        with _one_type(self._name):
            try:
                return pa.array(values, self._kind, from_pandas=True), {}
            except UnicodeEncodeError:
                faults |= {at: SURROGATE for at, value in enumerate(values) if _has_surrogate(value)}
            return pa.array(
                [None if at in faults else value for at, value in enumerate(values)], self._kind, from_pandas=True
            ), faults


@contextmanager
def _one_type(name: str) -> Iterator[None]:
    """Name the column whose values are not of one type; never a value."""
    try:
        yield
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        raise SourceError(
            f"the column {name!r} has values of several types, or of one that Arrow does not have: make them alike (such as with "
            "astype(str)), or do not keep it"
        ) from None


def _columns(source: Any, selection: Selection) -> dict[str, Any]:
    """Return the columns of a table by name, as their library has them."""
    wanted = [name for name in selection.columns if name != FAULT]
    if is_frame(source):
        names = list(source.columns)
        check_names(names, wanted)
        return {name: source[name] for name in wanted}
    if isinstance(source, Mapping):
        check_names(list(source), wanted)
        return {name: source[name] for name in wanted}
    if isinstance(source, list) and any(isinstance(row, Mapping) for row in source):
        if not all(isinstance(row, Mapping) for row in source):
            raise SourceError("the list has dicts and others among them: give rows as dicts, all of them")
        check_names(list(dict.fromkeys(name for row in source for name in row)), wanted)
        return {name: [row.get(name) for row in source] for name in wanted}
    name = selection.text_column if selection.text_template is None else "text"
    check_names([name], wanted)
    return {name: source}


def _read(columns: Mapping[str, Any], selection: Selection, wanted: Sequence[str]) -> Iterator[pa.Table]:
    found = {name: _column(name, columns[name], selection) for name in wanted}
    lengths = {len(column) for column in found.values()}
    if len(lengths) > 1:
        raise SourceError(
            f"the columns have different numbers of rows: {', '.join(f'{n} {len(c)}' for n, c in found.items())}"
        )
    num_rows = lengths.pop()
    for start in range(0, num_rows or 1, ROWS):
        stop = min(start + ROWS, num_rows)
        faults: dict[int, str] = {}
        arrays = []
        for column in found.values():
            array, malformed = column.rows(start, stop)
            arrays.append(array)
            faults = malformed | faults
        reasons = pa.array([faults.get(position) for position in range(stop - start)], pa.string())
        yield pa.Table.from_arrays([*arrays, reasons], names=[*wanted, FAULT])


def _column(name: str, values: Any, selection: Selection) -> _Column:
    is_objects = True
    if isinstance(values, np.ndarray) or is_of(values, "pandas", "Series"):
        if getattr(values, "ndim", 1) != 1:
            raise SourceError(f"the column {name!r} has several dimensions, or is there twice: give one list of values")
        is_objects = values.dtype == object
        values = values.to_numpy() if is_objects and not isinstance(values, np.ndarray) else values
    elif is_of(values, "polars", "Series"):
        is_objects = str(values.dtype) == "Object"
        values = values.to_list() if is_objects else values
    elif isinstance(values, (pa.Array, pa.ChunkedArray)):
        is_objects = False
    elif isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise SourceError(f"the column {name!r} is a {type(values).__name__}: give a list of its values")
    if not is_objects:
        return _Typed(values)
    if name in selection.text_columns:
        return _Texts(values, selection.text_template is not None)
    return _Kept(name, values)


def check_names(names: Sequence[Any], wanted: Iterable[str]) -> None:
    """Raise SourceError if a table lacks a column that is wanted, or has two of the name."""
    for name in wanted:
        if names.count(name) > 1:
            raise SourceError(f"the table has {names.count(name)} columns named {name!r}; rename them")
        if name not in names:
            some = ", ".join(map(str, names[:MANY_NAMES])) + (", …" if len(names) > MANY_NAMES else "")
            raise SourceError(
                f"the table has no column {name!r}; it has: {some}. Correct text_column, text_template, id_column or keep"
            )


def _is_missing(value: Any) -> bool:
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _has_surrogate(value: Any) -> bool:
    """Say whether a value, or what is in it, is a string that is not Unicode."""
    if isinstance(value, str):
        return reject_reason(value) == SURROGATE
    if isinstance(value, Mapping):
        return any(map(_has_surrogate, (*value, *value.values())))
    return isinstance(value, (list, tuple)) and any(map(_has_surrogate, value))
