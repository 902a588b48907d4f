"""
Storage: create-if-absent, read, list, set aside, delete.

A commit needs one thing of a store: that of many writers of one name exactly one wins, and that what it wrote is whole the
moment its name exists. On a local disk that is `link(2)` of a synced staging file; on an object store one conditional put.
"""

from __future__ import annotations

import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from engine.buckets.place import is_bucket
from engine.disk import expanded, explained, kind_of
from engine.errors import ConfigError, EngineError
from engine.object_storage import ObjectStorage, name_is_taken, store_time

STAGING = "_engine/tmp"
STAGING_MAX_AGE_S = 24 * 3600
"""A staging file this old belongs to no live writer: writing one takes seconds."""


class Storage(Protocol):
    """Named bytes under one root. Names are relative, with forward slashes."""

    root: str

    def create(self, name: str, data: bytes) -> bool:
        """Create `name` with `data`, whole and durable, or return False and change nothing if it is there already."""

    def read(self, name: str) -> bytes:
        """Return the bytes of `name`; raise FileNotFoundError if it is not there."""

    def open(self, name: str) -> BinaryIO:
        """Open `name` to read pieces of it, such as a footer; raise FileNotFoundError if it is not there."""

    def persist(self, name: str) -> None:
        """Make sure that `name`, which another writer created and may not have lived to sync, survives a power cut."""

    def sizes(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield the name below `folder`, and the size in bytes, of each file in it; nothing if there is no such folder."""

    def names(self, folder: str) -> Iterator[str]:
        """Yield what `sizes` yields, without the sizes: a listing costs one call for many files, a size one a file."""

    def ages(self, *, is_only_shown: bool = False) -> Iterator[tuple[str, int, float]]:
        """
        Yield the name, the size in bytes, and the age in seconds of each file below the root; nothing that links lead to.

        Ages are since a file was put where it is, by the clock of the store, which a file is made for: never by this machine's,
        unless they are only shown, and none can be made.
        """

    def rename(self, name: str, to: str) -> bool:
        """Move `name` to the unused name `to`; return False if `name` is gone. Raise EngineError if another file has that name."""

    def replace(self, name: str, data: bytes) -> None:
        """Put `data` under `name`, whole, whatever was there: for what may be lost, and is not part of a commit."""

    def delete(self, name: str) -> None:
        """Delete `name`, if it is there."""

    def probe(self) -> None:
        """Make sure that `create` holds here: raise Refused where a name can be created twice."""

    def collect_staging(self) -> int:
        """Delete what dead writers left behind; return how many files that was."""


class LocalStorage:
    """A folder on a local or network disk that has hard links."""

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).absolute())
        self._known: set[str] = set()

    def __reduce__(self) -> tuple[type[LocalStorage], tuple[str]]:
        return LocalStorage, (self.root,)

    def create(self, name: str, data: bytes) -> bool:
        """Create `name` with `data`, whole and durable, or return False and change nothing if it is there already."""
        final = self._path(name)
        with explained(self.root):
            if final.exists():
                return False
            self._folder(final.parent)
            staging = self._stage(data)
            try:
                os.link(staging, final)
            except FileExistsError:
                return False
            finally:
                staging.unlink(missing_ok=True)
            sync_folder(final.parent)
        return True

    def read(self, name: str) -> bytes:
        """Return the bytes of `name`; raise FileNotFoundError if it is not there."""
        with explained(self.root, "read"):
            return self._path(name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """Open `name` to read pieces of it, such as a footer; raise FileNotFoundError if it is not there."""
        with explained(self.root, "read"):
            return self._path(name).open("rb")

    def persist(self, name: str) -> None:
        """Make sure that `name`, which another writer created and may not have lived to sync, survives a power cut."""
        with explained(self.root):
            sync_folder(self._path(name).parent)

    def sizes(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield the name below `folder`, and the size in bytes, of each file in it; nothing if there is no such folder."""
        for entry in self._scan(folder):
            with suppress(FileNotFoundError):
                yield entry.name, entry.stat().st_size

    def names(self, folder: str) -> Iterator[str]:
        """Yield the name below `folder` of each file in it; nothing if there is no such folder."""
        for entry in self._scan(folder):
            yield entry.name

    def ages(self, *, is_only_shown: bool = False) -> Iterator[tuple[str, int, float]]:
        """Yield the name, the size in bytes, and the age in seconds by the disk's clock of each file below the root, behind no link."""
        now = store_time(self._now, or_here=is_only_shown)
        with explained(self.root, "list"):
            for folder, _, names in os.walk(self.root, onerror=_raise_unless_gone):
                below = "" if folder == self.root else f"{Path(folder).relative_to(self.root).as_posix()}/"
                for name in names:
                    with suppress(FileNotFoundError):
                        status = Path(folder, name).lstat()
                        if stat.S_ISREG(status.st_mode):
                            # A file that is moved keeps its time of change; that of its entry tells when it came.
                            yield f"{below}{name}", status.st_size, now - max(status.st_mtime, status.st_ctime)

    def rename(self, name: str, to: str) -> bool:
        """Move `name` to the unused name `to`; return False if `name` is gone. Raise EngineError if another file has that name."""
        source, target = self._path(name), self._path(to)
        with explained(self.root):
            self._folder(target.parent)
            try:
                if not target.exists():  # rename(2) would replace it
                    source.rename(target)
                elif source.samefile(target) or source.read_bytes() == target.read_bytes():
                    source.unlink()  # rename(2) would leave both names of one file
                else:
                    raise name_is_taken(self.root, to)
            except FileNotFoundError:
                return False
            sync_folder(target.parent)
            sync_folder(source.parent)
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Put `data` under `name`, whole, whatever was there: for what may be lost, and is not part of a commit."""
        with explained(self.root):
            self._folder(self._path(name).parent)
            staging = self._stage(data)
            try:
                staging.replace(self._path(name))
            finally:
                staging.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Delete `name`, if it is there."""
        with explained(self.root, "delete from"), suppress(FileNotFoundError):
            self._path(name).unlink()

    def probe(self) -> None:
        """Do nothing: no disk lets link(2) replace a name."""

    def collect_staging(self) -> int:
        """Delete what dead writers left behind; return how many files that was."""
        num_deleted = 0
        oldest = time.time() - STAGING_MAX_AGE_S
        for entry in self._scan(STAGING):
            with suppress(FileNotFoundError):
                if entry.stat().st_mtime < oldest:
                    Path(entry.path).unlink()
                    num_deleted += 1
        return num_deleted

    def _now(self) -> float:
        """Return the time by the clock that dates the files here: on a network disk, its server's."""
        with explained(self.root):
            probe = self._path(f"{STAGING}/{uuid.uuid4().hex}.clock")
            self._folder(probe.parent)
            try:
                probe.touch()  # no byte: even a full disk takes it, as a rule
                return probe.stat().st_mtime
            finally:
                probe.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return Path(self.root, name)

    def _scan(self, folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            with explained(self.root, "list"):
                entries = os.scandir(self._path(folder))
        except FileNotFoundError:
            return
        with entries:
            yield from (entry for entry in entries if entry.is_file(follow_symlinks=False))

    def _stage(self, data: bytes) -> Path:
        """Write and sync `data` under a name that no reader takes for a part."""
        staging = self._path(f"{STAGING}/{uuid.uuid4().hex}.staging")
        self._folder(staging.parent)
        try:
            with staging.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                staging.unlink()
            raise
        return staging

    def _folder(self, path: Path) -> None:
        """Make a folder and sync its parents, once per process: a file is only as durable as the names above it."""
        if str(path) in self._known and path.is_dir():
            return
        missing = [p for p in (path, *path.parents) if not p.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise EngineError(f"{path} is in the way: it must be a folder; move it, or use another output") from None
        for made in missing:
            sync_folder(made.parent)
        self._known.add(str(path))


def open_storage(location: str, *, is_single_writer: bool = False) -> Storage:
    """
    Open the store that an output's location names.

    Args:
        location: A folder, or a place in a bucket.
        is_single_writer: Do without conditional puts on an object store that has none.

    Raises:
        ConfigError: If no store of that kind is known.
    """
    if is_bucket(location):
        return ObjectStorage(location, is_single_writer=is_single_writer)
    scheme, separator, _ = location.partition("://")
    if separator and scheme != "file":
        raise ConfigError(
            f"output {scheme}://: only folders and object stores (s3://, gs://, az://) can be written to; give one of these"
        )
    path = expanded(location)
    if kind_of(path) not in (None, "folder"):
        raise ConfigError(f"output {location!r} is a file; give a folder")
    return LocalStorage(str(path))


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
