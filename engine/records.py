"""The records of an output, read: which shards are committed, which of them readers see, and what each of them is."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from engine import places, switches
from engine.commits import CommitRecord
from engine.errors import CorruptOutput
from engine.part import Part, about_of, decode
from engine.places import COMMITS, JOB, REJECTS, former_name, part_name, record_name
from engine.schema import Job
from engine.storage import Storage
from engine.switches import Switches

READ_THREADS = 8


@dataclass(frozen=True, slots=True)
class Shards:
    """Which shards an output has, at one instant."""

    committed: frozenset[str]
    """Ids of those with a record, but for those that others have superseded."""
    held: frozenset[str]
    """Of these, whose parts wait to take the place of others, and are in nobody's sight yet."""
    switches: Switches

    @property
    def live(self) -> frozenset[str]:
        """Ids of the shards that the output consists of."""
        return self.committed - self.held


class Records:
    """What is committed in an output. It pickles, as a location."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @property
    def root(self) -> str:
        """Where the output is."""
        return self.storage.root

    def job(self) -> Job | None:
        """
        Return what this output is of, or None if there is no output yet.

        Raises:
            CorruptOutput: If job.json cannot be read.
        """
        try:
            data = self.storage.read(JOB)
        except FileNotFoundError:
            return None
        try:
            return Job(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise CorruptOutput(
                f"{self.root}/{JOB} cannot be read ({type(error).__name__}): is it the job of a newer engine? "
                "Restore it from a copy, or use another output folder"
            ) from None

    def shards(self) -> Shards:
        """Return which shards there are: a few listings; no file is opened, unless a switch is under way."""
        while True:
            found = Switches.of(self.storage)
            # In this order: a held part is there before its record is.
            recorded = {name[:-5] for name in self.storage.names(COMMITS) if name.endswith(".json")}
            held = places.held_ids(self.storage)
            if held:
                held -= places.seen_ids(self.storage)  # of one that lies in both, the copy that is held is one too many
            if switches.last_number(self.storage) == found.last:  # else some of it is from before, some from after
                break
        committed = frozenset(shard_id for shard_id in recorded if found.named.get(shard_id, True))
        waiting = frozenset(shard_id for shard_id in held & committed if shard_id not in found.named)
        return Shards(committed, waiting, found)

    def committed(self) -> frozenset[str]:
        """Return the ids of all committed shards, those that are held among them: listings, no file is opened."""
        return self.shards().committed

    def live(self) -> frozenset[str]:
        """Return the ids of the shards that the output consists of, at one instant: readers go by it."""
        return self.shards().live

    def parts(self) -> dict[str, int]:
        """Return the size in bytes of each part, by shard id; those that are held are among them."""
        return places.part_sizes(self.storage)

    def part_ids(self) -> set[str]:
        """Return the shard ids of all parts, those that are held among them: listings, no file is opened."""
        return places.part_ids(self.storage)

    def rejected(self) -> set[str]:
        """Return the ids of all shards that have rejects: one listing, no file is opened."""
        return {name[:-6] for name in self.storage.names(REJECTS) if name.endswith(".jsonl")}

    def records(self, shard_ids: Sequence[str] | None = None, *, former: bool = False) -> Iterator[CommitRecord]:
        """
        Yield the commit records of `shard_ids`, by default of all shards that the output consists of.

        Args:
            shard_ids: Of the shards.
            former: Whether those will do that others have superseded since; of all shards they do, which are those of one instant.

        Raises:
            CorruptOutput: If one cannot be read.
        """
        former = former or shard_ids is None
        wanted = sorted(self.live()) if shard_ids is None else shard_ids
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for start in range(0, len(wanted), 1024):
                yield from pool.map(partial(self.record, former=former), wanted[start : start + 1024])

    def record(self, shard_id: str, *, former: bool = False) -> CommitRecord:
        """Return the commit record of one shard, `former` though others have superseded it; raise CorruptOutput if it cannot be read."""
        for name in (record_name(shard_id), *((former_name(shard_id, "json"),) if former else ())):
            try:
                return CommitRecord.from_bytes(self.storage.read(name), name)
            except FileNotFoundError:
                continue
        raise CorruptOutput(f"the commit record {record_name(shard_id)} is missing")

    def is_committed(self, shard_id: str) -> bool:
        """Say whether a shard has a commit record."""
        try:
            self.storage.read(record_name(shard_id))
        except FileNotFoundError:
            return False
        return True

    def part(self, shard_id: str, *, former: bool = False) -> Part:
        """
        Read one part whole and check it.

        Args:
            shard_id: Of the shard.
            former: Whether one will do that others have superseded since.

        Raises:
            CorruptOutput: If it is missing or damaged.
        """
        return self.named_part(shard_id, former=former)[1]

    def named_part(self, shard_id: str, *, former: bool = False) -> tuple[str, Part]:
        """Read one part as `part` does; return its name too, which says where it lies."""
        try:
            name, data = places.read_part(self.storage, shard_id, former=former)
        except FileNotFoundError:
            raise CorruptOutput(f"the part {part_name(shard_id)} is missing") from None
        return name, decode(data, name)

    def inputs_of_parts(self, shard_ids: Collection[str]) -> Iterator[tuple[str, str]]:
        """
        Yield the ids of parts, and the path of the input that each says it is of: for those without a record. Only footers are read.

        Of a part that is gone, cannot be read, or is not what its name says, nothing is said.
        """

        def path_of(shard_id: str) -> str | None:
            try:
                with self.open_part(shard_id) as file:
                    about = about_of(pq.read_schema(file))["shard"]
                return str(about["path"]) if about["id"] == shard_id else None
            except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
                return None

        if not shard_ids:
            return
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for shard_id, path in zip(shard_ids, pool.map(path_of, shard_ids), strict=True):
                if path is not None:
                    yield shard_id, path

    def open_part(self, shard_id: str) -> BinaryIO:
        """Open a part to read pieces of it, wherever it lies, superseded or not; raise FileNotFoundError if it lies nowhere."""
        return places.open_part(self.storage, shard_id)[1]
