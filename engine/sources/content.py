"""The content of Arrow columns in one canonical form: equal values are equal bytes, however a library lays them out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def canonical_type(kind: pa.DataType) -> pa.DataType:
    """Return the plain type of values that libraries have several for: dictionaries, views, large and run-end encoded ones."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return canonical_type(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return canonical_type(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    if types.is_map(kind):
        return pa.map_(canonical_type(kind.key_type), canonical_type(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(canonical_type(kind.value_type), kind.list_size)
    if hasattr(kind, "value_type"):  # lists of all layouts
        return pa.list_(canonical_type(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([pa.field(field.name, canonical_type(field.type)) for field in kind])
    return kind


def canonical(column: pa.ChunkedArray) -> pa.Array:
    """
    Return a column as one array of its canonical type.

    Raises:
        pa.ArrowException: If Arrow cannot.
    """
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    kind = canonical_type(column.type)
    column = column if column.type == kind else column.cast(kind)
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)


def content_of(array: pa.Array) -> Iterator[memoryview]:
    """Yield the bytes that an array's values are, with neither offsets, nor padding, nor what lies below nulls."""
    if pa.types.is_null(array.type):
        return
    yield np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).data
    array = array.drop_null()
    if pa.types.is_nested(array.type):
        yield from _nested(array)
    elif pa.types.is_boolean(array.type):
        yield np.packbits(array.to_numpy(zero_copy_only=False)).data
    elif pa.types.is_string(array.type) or pa.types.is_binary(array.type):
        offsets = _offsets(array)
        yield np.diff(offsets).data
        if (data := array.buffers()[2]) is not None:
            yield memoryview(data)[offsets[0] : offsets[-1]]
    elif (data := array.buffers()[1]) is not None:
        width = array.type.bit_width // 8
        yield memoryview(data)[array.offset * width : (array.offset + len(array)) * width]


def _nested(array: pa.Array) -> Iterator[memoryview]:
    """Yield the content of lists, maps and structs that are all there."""
    if pa.types.is_map(array.type):
        array = array.take(pa.array(np.arange(len(array))))  # for keys and items of these rows alone
        children = [array.keys, array.items]
    else:
        flat = array.flatten()
        children = flat if isinstance(flat, list) else [flat]
    if pa.types.is_map(array.type) or pa.types.is_list(array.type):
        yield np.diff(_offsets(array)).data
    for child in children:
        yield from content_of(child)


def _offsets(array: pa.Array) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return where each value of a string or a list begins, and the last one ends."""
    if not len(array):
        return np.zeros(1, np.int32)
    return np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
