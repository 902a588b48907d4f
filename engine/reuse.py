"""
The index of former vectors: in which part, and in which row of it, the vector of a text is stored already.

    OUT/_engine/reuse/<digest>/index.json           which parts it is of, and how their vectors are stored: written last
    OUT/_engine/reuse/<digest>/<bits>-<bucket>      entries of the hashes that begin alike, in order

The driver builds it before the stream, from the column of hashes of each part, and actors map it (`engine.former_vectors`). The digest is
of the parts, so that a resume finds it. It is a hint: of a row that it names, the part's own hash is looked at before its vector is taken,
so nothing in the output depends on it, and it may be deleted at any time.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import CorruptOutput
from engine.ledger import Ledger, part_name
from engine.quantization import VectorFormat
from engine.schema import TEXT_HASH, canonical_json, content_hash
from engine.storage import Storage
from engine.text_hashes import Numbers, numbers_of

logger = logging.getLogger(__name__)

FOLDER = "_engine/reuse"
MANIFEST = "index.json"
ENTRY = np.dtype([("first", "<u8"), ("last", "<u8"), ("part", "<u4"), ("row", "<u4")])
"""Both halves of a hash, the part's number among the candidates, and the row in it."""
BUCKET_ROWS = 1 << 18
"""Entries in a bucket, about: it is sorted in memory."""
SCATTERED_ROWS = 1 << 18
"""Entries that are held back before they go to the buckets' files."""
MAX_BITS = 12
"""Of a hash, that choose its bucket."""
MAX_SAME = 8
"""Parts that are remembered for one hash: a text that is in all parts needs no more."""
READ_THREADS = 8
PARTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Candidates:
    """Parts of one output, from which vectors may be taken."""

    ledger: Ledger
    shard_ids: tuple[str, ...]
    shard_rows: int
    """About how many rows each has."""


@dataclass(frozen=True, slots=True)
class ReuseIndex:
    """Where an index is. It travels to the actors, so it is small."""

    storage: Storage
    """Of the output that is made."""
    digest: str
    vectors: VectorFormat
    """How the vectors are stored that it leads to."""
    slug: str = ""
    """Of the custom model that they are of."""
    has_chunks: bool = False
    """Whether each chunk of a text has a row."""

    @property
    def folder(self) -> str:
        """Where its files are, below the output."""
        return f"{FOLDER}/{self.digest}"

    def manifest(self) -> Manifest:
        """
        Return what it is of.

        Raises:
            FileNotFoundError: If it is not built, or was deleted.
            CorruptOutput: If it cannot be read.
        """
        name = f"{self.folder}/{MANIFEST}"
        try:
            return Manifest(**json.loads(self.storage.read(name)))
        except (ValueError, TypeError) as error:
            raise CorruptOutput(
                f"{self.storage.root}/{name} cannot be read ({type(error).__name__}): delete its folder, and the next run makes it again"
            ) from None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index is of."""

    bits: int
    """Of a hash, that choose its bucket."""
    buckets: list[int]
    """That have entries."""
    outputs: list[str]
    """Where they are; the first is empty, and stands for the output that has the index."""
    parts: list[list[Any]]
    """By number, each as the number of its output and the id of its shard."""


def bucket_name(folder: str, bits: int, bucket: int) -> str:
    """Return the name of a bucket's file."""
    return f"{folder}/{bits:02}-{bucket:04x}"


def bucket_of(first: npt.NDArray[np.uint64], bits: int) -> npt.NDArray[np.int64]:
    """Return the bucket of each hash, by the first halves of the hashes."""
    if not bits:
        return np.zeros(len(first), np.int64)
    return (first >> np.uint64(64 - bits)).astype(np.int64)


def build(storage: Storage, candidates: Sequence[Candidates], vectors: VectorFormat, slug: str = "") -> ReuseIndex:
    """
    Build the index of some parts, or find it built.

    Memory holds the hashes of a few parts and one bucket, however many rows there are. A part that cannot be read is left out.

    Args:
        storage: Of the output that is made, and that has the index.
        candidates: The parts.
        vectors: How their vectors are stored.
        slug: Of the custom model that they are of.
    """
    parts = [
        (place.ledger, shard_id)
        for place in sorted(candidates, key=lambda place: _location(place, storage))
        for shard_id in sorted(place.shard_ids)
    ]
    outputs = sorted({"", *(_location(place, storage) for place in candidates)})
    named = [[outputs.index("" if of.root == storage.root else of.root), shard_id] for of, shard_id in parts]
    index = ReuseIndex(storage, content_hash(canonical_json([outputs, named])), vectors, slug)
    if _is_built(index):
        logger.info("reuse: the index of %d former parts is there", len(parts))
        return index
    num_rows = sum(len(place.shard_ids) * place.shard_rows for place in candidates)
    bits = min(MAX_BITS, max(0, math.ceil(math.log2(max(num_rows, 1) / BUCKET_ROWS))))
    logger.info("reuse: building the index of %d former parts", len(parts))
    with tempfile.TemporaryDirectory(prefix="engine-reuse-") as folder:
        scatter = _Scatter(Path(folder), bits)
        for number, hashes in _hashes(parts):
            scatter.add(number, hashes)
        buckets = scatter.buckets()
        for bucket in buckets:
            storage.create(bucket_name(index.folder, bits, bucket), _as_bytes(_sorted(scatter.read(bucket))))
    manifest = {"bits": bits, "buckets": buckets, "outputs": outputs, "parts": named}
    storage.create(f"{index.folder}/{MANIFEST}", (canonical_json(manifest) + "\n").encode())
    return index


def _location(place: Candidates, storage: Storage) -> str:
    """Return where an output is; nothing if it is the one that is made: it may be moved, and its index with it."""
    return "" if place.ledger.root == storage.root else place.ledger.root


def _is_built(index: ReuseIndex) -> bool:
    """Say whether an index is there, with all its files."""
    names = set(index.storage.names(index.folder))
    if MANIFEST not in names:
        return False
    try:
        manifest = index.manifest()
    except (CorruptOutput, FileNotFoundError):
        index.storage.delete(f"{index.folder}/{MANIFEST}")
        return False
    return all(bucket_name("", manifest.bits, bucket)[1:] in names for bucket in manifest.buckets)


def _hashes(parts: Sequence[tuple[Ledger, str]]) -> Iterator[tuple[int, Numbers]]:
    """Yield the number of each part that can be read, and its hashes."""

    def read(part: tuple[Ledger, str]) -> Numbers | None:
        ledger, shard_id = part
        try:
            with (
                ledger.open_part(shard_id) as file,
                pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as parquet,
            ):
                return numbers_of(parquet.read([TEXT_HASH]).column(0))
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            logger.warning(
                "%s/%s cannot be read (%s): its vectors are not reused",
                ledger.root,
                part_name(shard_id),
                type(error).__name__,
            )
            return None

    with ThreadPoolExecutor(READ_THREADS) as pool:
        for start in range(0, len(parts), PARTS_AT_ONCE):
            for number, hashes in enumerate(pool.map(read, parts[start : start + PARTS_AT_ONCE]), start):
                if hashes is not None:
                    yield number, hashes


class _Scatter:
    """Entries on their way into the files of their buckets."""

    def __init__(self, folder: Path, bits: int) -> None:
        self._folder = folder
        self._bits = bits
        self._waiting: list[npt.NDArray[Any]] = []
        self._num_waiting = 0

    def add(self, part: int, hashes: Numbers) -> None:
        """Add a part's hashes, each once: a text that is in all rows fills no bucket."""
        entries = np.empty(len(hashes), ENTRY)
        entries["first"], entries["last"] = hashes.T
        entries["part"], entries["row"] = part, np.arange(len(hashes))
        entries = entries[_order(entries, then="row")]
        self._waiting.append(entries[_places_among_same(entries) == 0])
        self._num_waiting += len(self._waiting[-1])
        if self._num_waiting >= SCATTERED_ROWS:
            self._flush()

    def buckets(self) -> list[int]:
        """Write what waits, and return the buckets that have entries."""
        self._flush()
        return sorted(int(path.name) for path in self._folder.iterdir())

    def read(self, bucket: int) -> npt.NDArray[Any]:
        """Return the entries of a bucket, in any order."""
        return np.fromfile(self._folder / str(bucket), ENTRY)

    def _flush(self) -> None:
        if not self._num_waiting:
            return
        entries = np.concatenate(self._waiting)
        self._waiting, self._num_waiting = [], 0
        buckets = bucket_of(entries["first"], self._bits)
        order = np.argsort(buckets, kind="stable")
        entries, buckets = entries[order], buckets[order]
        firsts = np.flatnonzero(np.diff(buckets, prepend=-1))
        for start, stop in zip(firsts, [*firsts[1:], len(entries)], strict=True):
            with (self._folder / str(buckets[start])).open("ab") as file:
                file.write(entries[start:stop].tobytes())


def _sorted(entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return entries by hash and part, no more than `MAX_SAME` of one hash."""
    entries = entries[_order(entries, then="part")]
    return entries[_places_among_same(entries) < MAX_SAME]


def _order(entries: npt.NDArray[Any], *, then: str) -> npt.NDArray[np.int64]:
    """Return the order of entries by hash, and those of one hash by another field."""
    first = np.ascontiguousarray(entries["first"])
    order: npt.NDArray[np.int64] = np.argsort(first)
    if (np.diff(first[order]) == 0).any():  # sorting by three keys takes ten times as long, and is seldom needed
        return np.lexsort((entries[then], entries["last"], entries["first"]))
    return order


def _places_among_same(entries: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the number of each entry, from 0, among those with the same hash, which lie together."""
    places = np.arange(len(entries))
    if not len(entries):
        return places
    is_new = np.ones(len(entries), bool)
    is_new[1:] = (entries["first"][1:] != entries["first"][:-1]) | (entries["last"][1:] != entries["last"][:-1])
    return places - np.maximum.accumulate(np.where(is_new, places, 0))


def _as_bytes(entries: npt.NDArray[Any]) -> bytes:
    """Return a bucket as it is stored: column by column, since only what lies side by side can be searched where it is."""
    return b"".join(np.ascontiguousarray(entries[name]).tobytes() for name in ENTRY.names or ())
