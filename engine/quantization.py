"""
Quantization: from the float32 vectors of a model to what an output stores, and back. Pure.

    float32   as they are
    float16   rounded to the nearest
    int8      round(v / scale), cut off at -127 and 127: one scale for all dimensions and all vectors of an output
    binary    one bit a dimension, 1 where v > 0, eight to a byte, the first dimension in the highest bit (numpy's packbits)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.schema import vectors_type

INT8_MAX = 127
QUANTILE = 0.9999
"""Of the sizes of all numbers of a sample, that becomes 127. Beyond it they are cut off; no dimension of a model with fewer than
10,000 is, however much larger than the others it always is."""
BITS = 8

_ARROW = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}

Vectors = npt.NDArray[np.float32]
Stored = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class VectorFormat:
    """How vectors are stored: all that is needed to read them."""

    dtype: str
    """float32, float16, int8 or binary."""
    dimension: int
    """Of the model's vectors."""
    scale: float | None = None
    """Of int8: what a step of one stands for."""

    def __post_init__(self) -> None:
        if self.dtype not in _ARROW:
            raise ValueError(f"vectors are not stored as {self.dtype!r}")

    @property
    def width(self) -> int:
        """How many numbers a stored vector has: bytes of eight dimensions if it is binary, else one a dimension."""
        return -(-self.dimension // BITS) if self.dtype == "binary" else self.dimension

    @property
    def arrow_type(self) -> pa.DataType:
        """The type of the column that holds the vectors."""
        return vectors_type(self.width, _ARROW[self.dtype])

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a part's metadata has them."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of_type(cls, kind: pa.DataType) -> VectorFormat | None:
        """
        Tell the format from the type of a column; None if it holds no vectors.

        A type has neither a scale nor a dimension that is no multiple of eight: those are in a part's metadata.
        """
        if not pa.types.is_fixed_size_list(kind):
            return None
        dtype = next((dtype for dtype, value in _ARROW.items() if value == kind.value_type), None)
        if dtype is None:
            return None
        return cls(dtype, kind.list_size * (BITS if dtype == "binary" else 1))


def quantize(vectors: Vectors, to: VectorFormat) -> Stored:
    """
    Convert vectors to what is stored of them. What cannot be stored comes out as what `usable` tells.

    Args:
        vectors: Shape (rows, dimension), float32, finite.
        to: Their format.

    Returns:
        Shape (rows, `to.width`): float32, float16, int8, or uint8 if binary.
    """
    if to.dtype == "binary":
        return np.packbits(vectors > 0, axis=1)
    if to.dtype == "int8":
        scaled = vectors / np.float32(_scale_of(to))
        return np.clip(np.rint(scaled, out=scaled), -INT8_MAX, INT8_MAX, out=scaled).astype(np.int8)
    if to.dtype == "float16":
        with np.errstate(over="ignore"):
            return vectors.astype(np.float16)
    return vectors


def dequantize(stored: Stored, of: VectorFormat) -> Vectors:
    """
    Convert what is stored of vectors back: as near to the model's vectors as it comes; of binary ones each number is 1 or -1.

    Args:
        stored: Shape (rows, `of.width`), as `quantize` returns it.
        of: Their format.

    Returns:
        Shape (rows, dimension), float32; the array itself if it is that already.
    """
    if of.dtype == "binary":
        bits = np.unpackbits(np.ascontiguousarray(stored), axis=1, count=of.dimension)
        return bits.astype(np.float32) * 2 - 1
    if of.dtype == "int8":
        return stored.astype(np.float32) * np.float32(_scale_of(of))
    return stored.astype(np.float32, copy=False)


def usable(stored: Stored, of: VectorFormat) -> npt.NDArray[np.bool_]:
    """Say of each stored vector whether a neighbour can be looked for with it: it is finite, and not zero. Bits always are."""
    if of.dtype == "binary":
        return np.ones(len(stored), bool)
    return np.logical_and(np.isfinite(stored).all(axis=1), stored.any(axis=1))


def to_arrow(stored: Stored, of: VectorFormat) -> pa.FixedSizeListArray:
    """Return stored vectors as a column, without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(stored).reshape(-1)), type=of.arrow_type)


def from_arrow(column: pa.ChunkedArray | pa.FixedSizeListArray) -> Stored:
    """Return a column of vectors as an array of shape (rows, width), in the type that it is stored in."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = array.flatten() if len(array) else pa.array([], array.type.value_type)
    return np.asarray(flat).reshape(len(array), array.type.list_size)


def scale_for(vectors: Vectors) -> float:
    """
    Choose the scale of int8 from a sample of vectors: `QUANTILE` of the sizes of their numbers becomes 127.

    Zeros are left out: most numbers of a sparse vector are.

    Args:
        vectors: Shape (rows, dimension), float32, finite; not all zero.
    """
    sizes = np.abs(vectors[vectors != 0])
    return float(np.float32(np.quantile(sizes, QUANTILE) / INT8_MAX))


def _scale_of(vectors: VectorFormat) -> float:
    if not vectors.scale:
        raise ValueError("int8 without a scale")
    return vectors.scale
