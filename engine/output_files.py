"""The files of an output besides its results: in which folders they lie, and what their names say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.costs import COSTS
from engine.exchange import STAGES
from engine.lease import LEASE
from engine.object_storage import PROBES
from engine.places import (
    COMMITS,
    HELD,
    SET_ASIDE,
    SUPERSEDED,
    held_name,
    part_name,
    record_name,
    rejects_name,
)
from engine.reuse import FOLDER as REUSE
from engine.sources.indexes import FOLDER as INDEX
from engine.sources.opening import INPUTS
from engine.storage import STAGING
from engine.switches import SWITCHES

ENGINE = "_engine"
WHOLE = (SET_ASIDE, STAGING, PROBES, SUPERSEDED, HELD, STAGES, SWITCHES, COSTS, REUSE, INDEX, INPUTS)
"""Folders in which every file is the engine's."""
_LEASE_NAME = re.compile(rf"{LEASE}/(\d{{8,}})\.(?:json|beat|end)")
_SHARD_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


@dataclass(frozen=True, slots=True)
class File:
    """A file of an output."""

    name: str
    num_bytes: int
    age_s: float
    """Since it was put where it is, by the store's clock."""

    @property
    def folder(self) -> str:
        """Which of the engine's folders it is in, however deep."""
        steps = self.name.split("/")[:-1]
        return "/".join(steps[:2]) if steps[:1] == [ENGINE] else "/".join(steps)

    @property
    def shard_ids(self) -> set[str]:
        """The ids of shards in its name."""
        return set(_SHARD_ID.findall(self.name))

    @property
    def epoch(self) -> int:
        """Of a lease's file, its epoch; 0 of any other."""
        found = _LEASE_NAME.fullmatch(self.name)
        return int(found.group(1)) if found else 0

    @property
    def stem(self) -> str:
        """Of an input's copy, the hash that it is called."""
        return self.name.removeprefix(f"{INPUTS}/").partition("/")[0].partition(".")[0]


def names_of(shard_id: str) -> tuple[str, ...]:
    """Name the record, the rejects and the part of a shard, wherever that lies."""
    return record_name(shard_id), rejects_name(shard_id), held_name(shard_id), part_name(shard_id)


def turn_of(name: str) -> int:
    """Return when a file is deleted: records, then what lies beside parts, then parts."""
    return 0 if name.startswith(f"{COMMITS}/") else 2 if name.endswith((".parquet", ".part")) else 1
