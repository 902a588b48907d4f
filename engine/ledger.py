"""
The ledger: which shards are committed, and the protocol that commits one.

    OUT/data/part-<shard_id>.parquet        the vectors
    OUT/_engine/job.json                    what the output is of
    OUT/_engine/vectors.json                the dimension, fixed by the first commit
    OUT/_engine/rejects/<shard_id>.jsonl    rows that could not be embedded
    OUT/_engine/commits/<shard_id>.json     committed: written last
    OUT/_engine/set-aside/                  damaged files that were moved out of the way

Each name is created once, whole, and never written again. A process can die between any two steps; whoever comes next finds
either nothing, and makes the shard again, or a part, and finishes its commit.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from engine.errors import CommitConflict, CorruptOutput, EngineError, FingerprintMismatch, Refused
from engine.part import Part, check, decode, encode
from engine.schema import (
    CommitRecord,
    Job,
    Receipt,
    Reject,
    Shard,
    Usage,
    canonical_json,
    differences,
)
from engine.storage import Storage

logger = logging.getLogger(__name__)

DATA = "data"
COMMITS = "_engine/commits"
REJECTS = "_engine/rejects"
SET_ASIDE = "_engine/set-aside"
JOB = "_engine/job.json"
VECTORS = "_engine/vectors.json"
READ_THREADS = 8


def part_name(shard_id: str) -> str:
    """Return the name of a shard's part."""
    return f"{DATA}/part-{shard_id}.parquet"


def record_name(shard_id: str) -> str:
    """Return the name of a shard's commit record."""
    return f"{COMMITS}/{shard_id}.json"


def rejects_name(shard_id: str) -> str:
    """Return the name of a shard's rejects."""
    return f"{REJECTS}/{shard_id}.jsonl"


class Ledger:
    """The records of one output. It pickles, as a location: tasks open it where they run."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._vectors: dict[str, Any] | None = None

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

    def claim(self, job: Job) -> Job:
        """
        Make this output the job's, or make sure that it is already.

        Returns:
            The job as it is stored: another driver may have been first.

        Raises:
            FingerprintMismatch: If the output is of another model or setting; names each field.
            Refused: If there are parts in it that no engine recorded.
        """
        has_parts = next(self.storage.names(DATA), None) is not None
        stored = self.job()  # read after the listing: another driver writes it before its first part
        if stored is None and has_parts:
            raise Refused(
                f"{self.root}/{DATA} holds files, but {JOB} is missing: this folder is not an output of the engine, "
                "or was half copied. Use another output folder, or restore the file"
            )
        if stored is None:
            self.storage.create(JOB, (canonical_json(asdict(job)) + "\n").encode())
            stored = self.job()
        if stored is None:
            raise EngineError(f"{self.root}/{JOB} vanished as it was written; does another program clean this folder?")
        self.check(stored, job.fingerprint, job.decided_by)
        return stored

    def check(self, stored: Job, fingerprint: str, decided_by: dict[str, Any]) -> None:
        """
        Make sure that vectors under `fingerprint` may go into the output of `stored`.

        Raises:
            FingerprintMismatch: Names each field that differs.
        """
        if stored.fingerprint != fingerprint:
            lines = "\n  ".join(differences(stored.decided_by, decided_by))
            is_empty = next(self.storage.names(DATA), None) is None
            raise FingerprintMismatch(
                f"{self.root} was made by another job, and vectors of two jobs must not mix:\n  {lines}\n"
                "Use another output folder, or run with the settings of the output"
                f"{' (no vector is in it yet: if no run is using it, delete it)' if is_empty else ''}. Nothing was touched"
            )

    def committed(self) -> set[str]:
        """Return the ids of all committed shards: one listing, no file is opened."""
        return {name[:-5] for name in self.storage.names(COMMITS) if name.endswith(".json")}

    def parts(self) -> dict[str, int]:
        """Return the size in bytes of each part, by shard id."""
        found = self.storage.sizes(DATA)
        return {name[5:-8]: size for name, size in found if name.startswith("part-") and name.endswith(".parquet")}

    def part_ids(self) -> set[str]:
        """Return the shard ids of all parts: one listing, no file is opened."""
        names = self.storage.names(DATA)
        return {name[5:-8] for name in names if name.startswith("part-") and name.endswith(".parquet")}

    def rejected(self) -> set[str]:
        """Return the ids of all shards that have rejects: one listing, no file is opened."""
        return {name[:-6] for name in self.storage.names(REJECTS) if name.endswith(".jsonl")}

    def records(self, shard_ids: Sequence[str] | None = None) -> Iterator[CommitRecord]:
        """
        Yield the commit records of `shard_ids`, or all.

        Raises:
            CorruptOutput: If one cannot be read.
        """
        wanted = sorted(self.committed()) if shard_ids is None else shard_ids
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for start in range(0, len(wanted), 1024):
                yield from pool.map(self.record, wanted[start : start + 1024])

    def record(self, shard_id: str) -> CommitRecord:
        """Return the commit record of one shard; raise CorruptOutput if it cannot be read."""
        name = record_name(shard_id)
        try:
            return CommitRecord.from_bytes(self.storage.read(name), name)
        except FileNotFoundError:
            raise CorruptOutput(f"the commit record {name} is missing") from None

    def is_committed(self, shard_id: str) -> bool:
        """Say whether a shard has a commit record."""
        try:
            self.storage.read(record_name(shard_id))
        except FileNotFoundError:
            return False
        return True

    def part(self, shard_id: str) -> Part:
        """Read one part whole and check it; raise CorruptOutput if it is missing or damaged."""
        name = part_name(shard_id)
        try:
            return decode(self.storage.read(name), name)
        except FileNotFoundError:
            raise CorruptOutput(f"the part {name} is missing") from None

    def publish(
        self, table: pa.Table, *, shard: Shard, fingerprint: str, rejects: Sequence[Reject], usage: Usage
    ) -> Receipt:
        """
        Commit a shard: check, serialise, create the part, read it back, create the rejects and the record.

        It may run any number of times, at once and anywhere, for one shard: the first part to be created is the part.

        Raises:
            CorruptOutput: If the table is not what a part must be.
            CommitConflict: If a record is there that says something else.
        """
        name = part_name(shard.id)
        check(table, shard=shard, rejects=rejects, name=name, num_vectors=usage.num_vectors)
        data = encode(table, shard=shard, fingerprint=fingerprint, rejects=rejects, usage=usage)
        checked = decode(data, name)
        self._fix_vectors(checked.record)
        is_ours = self.storage.create(name, data)
        try:
            if is_ours and self.storage.read(name) == data:
                return self._record(checked, "committed")
            return self.adopt(shard, fingerprint, outcome="present")
        except CommitConflict:
            raise
        except CorruptOutput as error:
            if self.is_committed(shard.id):
                raise
            logger.warning("setting aside a part that a dead writer left damaged: %s", error)
            self.set_aside(shard.id)
            self.storage.create(name, data)
            return self.adopt(shard, fingerprint, outcome="committed")

    def adopt(self, shard: Shard, fingerprint: str, *, outcome: str = "adopted") -> Receipt:
        """
        Finish the commit of a part that is stored: check it, and create its rejects and its record.

        Raises:
            CorruptOutput: If the part is missing, damaged, or not of this shard and fingerprint.
            CommitConflict: If a record is there that says something else.
        """
        stored = self.part(shard.id)
        record = stored.record
        if (record.shard_id, record.fingerprint) != (shard.id, fingerprint):
            raise CorruptOutput(f"the part {part_name(shard.id)} is of another shard or job")
        self._fix_vectors(record)
        self.storage.persist(part_name(shard.id))  # before the record that vouches for it
        return self._record(stored, outcome)

    def forget(self, shard_id: str) -> None:
        """Move the record of a shard whose part is gone out of the way; do nothing if the part is there after all."""
        try:
            self.storage.open(part_name(shard_id)).close()
        except FileNotFoundError:
            self._move_aside((record_name(shard_id), rejects_name(shard_id)))

    def set_aside(self, shard_id: str) -> list[str]:
        """
        Move a shard's files out of the way, so that the next run makes it again. Nothing is deleted.

        The record goes first: a shard without a record is pending, whatever else of it is left. The part goes last: as long as it
        is there, its rejects can be made from it.

        Returns:
            The names under which the files lie now.
        """
        return self._move_aside((record_name(shard_id), rejects_name(shard_id), part_name(shard_id)))

    def _move_aside(self, names: Sequence[str]) -> list[str]:
        stamp = time.time_ns()
        moves = [(name, f"{SET_ASIDE}/{stamp}-{name.rsplit('/', 1)[1]}.bad") for name in names]
        return [to for name, to in moves if self.storage.rename(name, to)]

    def _record(self, stored: Part, outcome: str) -> Receipt:
        """Create the rejects and the record of a part that is stored."""
        shard_id = stored.record.shard_id
        if stored.rejects:
            self._create_same(rejects_name(shard_id), stored.rejects_bytes(), shard_id)
        self._create_same(record_name(shard_id), stored.record.to_bytes(), shard_id)
        return Receipt.of(stored.record, outcome)

    def _fix_vectors(self, record: CommitRecord) -> None:
        """Let the first commit decide the dimension of all, and the slug of a custom model."""
        asked = {"dimension": record.dimension, "dtype": "float32", "slug": record.usage.slug}
        if self._vectors is None:
            self.storage.create(VECTORS, (canonical_json(asked) + "\n").encode())
            try:
                self._vectors = dict(json.loads(self.storage.read(VECTORS)))
            except (ValueError, TypeError):
                self._vectors = {}
            if not self._vectors:
                raise Refused(f"{self.root}/{VECTORS} cannot be read: delete it, and the next commit makes it again")
        if self._vectors != asked:
            lines = "\n  ".join(differences(self._vectors, asked))
            raise FingerprintMismatch(
                f"the model answers otherwise than when {self.root} was begun:\n  {lines}\nUse another output folder"
            )

    def _create_same(self, name: str, data: bytes, shard_id: str) -> None:
        if self.storage.create(name, data):
            return
        stored = self.storage.read(name)
        if stored != data:
            raise CommitConflict(
                f"{name} does not belong to {part_name(shard_id)}: one of the two was changed or damaged. "
                f"`engine verify {self.root} --level full --set-aside` moves both away, and the next run makes the shard again"
            )
