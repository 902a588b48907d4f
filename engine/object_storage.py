"""An output in an object store: a commit is one conditional put, and nothing is staged."""

from __future__ import annotations

import io
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import BinaryIO, cast

from engine.buckets.bucket import Bucket, Found
from engine.buckets.place import place_of
from engine.buckets.ranged_file import RangedFile
from engine.errors import EngineError, Refused

PROBES = "_engine/probe"
PROBE_MAX_AGE_S = 24 * 3600.0
READ_BUFFER_BYTES = 1024**2


class ObjectStorage:
    """
    A prefix of a bucket. It pickles, as a location: keys are found where it is opened.

    Args:
        location: Such as s3://bucket/out.
        is_single_writer: Do without conditional puts: a name is looked for and then put, which holds as long as nobody else writes.
    """

    def __init__(self, location: str, *, is_single_writer: bool = False) -> None:
        place = place_of(location)
        self.root = place.location
        self._place = place
        self._is_single_writer = is_single_writer

    def __reduce__(self) -> tuple[object, tuple[str, bool]]:
        return _reopened, (self.root, self._is_single_writer)

    def create(self, name: str, data: bytes) -> bool:
        """Create `name` with `data`, whole and durable, or return False and change nothing if it is there already."""
        if not self._is_single_writer:
            return self._bucket.create(self._key(name), data)
        if self._bucket.look(self._key(name)) is not None:
            return False
        self._bucket.replace(self._key(name), data)
        return True

    def read(self, name: str) -> bytes:
        """Return the bytes of `name`; raise FileNotFoundError if it is not there."""
        return self._bucket.read(self._key(name))

    def open(self, name: str) -> BinaryIO:
        """Open `name` to read pieces of it, such as a footer; raise FileNotFoundError if it is not there."""
        found = self._bucket.look(self._key(name))
        if found is None:
            raise FileNotFoundError(f"{self.root}/{name}")
        raw = RangedFile(self._bucket, found, lambda: FileNotFoundError(f"{self.root}/{name} was replaced or deleted"))
        return cast("BinaryIO", io.BufferedReader(raw, READ_BUFFER_BYTES))

    def persist(self, name: str) -> None:
        """Do nothing: what a store has answered for is durable."""

    def sizes(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield the name below `folder`, and the size in bytes, of each file in it; nothing if there is no such folder."""
        for name, found in self._below(folder):
            yield name, found.size

    def names(self, folder: str) -> Iterator[str]:
        """Yield what `sizes` yields, without the sizes."""
        for name, _ in self._below(folder):
            yield name

    def ages(self, *, is_only_shown: bool = False) -> Iterator[tuple[str, int, float]]:
        """Yield the name, the size in bytes, and the age in seconds by the store's clock of each file below the root."""
        now = store_time(self._now, or_here=is_only_shown)
        prefix = self._key("")
        for found in self._bucket.list(prefix):
            yield found.key.removeprefix(prefix), found.size, now - found.modified_at

    def rename(self, name: str, to: str) -> bool:
        """
        Move `name` to the unused name `to`; return False if `name` is gone.

        A copy, then a delete: whoever dies between them leaves both, and the next one deletes the first.

        Raises:
            EngineError: If another file has that name.
        """
        source = self._bucket.look(self._key(name))
        if source is None:
            return False
        try:
            data = self.read(name)
        except FileNotFoundError:
            return False
        if not self.create(to, data) and self.read(to) != data:
            raise name_is_taken(self.root, to)
        if self._bucket.look(self._key(name)) == source:  # what another run made anew meanwhile stays
            self.delete(name)
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Put `data` under `name`, whole, whatever was there: for what may be lost, and is not part of a commit."""
        self._bucket.replace(self._key(name), data)

    def delete(self, name: str) -> None:
        """Delete `name`, if it is there."""
        self._bucket.delete(self._key(name))

    def probe(self) -> None:
        """
        Make sure that the store refuses to create a name a second time.

        Raises:
            Refused: If it does not.
        """
        if self._is_single_writer:
            return
        name = f"{PROBES}/{uuid.uuid4().hex}"
        holds = self._holds(name)
        self.delete(name)
        if not holds:
            raise Refused(
                f"{self.root}: the store overwrites an object where it should refuse to (PUT with If-None-Match), so two writers "
                "could destroy each other's work. Use a store that refuses (S3, MinIO, R2, GCS, Azure), or "
                "--unsafe-single-writer if only one run will ever write there at a time; nothing was touched"
            )

    def collect_staging(self) -> int:
        """Delete probes that nobody took away; nothing else is ever left: each object is put whole by one request."""
        there = list(self._below(PROBES))
        oldest = self._now() - PROBE_MAX_AGE_S if there else 0.0
        old = [name for name, found in there if found.modified_at < oldest]
        for name in old:
            self.delete(f"{PROBES}/{name}")
        return len(old)

    def _now(self) -> float:
        """Return the time by the store's clock: when it says that a new object came."""
        probe = self._key(f"{PROBES}/{uuid.uuid4().hex}")
        self._bucket.replace(probe, b"1")
        try:
            found = self._bucket.look(probe)
            return found.modified_at if found else time.time()
        finally:
            self._bucket.delete(probe)

    @cached_property
    def _bucket(self) -> Bucket:
        return Bucket(self._place)

    def _holds(self, name: str) -> bool:
        return self.create(name, b"first") and not self.create(name, b"second") and self.read(name) == b"first"

    def _key(self, name: str) -> str:
        return f"{self._place.key}/{name}" if self._place.key else name

    def _below(self, folder: str) -> Iterator[tuple[str, Found]]:
        prefix = self._key(folder) + "/"
        for found in self._bucket.list(prefix):
            name = found.key.removeprefix(prefix)
            if "/" not in name:
                yield name, found


def store_time(ask: Callable[[], float], *, or_here: bool) -> float:
    """Return the time by the clock of a store, or this machine's, if that will do where nothing can be written to ask for it."""
    try:
        return ask()
    except EngineError:
        if not or_here:
            raise
        return time.time()


def name_is_taken(root: str, name: str) -> EngineError:
    """Return the error of a move to a name that another file has."""
    return EngineError(f"{root}/{name} is there already and is another file: nothing was moved")


def _reopened(location: str, is_single_writer: bool) -> ObjectStorage:
    return ObjectStorage(location, is_single_writer=is_single_writer)
