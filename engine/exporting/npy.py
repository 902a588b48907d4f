"""One `.npy` file: all vectors as one array, as they are stored, which numpy can map."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from engine.exporting.staging import sync
from engine.schema import EMBEDDING
from engine.snapshot import numbers_of

if TYPE_CHECKING:
    from pathlib import Path

    from engine.exporting.staging import Staging
    from engine.snapshot import Snapshot

CHECKPOINT_BYTES = 1 << 28
"""That a kill makes it write again."""


def write(snapshot: Snapshot, staging: Staging, path: Path, plan: str) -> None:
    """
    Write the array to `path`, from where a killed process had come to. In memory is one batch.

    Args:
        snapshot: Of the output.
        staging: Where what is done is noted: rows that are on the disk.
        path: In the staging folder.
        plan: What is being made; noted beside.
    """
    header = _header(snapshot)
    row_bytes = snapshot.width * snapshot.dtype.itemsize
    done, unsynced = int(staging.progress().get("rows", 0)), 0
    if not path.exists() or path.stat().st_size < len(header) + done * row_bytes:
        done = 0
    with path.open("r+b" if done else "wb") as file:
        if not done:
            file.write(header)
        file.seek(len(header) + done * row_bytes)
        file.truncate()
        for batch in snapshot.batches([EMBEDDING], from_row=done):
            numbers = np.ascontiguousarray(numbers_of(batch))
            file.write(numbers.data)
            done += batch.num_rows
            unsynced += numbers.nbytes
            if unsynced >= CHECKPOINT_BYTES:
                sync(file)
                staging.note(plan=plan, rows=done)
                unsynced = 0
        sync(file)
    staging.note(plan=plan, rows=done)


def num_rows(path: Path) -> int:
    """Return how many vectors are in a file, by its length as well as by its header."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        (num_rows, width), _, dtype = np.lib.format.read_array_header_1_0(file)
        return num_rows if path.stat().st_size == file.tell() + num_rows * width * dtype.itemsize else -1


def _header(snapshot: Snapshot) -> bytes:
    """Return numpy's header of an array of all rows, whose length makes the numbers lie aligned."""
    file = io.BytesIO()
    shape = (snapshot.num_rows, snapshot.width)
    described = {"descr": np.lib.format.dtype_to_descr(snapshot.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()
