"""
Text hashes: what tells that two texts are the same, without either of them. Pure.

A part has one for each row, in `_text_hash`: the 16 bytes of the XXH3-128 digest of the text as it goes to the model, as UTF-8: after a
template, and before what a model puts in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

NUM_BYTES = 16

Numbers = npt.NDArray[np.uint64]
"""Hashes as two numbers each, the first and the last eight bytes: shape (texts, 2)."""


def digests(texts: Sequence[str]) -> list[bytes]:
    """Return the hash of each text as its 16 bytes."""
    digest = xxhash.xxh3_128_digest
    return [digest(text.encode()) for text in texts]


def text_hashes(texts: Sequence[str]) -> pa.BinaryArray:
    """Return the hash of each text, as the column of a part has it."""
    data = b"".join(digests(texts))
    offsets = np.arange(len(texts) + 1, dtype=np.int32) * NUM_BYTES
    return pa.Array.from_buffers(pa.binary(), len(texts), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def numbers_of(column: pa.ChunkedArray | pa.Array) -> Numbers:
    """
    Return a column of hashes as numbers.

    Raises:
        ValueError: If it is no such column: other than bytes, with nulls, or of another length.
    """
    pieces = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    if column.type != pa.binary() or column.null_count:
        raise ValueError("not a column of hashes")
    return np.concatenate([np.empty((0, 2), np.uint64), *(_numbers(piece) for piece in pieces if len(piece))])


def _numbers(piece: pa.BinaryArray) -> npt.NDArray[Any]:
    _, offsets, data = piece.buffers()
    ends = np.frombuffer(offsets, np.int32)[piece.offset : piece.offset + len(piece) + 1]
    if (np.diff(ends) != NUM_BYTES).any():
        raise ValueError("a hash has another length")
    raw = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
    return raw.view(">u8").reshape(-1, 2).astype(np.uint64)
