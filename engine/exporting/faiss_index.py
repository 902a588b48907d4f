"""
One FAISS index: all vectors, added in order, so that a number that a search returns is a row of the ids beside it.

Similarity is the inner product: the cosine, if the model's vectors are of length 1. FAISS keeps an index in memory, whole; beside
it are one batch, and the sample that an index is trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from engine.errors import ConfigError
from engine.exporting.staging import sync
from engine.part import vectors_of
from engine.schema import EMBEDDING
from engine.snapshot import numbers_of

if TYPE_CHECKING:
    from pathlib import Path

    from engine.exporting.staging import Staging
    from engine.snapshot import Snapshot

FLAT = "Flat"
CHECKPOINT_S = 60.0
"""Seconds of work that a kill makes it do again, or twenty times what writing the index took, if that is more."""
MAX_CHECKPOINT_SHARE = 20
TRAIN_ROWS = 1 << 16
"""256 for each of the 256 centroids of a product quantizer: more FAISS does not look at."""
TRAIN_ROWS_PER_LIST = 64
FAISS_MISSING = "exporting to FAISS needs faiss: pip install 'embedding-engine[export]'"


def write(snapshot: Snapshot, staging: Staging, path: Path, plan: str, factory: str) -> None:
    """
    Write the index to `path`, from where a killed process had come to: what is stored of an index says how many rows are in it.

    Args:
        snapshot: Of the output.
        staging: Where what is being made is noted.
        path: In the staging folder.
        plan: What is being made.
        factory: FAISS's description of an index, such as `Flat`, `HNSW32` or `IVF4096,PQ48`.

    Raises:
        ConfigError: If there is no such index of these vectors, or too few of them to train it.
    """
    kind = _kind_of(snapshot)
    staging.note(plan=plan)
    index = _stored(kind, path)
    if index is None:
        index = _trained(kind, snapshot, factory)
        _save(kind, index, path)
    saved, took = time.monotonic(), 0.0
    for batch in snapshot.stored([EMBEDDING], from_row=index.ntotal):
        index.add(kind.numbers(batch))
        if time.monotonic() - saved >= max(CHECKPOINT_S, MAX_CHECKPOINT_SHARE * took):
            took = _save(kind, index, path)
            saved = time.monotonic()
    _save(kind, index, path)


def num_rows(path: Path) -> int:
    """Return how many vectors are in an index."""
    faiss = _faiss()
    for read in (faiss.read_index, faiss.read_index_binary):
        try:
            return int(read(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY).ntotal)
        except RuntimeError:
            continue
    return -1


@dataclass(frozen=True, slots=True)
class _Kind:
    """How FAISS takes vectors: as float32, or as bits."""

    make: Callable[[str], Any]
    read: Callable[[str], Any]
    write: Callable[[Any, str], None]
    numbers: Callable[[pa.RecordBatch], np.ndarray[Any, Any]]


def _kind_of(snapshot: Snapshot) -> _Kind:
    faiss = _faiss()
    if snapshot.dtype == np.uint8:
        bits = snapshot.width * 8
        return _Kind(
            make=lambda factory: faiss.index_binary_factory(bits, "BFlat" if factory == FLAT else factory),
            read=faiss.read_index_binary,
            write=faiss.write_index_binary,
            numbers=lambda batch: np.ascontiguousarray(numbers_of(batch)),
        )
    return _Kind(
        make=lambda factory: faiss.index_factory(snapshot.width, factory, faiss.METRIC_INNER_PRODUCT),
        read=faiss.read_index,
        write=faiss.write_index,
        numbers=lambda batch: np.ascontiguousarray(vectors_of(pa.Table.from_batches([batch])), np.float32),
    )


def _stored(kind: _Kind, path: Path) -> Any:
    """Return the index that a killed process has left, or None."""
    if not path.exists():
        return None
    try:
        return kind.read(str(path))
    except RuntimeError:
        return None


def _trained(kind: _Kind, snapshot: Snapshot, factory: str) -> Any:
    """Make an empty index, trained on a sample of the rows if it is one that is trained: the same sample each time."""
    try:
        index = kind.make(factory)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            f"--index {factory!r}: FAISS knows no such index of {snapshot.width} numbers a vector"
        ) from None
    if index.is_trained or not snapshot.num_rows:
        return index
    sample = _sample(kind, snapshot, max(TRAIN_ROWS, TRAIN_ROWS_PER_LIST * _num_lists(index)))
    try:
        index.train(sample)
    except RuntimeError:
        raise ConfigError(
            f"--index {factory!r} cannot be trained on {len(sample):,} vectors: choose one of fewer centroids, or Flat"
        ) from None
    return index


def _sample(kind: _Kind, snapshot: Snapshot, num_rows: int) -> np.ndarray[Any, Any]:
    total = snapshot.num_rows
    chosen = np.sort(np.random.default_rng(0).choice(total, min(num_rows, total), replace=False))
    found, start = [], 0
    for batch in snapshot.stored([EMBEDDING]):
        here = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, start + batch.num_rows)] - start
        if len(here):
            found.append(kind.numbers(batch)[here])
        start += batch.num_rows
    return np.concatenate(found)


def _num_lists(index: Any) -> int:
    """Return how many lists an inverted file has; 0 for other indexes."""
    try:
        return int(_faiss().extract_index_ivf(index).nlist)
    except (RuntimeError, TypeError):
        return int(getattr(index, "nlist", 0))


def _save(kind: _Kind, index: Any, path: Path) -> float:
    """Put the index in its place in the staging folder, whole; return the seconds that it took."""
    started = time.monotonic()
    new = path.with_name(f"{path.name}.new")
    kind.write(index, str(new))
    with new.open("rb") as file:
        sync(file)
    new.rename(path)
    return time.monotonic() - started


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError(FAISS_MISSING) from None
    return faiss
