"""
Exchanging files of a folder: some come in and some go out, at one instant where the system can do that.

On Linux's own file systems: a second folder is made of hard links, as the first one is to be, and the two trade names in one call
(renameat2 with RENAME_EXCHANGE). Who lists the folder sees all of the change, or nothing of it. Elsewhere (object stores, NFS, other
systems) files come in one by one, and then the others go out one by one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from engine.places import is_there
from engine.storage import LocalStorage, Storage, sync_folder

STAGES = "_engine/switching"
GRACE_S = 2.0
"""For which the folder as it was is kept after the exchange: who had begun to list it ends."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange(storage: Storage, folder: str, *, add: Mapping[str, str], drop: Mapping[str, str]) -> None:
    """
    Bring files into a folder and take others out of it. A process may die anywhere in it, and the same call ends its work.

    Args:
        storage: What the folder is in.
        folder: Its name.
        add: The name of each file that comes in, and where it lies until then.
        drop: The name of each file that goes out, and where it lies from then on.
    """
    if isinstance(storage, LocalStorage):
        _Folder(storage, folder).exchange(add, drop)
    for name, origin in add.items():
        if is_there(storage, f"{folder}/{name}"):
            storage.delete(origin)
        else:
            storage.rename(origin, f"{folder}/{name}")
    for name, to in drop.items():
        storage.rename(f"{folder}/{name}", to)


class _Folder:
    """A folder on a disk."""

    def __init__(self, storage: LocalStorage, folder: str) -> None:
        self._storage = storage
        self._path = Path(storage.root, folder)
        self._stages = Path(storage.root, STAGES)

    def exchange(self, add: Mapping[str, str], drop: Mapping[str, str]) -> None:
        """Do it at one instant, if the disk can, and put away what a dead process left."""
        there = {path.name for path in self._path.iterdir()} if self._path.is_dir() else set()
        if not (add.keys() <= there and there.isdisjoint(drop)) and not self._path.is_symlink():
            with suppress(OSError):  # it is done file by file then
                self._exchange(there, add, drop)
        if self._stages.is_dir():
            for stage in sorted(self._stages.iterdir()):
                self._put_away(stage, drop)
            with suppress(OSError):  # another process is at it
                self._stages.rmdir()

    def _exchange(self, there: set[str], add: Mapping[str, str], drop: Mapping[str, str]) -> None:
        stage = self._stages / uuid.uuid4().hex
        stage.mkdir(parents=True)
        for name in there - drop.keys():
            os.link(self._path / name, stage / name)
        for name in add.keys() - there:
            os.link(Path(self._storage.root, add[name]), stage / name)
        for name in drop.keys() & there:  # readers who began before look for it there
            self._link(self._path / name, drop[name])
        sync_folder(stage)
        _trade_names(stage, self._path)
        sync_folder(self._path.parent)
        sync_folder(self._stages)
        time.sleep(GRACE_S)

    def _put_away(self, stage: Path, drop: Mapping[str, str]) -> None:
        """Empty a folder that was exchanged, or that a dead process had begun to make: each file is where it belongs, or is brought there."""
        for path in stage.iterdir():
            self._link(path, drop.get(path.name, f"{self._path.name}/{path.name}"))
        shutil.rmtree(stage)

    def _link(self, path: Path, name: str) -> None:
        """Give a file a second name, unless there is one of that name: that is the same file then, or one as good."""
        to = Path(self._storage.root, name)
        to.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.link(path, to)


def _trade_names(one: Path, other: Path) -> None:
    """Let two folders trade their names in one step; raise OSError if the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        raise OSError("no renameat2")
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2")
