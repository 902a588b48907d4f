"""Columns: which of them a file has, and the types of those that files of lines do not declare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from engine.errors import SourceError
from engine.schema import InputFile
from engine.sources.texts import SURROGATE, is_encodable

MISSING = "missing"
"""The type of a column that none of a file's first rows has."""
NULL = "null"
"""Of one that has no value in any of them."""
JSON = "json"
"""Of one whose values are of several types, or nested: each becomes its JSON text."""
STRING = "string"
ARROW_TYPES = {
    "bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64(), STRING: pa.string(), JSON: pa.string(),
}  # fmt: skip
_PYTHON_TYPES = {"bool": bool, "int64": int, "double": float, STRING: str}
_INT64 = range(-(2**63), 2**63)
_EXACT_IN_DOUBLE = 2**53


def check_column(file: InputFile, names: Sequence[str], column: str, advice: str, *, shown: str | None = None) -> None:
    """
    Make sure that a file has a column once.

    Args:
        file: For the message.
        names: Of its columns.
        column: Looked for.
        advice: What to do if it is not there.
        shown: The names as a message may show them.

    Raises:
        SourceError: If it has none, or several.
    """
    if column not in names:
        raise SourceError(
            f"{file.location} has no column {column!r}; it has: {', '.join(names) if shown is None else shown}. {advice}"
        )
    if names.count(column) > 1:
        raise SourceError(f"{file.location} has {names.count(column)} columns named {column!r}; rename them")


def is_text(kind: pa.DataType) -> bool:
    """Say whether a column of an Arrow type can hold texts: strings or bytes of any layout, or nulls alone."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    raw = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
    return any(is_kind(kind) for is_kind in (*text, *raw))


def type_of(values: Iterable[Any]) -> str:
    """Return the type that the values of a column have in common."""
    kinds = {type(value) for value in values}
    kinds.discard(type(None))
    if not kinds:
        return NULL
    if kinds == {int, float}:
        kinds = {float}
    name = next((name for name, kind in _PYTHON_TYPES.items() if kinds == {kind}), JSON)
    return name if all(fits(value, name) for value in values) else JSON


def wider(one: str, other: str) -> str | None:
    """Return the type that holds the values of both, or None if there is none."""
    for vague in (MISSING, NULL):
        if vague in (one, other):
            return other if one == vague else one
    if one == other:
        return one
    return "double" if {one, other} == {"int64", "double"} else None


def fits(value: Any, kind: str) -> bool:
    """Say whether a value that JSON gave can be in a column of a type, without loss."""
    if value is None or kind == JSON:
        return True
    if kind == "int64":
        return type(value) is int and value in _INT64
    if kind == "double":
        return type(value) is float or (type(value) is int and abs(value) <= _EXACT_IN_DOUBLE)
    return type(value) is _PYTHON_TYPES.get(kind)


def column_of(name: str, kind: str, values: list[Any]) -> tuple[pa.Array, dict[int, str]]:
    """
    Make a column of what JSON gave.

    Args:
        name: For reasons.
        kind: Of `ARROW_TYPES`.
        values: One a row.

    Returns:
        The column, and why each value that does not fit is null in it, by position.
    """
    faults: dict[int, str] = {}
    if kind == JSON:
        values = [None if value is None else _json(value) for value in values]
    elif not {type(value) for value in values} <= {_PYTHON_TYPES[kind], type(None)} or kind == "int64":
        faults = {at: f"column {name!r} is not {kind}" for at, value in enumerate(values) if not fits(value, kind)}
    if kind == STRING and not _are_encodable(values):
        faults |= {
            at: f"column {name!r}: {SURROGATE}"
            for at, value in enumerate(values)
            if type(value) is str and not is_encodable(value)
        }
    if faults:
        values = [None if at in faults else value for at, value in enumerate(values)]
    return pa.array(values, ARROW_TYPES[kind]), faults


def pieces_of(name: str, values: list[Any]) -> tuple[pa.Array, dict[int, str]]:
    """Make a column for a template of what JSON gave: numbers and truth values as Python writes them; else as `column_of` does."""
    texts = [str(value) if type(value) in (bool, int, float) else value for value in values]
    faults = {
        at: f"column {name!r} is no text or number: {type(value).__name__}"
        for at, value in enumerate(texts)
        if value is not None and type(value) is not str
    }
    found, more = column_of(name, STRING, [None if at in faults else value for at, value in enumerate(texts)])
    return found, faults | more


def _are_encodable(values: list[Any]) -> bool:
    try:
        pa.array(values, pa.string())
    except (UnicodeEncodeError, pa.ArrowException):
        return False
    return True


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text if is_encodable(text) else json.dumps(value, separators=(",", ":"))
