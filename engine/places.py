"""
The places of an output: under which names its files lie, and where a shard's part is now.

    OUT/data/part-<shard_id>.parquet        a part that readers see
    OUT/_engine/held/<shard_id>.part        a part that waits until it takes the place of others
    OUT/_engine/superseded/<shard_id>.*     part, record and rejects of a shard whose place others have taken
    OUT/_engine/superseded/<shard_id>-*     the same of one that has come back since, and was superseded again
    OUT/_engine/commits/<shard_id>.json     its record
    OUT/_engine/rejects/<shard_id>.jsonl    its rows that could not be embedded

A part goes from `held` to `data` to `superseded`, and is looked for in that order: it is never in none of them.
"""

from __future__ import annotations

from typing import BinaryIO

from engine.storage import Storage

DATA = "data"
HELD = "_engine/held"
SUPERSEDED = "_engine/superseded"
COMMITS = "_engine/commits"
REJECTS = "_engine/rejects"
SET_ASIDE = "_engine/set-aside"
JOB = "_engine/job.json"
VECTORS = "_engine/vectors.json"


def part_name(shard_id: str) -> str:
    """Return the name of a shard's part, where readers see it."""
    return f"{DATA}/part-{shard_id}.parquet"


def held_name(shard_id: str) -> str:
    """Return the name of a shard's part while it waits to take the place of others."""
    return f"{HELD}/{shard_id}.part"


def record_name(shard_id: str) -> str:
    """Return the name of a shard's commit record."""
    return f"{COMMITS}/{shard_id}.json"


def rejects_name(shard_id: str) -> str:
    """Return the name of a shard's rejects."""
    return f"{REJECTS}/{shard_id}.jsonl"


def former_name(shard_id: str, kind: str) -> str:
    """Return the name of a superseded shard's part, record or rejects; `kind` is part, json or jsonl."""
    return f"{SUPERSEDED}/{shard_id}.{kind}"


def seen_ids(storage: Storage) -> set[str]:
    """Return the shard ids of the parts that readers see: one listing, no file is opened."""
    names = storage.names(DATA)
    return {name[5:-8] for name in names if name.startswith("part-") and name.endswith(".parquet")}


def held_ids(storage: Storage) -> set[str]:
    """Return the shard ids of the parts that wait: one listing, no file is opened."""
    return {name[:-5] for name in storage.names(HELD) if name.endswith(".part")}


def part_ids(storage: Storage) -> set[str]:
    """Return the shard ids of all parts, those that wait among them."""
    held = held_ids(storage)  # first: a part that goes from one place to the other meanwhile is seen in one of them
    return held | seen_ids(storage)


def part_sizes(storage: Storage) -> dict[str, int]:
    """Return the size in bytes of each part, by shard id; those that wait are among them."""
    held = {name[:-5]: size for name, size in storage.sizes(HELD) if name.endswith(".part")}
    found = storage.sizes(DATA)
    return held | {name[5:-8]: size for name, size in found if name.startswith("part-") and name.endswith(".parquet")}


def open_part(storage: Storage, shard_id: str) -> tuple[str, BinaryIO]:
    """
    Open a shard's part wherever it lies; one that others have superseded too, for who began to read before that.

    Returns:
        Its name, and its file.

    Raises:
        FileNotFoundError: If it lies nowhere.
    """
    for name in (*_names(shard_id), former_name(shard_id, "part")):
        try:
            return name, storage.open(name)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(part_name(shard_id))


def read_part(storage: Storage, shard_id: str, *, former: bool = False) -> tuple[str, bytes]:
    """
    Read a shard's part wherever it lies.

    Args:
        storage: Of the output.
        shard_id: Of the shard.
        former: Whether one will do that others have superseded.

    Returns:
        Its name, and its bytes.

    Raises:
        FileNotFoundError: If it lies nowhere.
    """
    for name in (*_names(shard_id), *((former_name(shard_id, "part"),) if former else ())):
        try:
            return name, storage.read(name)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(part_name(shard_id))


def _names(shard_id: str) -> tuple[str, str, str]:
    """Where a part may be; one that is moved while it is looked for is found at the second look."""
    return part_name(shard_id), held_name(shard_id), part_name(shard_id)


def is_there(storage: Storage, name: str) -> bool:
    """Say whether there is a file of that name."""
    try:
        storage.open(name).close()
    except FileNotFoundError:
        return False
    return True


def differ(storage: Storage, name: str, other: str) -> bool:
    """Say whether two files are both there, and are not the same bytes."""
    try:
        return storage.read(name) != storage.read(other)
    except FileNotFoundError:
        return False
