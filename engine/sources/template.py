"""Texts from a template: the columns of a shard's rows put together, all rows at once."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from engine.sources.columns import is_text
from engine.sources.texts import BLANK, INVALID_UTF8, Undecodable, values_of
from engine.template import Template

TEXT = pa.large_string()
_NOT_SPACE = r"[^\t-\r\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
"""A character that is not white space, as Python has it: a text that has none is blank wherever it is looked at."""


def is_piece(kind: pa.DataType) -> bool:
    """Say whether a template takes columns of an Arrow type: texts, numbers, truth values and dates."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    taken = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean, pa.types.is_date)
    return is_text(kind) or any(is_kind(kind) for is_kind in taken)


def filled(template: Template, table: pa.Table) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """
    Make the texts of a template: strings as they are, numbers and truth values as Python writes them, nothing for null.

    Args:
        template: What to make.
        table: Has its columns.

    Returns:
        The texts, null where all columns are, and the reason for each row that can have none.
    """
    faults: dict[int, str] = {}
    columns = {name: _strings(table.column(name), faults) for name in template.columns}
    has_value = _any([pc.is_valid(column) for column in columns.values()])
    columns = {name: pc.fill_null(column, "") for name, column in columns.items()}
    has_text = _any([pc.match_substring_regex(column, _NOT_SPACE) for column in columns.values()])
    pieces: list[Any] = []
    for literal, name in template.pieces:
        pieces += [pa.scalar(literal, TEXT)] if literal else []
        pieces += [columns[name]] if name is not None else []
    texts = pc.binary_join_element_wise(*pieces, pa.scalar("", TEXT))
    texts = pc.if_else(has_value, texts, pa.scalar(None, TEXT))
    for position in pc.indices_nonzero(pc.and_(has_value, pc.invert(has_text))).to_pylist():
        faults.setdefault(position, BLANK)
    return texts, faults


def _any(masks: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    found = masks[0]
    for mask in masks[1:]:
        found = pc.or_(found, mask)
    return found


def _strings(column: pa.ChunkedArray, faults: dict[int, str]) -> pa.ChunkedArray:
    """Return the values of a column as a template shows them; bytes that are not UTF-8 are faults of their rows."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if is_text(kind):
        try:
            # By way of bytes: readers of Parquet do not check what is declared as UTF-8, and a cast from bytes does.
            return column.cast(pa.large_binary()).cast(TEXT)
        except pa.ArrowInvalid:
            values = values_of(column)
        faults.update({at: INVALID_UTF8 for at, value in enumerate(values) if isinstance(value, Undecodable)})
        return pa.chunked_array([[None if isinstance(value, Undecodable) else value for value in values]], TEXT)
    if pa.types.is_boolean(kind):
        return pc.if_else(column, pa.scalar("True", TEXT), pa.scalar("False", TEXT))
    if pa.types.is_floating(kind):
        return pa.chunked_array([_floats(column)], TEXT)
    if pa.types.is_decimal(kind):
        return pa.chunked_array([[None if value is None else str(value) for value in column.to_pylist()]], TEXT)
    return column.cast(pa.string()).cast(TEXT)


def _floats(column: pa.ChunkedArray) -> list[str | None]:
    """Write floats as short as their own precision allows: 0.1 of float32 is not 0.10000000149011612."""
    numbers = column.fill_null(0).combine_chunks().to_numpy(zero_copy_only=False)
    valid = column.is_valid().to_pylist()
    return [str(number) if is_there else None for number, is_there in zip(numbers, valid, strict=True)]
