"""Repeated ids: rows that have the id of another, counted over any number of parts in bounded memory."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from engine.wording import count

BUCKETS = 256
"""A billion ids are 80 MB in each."""
MAX_IN_MEMORY = 1 << 20
"""Ids, of 20 bytes each, before they are written to the buckets."""
_ENTRY = np.dtype([("hash", "<u8"), ("row", "<u8"), ("part", "<u4")])
_NULL = np.uint64(0x6E756C6C5F69645F)
_ODD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


def num_repeated(ids: pa.ChunkedArray) -> int:
    """Return how many rows have an id that another row has before them; null is an id like others."""
    return len(ids) - len(np.unique(hashes(ids)))


def hashes(ids: pa.ChunkedArray) -> Hashes:
    """Return 64 bits for each id, of whatever type: a function of the integer, or the hash of a string or of how a value is written."""
    if pa.types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    if pa.types.is_integer(ids.type):
        unsigned = pa.types.is_unsigned_integer(ids.type)
        numbers = np.asarray(ids.cast(pa.uint64() if unsigned else pa.int64()).fill_null(0).combine_chunks())
        mixed = numbers.astype(np.uint64) * _ODD  # wraps; each number has its own
        found = mixed ^ (mixed >> _HALF)
        found[np.asarray(ids.is_null().combine_chunks().to_numpy(zero_copy_only=False))] = _NULL
        return np.asarray(found, np.uint64)
    try:
        values = ids.cast(pa.large_binary()).to_pylist()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError):
        values = [None if value is None else repr(value).encode("utf-8", "surrogatepass") for value in ids.to_pylist()]
    null = int(_NULL)
    return np.fromiter(
        (null if value is None else xxhash.xxh3_64_intdigest(value) for value in values), np.uint64, len(values)
    )


class RepeatedIds:
    """
    Collects the ids of parts, and finds those that occur more than once. Threads may share it.

    Ids are told apart by 64 bits: among a hundred million, one that is none is found with a chance of 1 in 3,700.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: list[str] = []
        self._entries: list[np.ndarray[Any, Any]] = []
        self._num_held = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RepeatedIds:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete what was written."""
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, shard_id: str, ids: pa.ChunkedArray, rows: np.ndarray[Any, Any]) -> None:
        """Take the ids of a part, and the rows of its input that they are of."""
        entries = np.empty(len(rows), _ENTRY)
        entries["hash"], entries["row"] = hashes(ids), rows
        with self._lock:
            entries["part"] = len(self._parts)
            self._parts.append(shard_id)
            self._entries.append(entries)
            self._num_held += len(entries)
            if self._num_held > MAX_IN_MEMORY:
                self._spill()

    def warnings(self) -> list[str]:
        """Say how many ids occur more than once, and where one of them does; nothing if none does."""
        num_ids = num_rows = 0
        example = ""
        for entries in self._buckets():
            entries.sort(order=("hash", "part", "row"))
            _, starts, sizes = np.unique(entries["hash"], return_index=True, return_counts=True)
            num_ids += int((sizes > 1).sum())
            num_rows += int(sizes[sizes > 1].sum())
            if not example and (sizes > 1).any():
                first = starts[np.argmax(sizes > 1)]
                example = " and ".join(self._place(entry) for entry in entries[first : first + 2])
        if not num_ids:
            return []
        once = "1 id occurs" if num_ids == 1 else f"{num_ids:,} ids occur"
        return [f"{once} more than once, in {count(num_rows, 'row')}, such as {example}; all of them are kept"]

    def _place(self, entry: Any) -> str:
        return f"row {int(entry['row'])} in part-{self._parts[int(entry['part'])]}"

    def _buckets(self) -> Any:
        """Yield all entries, those of one hash together."""
        if self._folder is None:
            yield np.concatenate([np.empty(0, _ENTRY), *self._entries])
            return
        self._spill()
        for path in sorted(Path(self._folder.name).iterdir()):
            yield np.fromfile(path, _ENTRY)

    def _spill(self) -> None:
        """Write what is held to a file for each bucket."""
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="engine-ids-")
        entries = np.concatenate([np.empty(0, _ENTRY), *self._entries])
        self._entries, self._num_held = [], 0
        buckets = (entries["hash"] >> np.uint64(56)).astype(np.uint16)
        order = np.argsort(buckets, kind="stable")
        ends = np.searchsorted(buckets[order], np.arange(BUCKETS), side="right")
        start = 0
        for bucket, end in enumerate(ends):
            if end > start:
                with Path(self._folder.name, f"{bucket:03}").open("ab") as file:
                    file.write(entries[order[start:end]].tobytes())
            start = end
