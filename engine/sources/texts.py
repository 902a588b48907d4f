"""Texts: which values can be embedded, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from engine.errors import ConfigError
from engine.schema import TEXT

if TYPE_CHECKING:
    from engine.sources.rows import Rows

NULL = "null"
EMPTY = "empty text"
BLANK = "blank text"
INVALID_UTF8 = "not valid UTF-8"
SURROGATE = "lone surrogate, not valid Unicode"


def reject_reason(value: Any) -> str | None:
    """Return why a value cannot be embedded, or None if it can; the reason never quotes the value."""
    if value is None:
        return NULL
    if not isinstance(value, str):
        return f"not a string: {type(value).__name__}"
    if not value:
        return EMPTY
    if value.isspace():
        return BLANK
    return None if is_encodable(value) else SURROGATE


def check_list(texts: Any) -> None:
    """Raise ConfigError if texts are a single text, whose characters would be taken for them."""
    if isinstance(texts, str):
        raise ConfigError("embed takes a list of texts; for one text, give a list of one")


def split(
    values: Iterable[Any], faults: Mapping[int, str] | None = None
) -> tuple[list[str], list[int], dict[int, str]]:
    """
    Tell texts from rejects.

    Args:
        values: Of a shard, one a row.
        faults: Position and reason of rows that are malformed, whatever their value.

    Returns:
        The texts, the position of each among `values`, and the reason for each position that is left out.
    """
    texts: list[str] = []
    positions: list[int] = []
    reasons = dict(faults or {})
    for position, value in enumerate(values):
        if position in reasons:
            continue
        reason = value.reason if isinstance(value, Undecodable) else reject_reason(value)
        if reason is None:
            texts.append(value)
            positions.append(position)
        else:
            reasons[position] = reason
    return texts, positions, reasons


def texts_in(rows: Rows) -> tuple[list[str], list[int], dict[int, str]]:
    """Tell texts from rejects in the rows of a shard, as `split` does."""
    return split(values_of(rows.table.column(TEXT)), rows.faults)


class Undecodable:
    """Stands for bytes that are not UTF-8."""

    reason = INVALID_UTF8


def values_of(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Return a column's values for Python: bytes decoded as UTF-8, one `Undecodable` for each value that cannot be."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        try:
            return list(column.to_pylist())
        except UnicodeDecodeError:  # Parquet readers do not validate what is declared as UTF-8
            column = column.cast(pa.large_binary())
    return [_decoded(value) if isinstance(value, bytes) else value for value in column.to_pylist()]


def _decoded(value: bytes) -> str | Undecodable:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return Undecodable()


def is_encodable(value: str) -> bool:
    """Say whether a string can be UTF-8: one with half a character in it cannot."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
