"""
The ledger: which shards are committed, and the protocol that commits one.

    OUT/data/part-<shard_id>.parquet        the vectors
    OUT/_engine/held/<shard_id>.part        the same, while rows of a former version of their file are still in data
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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from shlex import quote
from typing import Any

import pyarrow as pa

from engine import costs, places, switches
from engine.commits import Receipt, Usage
from engine.errors import CommitConflict, CorruptOutput, EngineError, FingerprintMismatch, Refused, SourceChanged
from engine.part import Part, decode, encode
from engine.part_checks import check
from engine.places import (
    COMMITS,
    DATA,
    JOB,
    REJECTS,
    SET_ASIDE,
    VECTORS,
    held_name,
    part_name,
    record_name,
    rejects_name,
)
from engine.quantization import VectorFormat
from engine.records import Records
from engine.schema import Job, Reject, Shard, canonical_json, differences
from engine.storage import Storage

__all__ = [
    "COMMITS", "DATA", "JOB", "REJECTS", "SET_ASIDE", "VECTORS",
    "Ledger", "part_name", "record_name", "rejects_name",
]  # fmt: skip

logger = logging.getLogger(__name__)

_MOVED = ((record_name, "json"), (rejects_name, "jsonl"), (held_name, "part"), (part_name, "part"))
"""Of a shard that others have taken the place of, in this order."""


class Ledger(Records):
    """The records of one output, and the way into them. It pickles, as a location: tasks open it where they run."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self._vectors: dict[str, Any] | None = None
        self._changed: frozenset[str] = frozenset()
        self._last_switch: int | None = None

    def looked_at(self, last_switch: int, changed: Collection[str]) -> Ledger:
        """
        Return the same ledger for a run that went by what it found.

        Args:
            last_switch: As the run found the output. What another run has superseded since is no longer published.
            changed: Paths of inputs that rows of another version are in the output of: their parts are held back.
        """
        ledger = Ledger(self.storage)
        ledger._changed = frozenset(changed)
        ledger._last_switch = last_switch
        return ledger

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

    def publish(
        self,
        table: pa.Table,
        *,
        shard: Shard,
        fingerprint: str,
        rejects: Sequence[Reject],
        usage: Usage,
        vectors: VectorFormat | None = None,
    ) -> Receipt:
        """
        Commit a shard: check, serialise, create the part, read it back, create the rejects and the record.

        It may run any number of times, at once and anywhere, for one shard: the first part to be created is the part. How the vectors
        are stored is by default what the type of their column tells.

        Raises:
            CorruptOutput: If the table is not what a part must be.
            CommitConflict: If a record is there that says something else.
        """
        name = part_name(shard.id)
        check(table, shard=shard, rejects=rejects, name=name, vectors=vectors, num_vectors=usage.num_vectors)
        data = encode(table, shard=shard, fingerprint=fingerprint, rejects=rejects, usage=usage, vectors=vectors)
        checked = decode(data, name)
        self._fix_vectors(checked)
        is_ours = self._create_part(shard, data)
        try:
            if is_ours and places.read_part(self.storage, shard.id)[1] == data:
                receipt = self._record(checked, "committed")
            else:
                receipt = self.adopt(shard, fingerprint, outcome="present")
        except CommitConflict:
            raise
        except (CorruptOutput, FileNotFoundError) as error:
            if self.is_committed(shard.id):
                raise
            logger.warning("setting aside a part that a dead writer left damaged: %s", error)
            self.set_aside(shard.id)
            self._create_part(shard, data)
            receipt = self.adopt(shard, fingerprint, outcome="committed")
        self._leave_if_superseded(shard)
        return receipt

    def adopt(self, shard: Shard, fingerprint: str, *, outcome: str = "adopted") -> Receipt:
        """
        Finish the commit of a part that is stored: check it, and create its rejects and its record.

        Raises:
            CorruptOutput: If the part is missing, damaged, or not of this shard and fingerprint.
            CommitConflict: If a record is there that says something else.
        """
        name, stored = self.named_part(shard.id)
        record = stored.record
        if (record.shard_id, record.fingerprint) != (shard.id, fingerprint):
            raise CorruptOutput(f"the part {name} is of another shard or job")
        self._fix_vectors(stored)
        self.storage.persist(name)  # before the record that vouches for it
        return self._record(stored, outcome)

    def forget(self, shard_id: str) -> None:
        """Move the record of a shard whose part is gone out of the way; do nothing if the part is there after all."""
        if not self._has_part(shard_id):
            self.set_aside(shard_id)

    def set_aside(self, shard_id: str) -> list[str]:
        """
        Move a shard's files out of the way, so that the next run makes it again. Nothing is deleted.

        The record goes first: a shard without a record is pending, whatever else of it is left. The part goes last: as long as it
        is there, its rejects can be made from it. If it is gone, the rejects go before the record: a shard that is made again may have
        others, and without a record nothing would tell that these are left over.

        Returns:
            The names under which the files lie now.
        """
        costs.keep(self, [shard_id])
        first = (record_name, rejects_name) if self._has_part(shard_id) else (rejects_name, record_name)
        return self.move_aside([name_of(shard_id) for name_of in (*first, held_name, part_name)])

    def supersede(self, shard_ids: Collection[str]) -> None:
        """Move shards to those that others have taken the place of: records first, parts last. Nothing is deleted."""
        for name_of, kind in _MOVED:
            moves = {name_of(shard_id): places.former_name(shard_id, kind) for shard_id in sorted(shard_ids)}
            self.make_room(moves)
            for name, to in moves.items():
                self.storage.rename(name, to)

    def make_room(self, moves: Mapping[str, str]) -> None:
        """
        Make sure that files can be moved to where superseded ones lie: give other names to others that lie there.

        A shard may have been superseded before, and have come back with its input: then it was embedded again, and its part has other
        bytes. The last one has the plain name, by which readers look for it.

        Args:
            moves: The name of each file that will be moved, if it is there, and the name that it will have.
        """
        taken = set(self.storage.names(places.SUPERSEDED))
        for name, to in moves.items():
            if to.rpartition("/")[2] in taken and places.differ(self.storage, name, to):
                stem, _, kind = to.rpartition(".")
                self.storage.rename(to, f"{stem}-{time.time_ns()}.{kind}")

    def move_aside(self, names: Sequence[str]) -> list[str]:
        """Move files out of the way; return the names under which they lie now."""
        stamp = time.time_ns()
        moves = [(name, f"{SET_ASIDE}/{stamp}-{name.rsplit('/', 1)[1]}.bad") for name in names]
        return [to for name, to in moves if self.storage.rename(name, to)]

    def _create_part(self, shard: Shard, data: bytes) -> bool:
        """Create a shard's part, held back if rows of another version of its file are in the output; False if there is one."""
        seen, held = part_name(shard.id), held_name(shard.id)
        if shard.file.path not in self._changed:
            return self.storage.create(seen, data)
        if places.is_there(self.storage, seen) or not self.storage.create(held, data):
            return False
        if places.is_there(self.storage, seen):  # another run has switched meanwhile: this one is too many
            self.move_aside([held])
            return False
        return True

    def _leave_if_superseded(self, shard: Shard) -> None:
        """Take out again what was published although other runs have switched to another version of its file meanwhile."""
        if self._last_switch is None:
            return
        wanted = published = (shard.file.size, shard.file.version)
        for later in switches.since(self.storage, self._last_switch):
            wanted = later.files.get(shard.file.path, wanted)  # the last word holds: the file may be what it was
        if wanted != published:
            costs.keep(self, [shard.id])  # no switch says it
            self.supersede([shard.id])
            raise SourceChanged(
                f"{shard.file.location} changed, and another run has put its new rows into {self.root} meanwhile: "
                "this run has ended; run the same command again"
            )

    def _record(self, stored: Part, outcome: str) -> Receipt:
        """Create the rejects and the record of a part that is stored."""
        shard_id = stored.record.shard_id
        if stored.rejects:
            self._create_same(rejects_name(shard_id), stored.rejects_bytes(), shard_id)
        self._create_same(record_name(shard_id), stored.record.to_bytes(), shard_id)
        return Receipt.of(stored.record, outcome)

    def _fix_vectors(self, part: Part) -> None:
        """Let the first commit decide the dimension of all, how they are stored, and the slug of a custom model."""
        asked = {**part.vectors.as_json(), "slug": part.record.usage.slug}
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

    def _has_part(self, shard_id: str) -> bool:
        return any(places.is_there(self.storage, name_of(shard_id)) for name_of in (held_name, part_name))

    def _create_same(self, name: str, data: bytes, shard_id: str) -> None:
        if self.storage.create(name, data):
            return
        stored = self.storage.read(name)
        if stored != data:
            raise CommitConflict(
                f"{name} does not belong to {part_name(shard_id)}: one of the two was changed or damaged. "
                f"`engine verify {quote(self.root)} --level full --set-aside` moves both away, and the next run makes the shard again"
            )
