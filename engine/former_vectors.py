"""
Former vectors: of texts, those that have a vector in another part already, taken from there as they are stored.

An actor's side of `engine.reuse`. Nothing that is gone or damaged is an error here: its texts go through the model again.
"""

from __future__ import annotations

import io
import logging
import shutil
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.errors import CorruptOutput
from engine.ledger import Ledger
from engine.models.embeddings import Chunks, Ints
from engine.quantization import from_arrow
from engine.reuse import ENTRY, Manifest, ReuseIndex, bucket_name, bucket_of
from engine.schema import CHUNK_END, CHUNK_INDEX, CHUNK_START, EMBEDDING, TEXT_HASH
from engine.storage import open_storage
from engine.stored_vectors import Found, StoredVectors
from engine.text_hashes import Numbers, numbers_of

logger = logging.getLogger(__name__)

MAX_PARTS = 4
MAX_BYTES = 256 * 1024**2
"""Of parts that an actor keeps: as many as that, but one in any case."""

COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Entries:
    """Places of the vectors of some texts: of one text there may be several."""

    text: Ints
    part: Ints
    row: Ints

    @property
    def keys(self) -> Ints:
        """A number for each pair of a text and a part."""
        return self.text << 32 | self.part

    def taken(self, chosen: npt.NDArray[Any]) -> _Entries:
        """Return some of them."""
        return _Entries(self.text[chosen], self.part[chosen], self.row[chosen])

    def one_each(self) -> _Entries:
        """Choose one place for each text: in the part that has the most of them, so that few parts are opened."""
        weight = np.bincount(self.part)[self.part]
        order = np.lexsort((self.part, -weight, self.text))
        return self.taken(order[np.flatnonzero(np.diff(self.text[order], prepend=-1))])


@dataclass(frozen=True, slots=True)
class _Part:
    """What is kept of a part."""

    hashes: Numbers
    """Of its rows: a text has a row, or one for each of its chunks."""
    stored: StoredVectors

    @classmethod
    def of(cls, table: pa.Table, *, has_chunks: bool) -> _Part:
        """Take it from a part's table."""
        chunks = None
        if has_chunks and table.num_rows:
            columns = (CHUNK_INDEX, CHUNK_START, CHUNK_END)
            indices, starts, stops = (np.asarray(table.column(name), np.int64) for name in columns)
            firsts = np.flatnonzero(indices == 0)
            chunks = Chunks(np.diff(firsts, append=len(indices)), starts, stops)
        stored = StoredVectors(from_arrow(table.column(EMBEDDING)), chunks)
        return cls(numbers_of(table.column(TEXT_HASH)), stored)

    def has(self, hashes: Numbers, rows: Ints) -> npt.NDArray[np.bool_]:
        """Say of each row whether a text with that hash begins there."""
        is_there = rows < len(self.hashes)
        is_there[is_there] = (self.hashes[rows[is_there]] == hashes[is_there]).all(axis=1)
        chunks = self.stored.chunks
        return is_there if chunks is None else is_there & np.isin(rows, chunks.firsts[:-1])

    def taken(self, rows: Ints) -> StoredVectors:
        """Return the vectors of the texts that begin in those rows."""
        chunks = self.stored.chunks
        return self.stored.taken(rows if chunks is None else np.searchsorted(chunks.firsts, rows))


class FormerVectors:
    """
    The vectors that an index leads to. Threads may share it.

    Args:
        index: As the driver built it.
    """

    def __init__(self, index: ReuseIndex) -> None:
        self.vectors = index.vectors
        self.has_chunks = index.has_chunks
        self._index = index
        self._lock = Lock()
        self._manifest = self._read_manifest()
        self._ledgers: dict[int, Ledger] = {}
        self._buckets: dict[int, dict[str, npt.NDArray[Any]]] = {}
        self._parts: OrderedDict[int, _Part] = OrderedDict()
        self._bad: set[int] = set()

    @classmethod
    def of_model(cls, index: ReuseIndex | None, dtype: str, scale: float | None, slug: str) -> FormerVectors | None:
        """Open an index, if the vectors that it leads to are what the model makes, stored as it is asked for."""
        if index is None:
            return None
        if (index.vectors.dtype, index.vectors.scale, index.slug) != (dtype, scale, slug):
            logger.warning("the model is another version than the one of the former vectors: none is reused")
            return None
        return cls(index)

    def find(self, hashes: Numbers) -> Found:
        """Return the vectors of the texts that have one already, by the hashes of all."""
        if self._manifest is None or not len(hashes):
            return Found.nothing(len(hashes))
        with self._lock:
            entries = self._entries(hashes, self._manifest)
            is_there = np.zeros(len(hashes), bool)
            texts: list[Ints] = []
            stored: list[StoredVectors] = []
            while len(entries.text):
                chosen = entries.one_each()
                for number in np.unique(chosen.part).tolist():
                    part, here = self._part(number), chosen.taken(chosen.part == number)
                    if part is None:
                        continue
                    here = here.taken(part.has(hashes[here.text], here.row))
                    if not len(here.text):
                        continue
                    texts.append(here.text)
                    stored.append(part.taken(here.row))
                    is_there[here.text] = True
                # What is in a bad part may be in another one as well.
                is_tried = np.isin(entries.keys, chosen.keys) | np.isin(entries.part, [*self._bad])
                entries = entries.taken(~is_there[entries.text] & ~is_tried)
        if not stored:
            return Found.nothing(len(hashes))
        return Found(is_there, StoredVectors.joined(stored).taken(np.argsort(np.concatenate(texts))))

    def knows(self, hashes: Numbers) -> npt.NDArray[np.bool_]:
        """Say which texts the index has a place for, without a look at the parts: shape (texts,)."""
        is_there = np.zeros(len(hashes), bool)
        if self._manifest is not None:
            with self._lock:
                is_there[self._entries(hashes, self._manifest).text] = True
        return is_there

    def _part(self, number: int) -> _Part | None:
        """Return what is kept of a part; None if it is gone or damaged."""
        if number in self._parts:
            self._parts.move_to_end(number)
            return self._parts[number]
        if number in self._bad or self._manifest is None:
            return None
        output, shard_id = self._manifest.parts[number]
        part, problem = None, f"the part of shard {shard_id} has vectors of another kind than its output"
        try:
            part = self._ledger(output, self._manifest).part(shard_id, former=True)
        except CorruptOutput as error:
            problem = error.message
        if part is None or part.vectors != self._index.vectors:
            logger.warning("%s: its vectors are not reused", problem)
            self._bad.add(number)
            return None
        self._parts[number] = _Part.of(part.table, has_chunks=self.has_chunks)
        while len(self._parts) > 1 and (len(self._parts) > MAX_PARTS or self._num_bytes() > MAX_BYTES):
            self._parts.popitem(last=False)
        return self._parts[number]

    def _num_bytes(self) -> int:
        return sum(part.stored.rows.nbytes for part in self._parts.values())

    def _ledger(self, output: int, manifest: Manifest) -> Ledger:
        if output not in self._ledgers:
            location = manifest.outputs[output]
            self._ledgers[output] = Ledger(open_storage(location) if location else self._index.storage)
        return self._ledgers[output]

    def _entries(self, hashes: Numbers, manifest: Manifest) -> _Entries:
        """Look hashes up."""
        found = [np.empty((3, 0), np.int64)]
        buckets = bucket_of(hashes[:, 0], manifest.bits)
        for bucket in np.intersect1d(buckets, manifest.buckets).tolist():
            texts = np.flatnonzero(buckets == bucket)
            columns = self._bucket(bucket, manifest)
            first = hashes[texts, 0]
            start = np.searchsorted(columns["first"], first, "left")
            num = np.searchsorted(columns["first"], first, "right") - start
            text = np.repeat(texts, num)
            at = np.repeat(start, num) + np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
            is_same = (columns["last"][at] == hashes[text, 1]) & (columns["part"][at] < len(manifest.parts))
            at, text = at[is_same], text[is_same]
            found.append(np.stack([text, columns["part"][at], columns["row"][at]]).astype(np.int64))
        return _Entries(*np.concatenate(found, axis=1))

    def _bucket(self, bucket: int, manifest: Manifest) -> dict[str, npt.NDArray[Any]]:
        """Return a bucket's columns, mapped; empty ones if it is gone or cut short."""
        if bucket not in self._buckets:
            name = bucket_name(self._index.folder, manifest.bits, bucket)
            try:
                data = self._mapped(name)
            except (FileNotFoundError, ValueError) as error:
                logger.warning(
                    "%s/%s cannot be read (%s): some texts are embedded again",
                    self._index.storage.root,
                    name,
                    type(error).__name__,
                )
                data = np.empty(0, np.uint8)
            self._buckets[bucket] = _columns(data)
        return self._buckets[bucket]

    def _mapped(self, name: str) -> npt.NDArray[np.uint8]:
        """Map a file of the output; one of an object store is copied to a temporary file first, piece by piece."""
        with self._index.storage.open(name) as file:
            try:
                file.fileno()
                return np.memmap(file, np.uint8, "r")
            except io.UnsupportedOperation:
                with tempfile.TemporaryFile(prefix="engine-reuse-") as copy:  # without a name: it goes with the actor
                    shutil.copyfileobj(file, copy, COPY_BYTES)
                    copy.flush()
                    return np.memmap(copy, np.uint8, "r")

    def _read_manifest(self) -> Manifest | None:
        try:
            return self._index.manifest()
        except FileNotFoundError:
            logger.warning("%s/%s is gone: no vector is reused", self._index.storage.root, self._index.folder)
        except CorruptOutput as error:
            logger.warning("%s; until then no vector is reused", error.message)
        return None


def _columns(data: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
    num_entries, over = divmod(len(data), ENTRY.itemsize)
    if over:
        logger.warning("a bucket of former vectors is cut short: some texts are embedded again")
        num_entries = 0
    columns, at = {}, 0
    for name in ENTRY.names or ():
        kind = ENTRY[name]
        columns[name] = data[at : at + num_entries * kind.itemsize].view(kind)
        at += num_entries * kind.itemsize
    return columns
