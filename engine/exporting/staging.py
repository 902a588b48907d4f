"""
Staging: the folder beside an export in which it is made, and the one process that may.

    vectors.npy                 the export's name: whole, or not there
    vectors.npy.partial/        while it is made, and after a kill until it is made again
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.errors import EngineError, Refused
from engine.schema import canonical_json
from engine.storage import sync_folder

SUFFIX = ".partial"
_PROGRESS = "progress.json"


class Staging:
    """
    A folder that this process alone works in, and what it has done there so far.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Return where a file of that name is made."""
        return self.folder / name

    def progress(self) -> dict[str, Any]:
        """Return what was noted last; empty if nothing was."""
        try:
            return dict(json.loads(self.path(_PROGRESS).read_bytes()))
        except (FileNotFoundError, ValueError):
            return {}

    def note(self, **progress: Any) -> None:
        """Note what is done, whole and durable, in the place of what was noted before."""
        new = self.path(f"{_PROGRESS}.new")
        with new.open("wb") as file:
            file.write(canonical_json(progress).encode())
            sync(file)
        new.rename(self.path(_PROGRESS))
        sync_folder(self.folder)

    def clear(self) -> None:
        """Delete all that was made, what is noted first."""
        for path in (self.path(_PROGRESS), *self.folder.iterdir()):
            with suppress(FileNotFoundError):
                path.unlink()


@contextmanager
def staging(target: Path) -> Iterator[Staging]:
    """
    Be the one process that makes `target`. What is noted then is kept until `target` is made; afterwards the folder is gone, as
    it is after an error before there was anything to keep.

    Raises:
        Refused: If another process is making it.
        EngineError: If the disk does not let us; says what to do.
    """
    folder = target.with_name(target.name + SUFFIX)
    with explained(target):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(descriptor, folder, target)
            made = Staging(folder)
            try:
                yield made
            except BaseException:
                with suppress(OSError):  # what is to be gone on with is in it
                    folder.rmdir()
                raise
            made.clear()
            folder.rmdir()
        finally:
            os.close(descriptor)


def _lock(descriptor: int, folder: Path, target: Path) -> None:
    """Lock a folder until this process ends; the kernel takes the lock from the dead."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = folder.exists() and folder.stat().st_ino == os.fstat(descriptor).st_ino
    except BlockingIOError:
        is_there = False
    if not is_there:
        raise Refused(
            f"{target} is being made by another process: wait until it has ended, then run the same command again"
        )


def sync(file: Any) -> None:
    """Make what was written to an open file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn an OSError about `target` into one message that says what to do."""
    try:
        yield
    except OSError as error:
        raise EngineError(
            f"cannot write {target} ({error.strerror or type(error).__name__}): see that its disk has room and may be written to, "
            "then run the same command again; it goes on where it was"
        ) from None
