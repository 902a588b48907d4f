"""
The costs of an output: the dollars that all of its runs together have spent, as far as it can tell.

    OUT/_engine/costs/<hash>.json    what shards had cost whose records have been moved or deleted since, or that never had one

Such a file is created before the records go, and never written again. It says which parts it is of, so that a record that is
there all the same, as its process died in between, is counted once; and so is one that two files name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from engine import switches
from engine.calibration import stored_calibration
from engine.errors import CorruptOutput
from engine.part import DAMAGE, about_of
from engine.records import READ_THREADS
from engine.schema import canonical_json, content_hash

if TYPE_CHECKING:
    from engine.commits import CommitRecord
    from engine.records import Records
    from engine.storage import Storage

COSTS = "_engine/costs"


class Costs:
    """
    The dollars of one output, added up.

    Args:
        records: Of the output.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self._of_parts: dict[str, float | None] = {}
        self._counted: set[str] = set()

    def add(self, record: CommitRecord) -> None:
        """Count a record that has been read anyway."""
        self._counted.add(record.shard_id)
        self._of_parts[_part_of(record)] = record.usage.cost

    def total(self) -> float | None:
        """
        Return what all runs have cost, as all committed shards, those that are no more, and the calibration say; None if none says anything.

        Raises:
            CorruptOutput: If any of that cannot be read.
        """
        for record in self._records.records(sorted(self._records.committed() - self._counted)):
            self.add(record)
        storage = self._records.storage
        found = [*(_kept(storage) | self._of_parts).values()]
        found += [former.cost for former in switches.since(storage, 0)]
        if (sampled := stored_calibration(storage)) and sampled.usage:
            found.append(sampled.usage.cost)
        known = [cost for cost in found if cost is not None]
        return sum(known) if known else None


def keep(records: Records, shard_ids: Iterable[str]) -> None:
    """Keep what shards have cost whose records, or parts without a record, are about to be moved or deleted; call it before that."""
    costs: dict[str, float] = {}
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for found in pool.map(partial(_paid, records), shard_ids):
            costs |= found
    if not costs:
        return
    data = (canonical_json(costs) + "\n").encode()
    name = f"{COSTS}/{content_hash(data)}.json"
    if not records.storage.create(name, data):
        records.storage.persist(name)


def _paid(records: Records, shard_id: str) -> dict[str, float]:
    """Return what a shard has cost, by its part; nothing if it was free. If its record cannot be read, or there is none, its part tells."""
    for read in (records.record, partial(_record_of_part, records)):
        try:
            record = read(shard_id)
        except CorruptOutput:
            continue
        if record is not None and record.shard_id == shard_id:
            return {_part_of(record): record.usage.cost} if record.usage.cost else {}
    return {}


def _record_of_part(records: Records, shard_id: str) -> CommitRecord | None:
    """
    Return what the record of a part is; None if it was free, as its footer says: then it is not read whole, since there may be very many.

    Raises:
        CorruptOutput: If it is missing or damaged.
    """
    with suppress(*DAMAGE), records.open_part(shard_id) as file:
        if not about_of(pq.read_schema(file))["usage"].get("cost"):
            return None
    return records.part(shard_id).record


def _part_of(record: CommitRecord) -> str:
    """Name a part for good: a shard that is made again has another, which was paid for too."""
    return f"{record.shard_id}-{record.checksum}"


def _kept(storage: Storage) -> dict[str, float | None]:
    """Return what is kept of records that are no more, by their parts."""
    found: dict[str, float | None] = {}
    names = sorted(name for name in storage.names(COSTS) if name.endswith(".json"))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for costs in pool.map(partial(_read, storage), names):
            found |= costs
    return found


def _read(storage: Storage, name: str) -> dict[str, float]:
    try:
        return {str(part): float(cost) for part, cost in json.loads(storage.read(f"{COSTS}/{name}")).items()}
    except (ValueError, TypeError, AttributeError, FileNotFoundError) as error:
        raise CorruptOutput(
            f"{storage.root}/{COSTS}/{name} cannot be read ({type(error).__name__}): it says what shards had cost that are no more. "
            "Restore it from a copy, or delete it: what it says is then not counted for --max-cost any more"
        ) from None
