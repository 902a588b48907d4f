"""
Garbage: what lies in an output and no record names. It is shown first, and deleted only where that is asked for.

    gone        record, rejects and part of shards whose input was deleted
    unnamed     parts and rejects that no record names and no run will take up
    held        new parts that waited for their record, and that no run will take up
    former      parts that others have superseded
    set-aside   damaged files that were moved out of the way
    staging     what writers that died left behind; probes of the store, too
    reuse       indexes of former vectors, made again by the run that wants them
    indexes     of lines, of files that are not in the source any more
    inputs      copies of sources in memory that no record names and no source is
    leases      of runs before the last two

All of it only if it has lain there for a day or more by the store's clock. Summaries of runs stay, and so does every file that
no engine made. Records go first: a process that dies between two deletions leaves parts without a record, which the next one takes,
and never a record without its part.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator
from itertools import zip_longest
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from engine import costs, lease, switching
from engine.disk import advised
from engine.errors import ConfigError
from engine.exchange import STAGES
from engine.gc_result import BY_HAND, WHY, Garbage, GcResult
from engine.history import RUNS
from engine.object_storage import PROBES
from engine.output_files import ENGINE, WHOLE, File, names_of, turn_of
from engine.places import COMMITS, DATA, HELD, REJECTS, SET_ASIDE, SUPERSEDED, held_name, part_name, rejects_name
from engine.reuse import FOLDER as REUSE
from engine.schema import canonical_json
from engine.sources import indexes
from engine.sources.in_memory import CURRENT
from engine.sources.inventory import is_there
from engine.sources.opening import INPUTS
from engine.storage import STAGING, open_storage
from engine.survey import resurvey
from engine.wording import count

if TYPE_CHECKING:
    from engine.lease import Lease

DAY_S = 24 * 3600.0
OF_SOURCE = ("gone", "unnamed", "held", "indexes", "inputs")
"""Kinds that only the source can tell."""


def gc(output: str, *, apply: bool = False, older_than_days: int = 1, inputs_gone: bool = False) -> GcResult:
    """
    Find what an output does not need, and delete it if that is asked for.

    Args:
        output: The folder.
        apply: Delete what is found. The output is held meanwhile, as by a run.
        older_than_days: Leave what came later, by the store's clock. At least 1: who listed files before may be reading them.
        inputs_gone: Inputs that are not there were deleted, though they are so many, or so placed, that a disk may just not be mounted.

    Raises:
        ConfigError: If there is no output.
        OutputInUse: If it is to be deleted from, and a live run owns it.
        CorruptOutput: If job.json or a record cannot be read.
    """
    if older_than_days < 1:
        raise ConfigError("older_than_days: at least 1, since files of the last day may be in use")
    if not apply:
        return _Look(output, older_than_days, inputs_gone=inputs_gone, is_only_shown=True).result(applied=False)
    with advised(BY_HAND.format(output=quote(output))):
        return _cleared(output, older_than_days, inputs_gone=inputs_gone)


def _cleared(output: str, older_than_days: int, *, inputs_gone: bool) -> GcResult:
    found = _Look(output, older_than_days, inputs_gone=inputs_gone)
    if not found.garbage:
        return found.result(applied=False)
    with lease.held(found.ledger.storage, "refuse") as owned:
        if not owned.follows(found.settled) or found.is_switching:  # a run was here since, or died
            switching.finish(found.ledger)
            again = _Look(output, older_than_days, inputs_gone=inputs_gone)
            again.keep_only(found)
            found = again
        found.delete(owned)
    return found.result(applied=True)


class _Look:
    """
    One look at an output: its files, each given to the kind that it is of.

    Args:
        output: The folder.
        older_than_days: Than which garbage is.
        inputs_gone: Inputs that are not there were deleted.
        is_only_shown: Nothing is deleted by it, so nothing need be written.
    """

    def __init__(self, output: str, older_than_days: int, *, inputs_gone: bool, is_only_shown: bool = False) -> None:
        self.settled = lease.settled(open_storage(output))
        self.ledger, self._job, self._standing, problem = resurvey(output)
        self._older_than_days = older_than_days
        self._warnings: list[str] = []
        if self._standing is None:
            why = problem.message if problem else ""
            self._warnings.append(
                f"what deleted inputs left is not looked for, since the source cannot be compared: {why}"
            )
        self._committed = self.ledger.committed()
        pending = {shard.id for shard in self._standing.plan.pending} if self._standing else set()
        self._named = self._committed | pending
        parts = self.ledger.part_ids()
        self._files = {found[0]: File(*found) for found in self.ledger.storage.ages(is_only_shown=is_only_shown)}
        self._below: dict[str, list[File]] = defaultdict(list)
        for file in self._files.values():
            self._below[file.folder].append(file)
        self._epoch = max((file.epoch for file in self._below[lease.LEASE]), default=0)
        self._gone = self._find_gone(parts)
        self._doubt = "" if inputs_gone else self._find_doubt()
        self.garbage: dict[str, list[File]] = {}
        self._kept: list[Garbage] = []
        self._sort()

    @property
    def is_switching(self) -> bool:
        """A run died while new parts took the place of others."""
        return self._standing is not None and self._standing.is_switching

    def keep_only(self, other: _Look) -> None:
        """Take for garbage only what the other look took for it too."""
        names = {file.name for files in other.garbage.values() for file in files}
        left = {kind: [file for file in files if file.name in names] for kind, files in self.garbage.items()}
        self.garbage = {kind: files for kind, files in left.items() if files}

    def delete(self, owned: Lease) -> None:
        """Delete the garbage: first records, so that none is ever there without its part, and parts last."""
        gone = (file for file in self.garbage.get("gone", ()) if file.folder == COMMITS)
        unrecorded = (file for kind in ("unnamed", "held") for file in self.garbage.get(kind, ()))
        paid = {shard_id for file in (*gone, *unrecorded) for shard_id in file.shard_ids}
        costs.keep(self.ledger, sorted(paid))
        storage = self.ledger.storage
        names = sorted((file.name for files in self.garbage.values() for file in files), key=turn_of)
        for name, following in zip_longest(names, names[1:], fillvalue=""):
            owned.check()
            storage.delete(name)
            if turn_of(name) == 0 != turn_of(following):
                storage.persist(name)  # else a power cut could bring the records back, and not the parts

    def result(self, *, applied: bool) -> GcResult:
        """Return what was found."""
        return GcResult(
            output=self.ledger.root,
            applied=applied,
            older_than_days=self._older_than_days,
            garbage=[_garbage(kind, WHY[kind], files) for kind, files in self.garbage.items()],
            kept=self._kept,
            strange=self._strange(),
            warnings=self._warnings,
        )

    def _sort(self) -> None:
        for kind, files in self._kinds().items():
            young = {file for file in files if self._age_s(file) < self._older_than_days * DAY_S}
            old = [file for file in files if file not in young]
            if self._doubt and kind in OF_SOURCE:
                self._keep(kind, self._doubt, old)
            elif old:
                self.garbage[kind] = old
            self._keep(kind, f"{WHY[kind]}, but for less than {count(self._older_than_days, 'day')}", young)

    def _keep(self, kind: str, why: str, files: Collection[File]) -> None:
        if files:
            self._kept.append(_garbage(kind, why, files))

    def _kinds(self) -> dict[str, list[File]]:
        """Return the files of each kind, whatever their age."""
        found = {
            "former": [file for file in self._below[SUPERSEDED] if not file.shard_ids & self._committed],
            "set-aside": self._below[SET_ASIDE],
            "staging": self._below[STAGING] + self._below[PROBES] + self._below[STAGES],
            "reuse": self._below[REUSE],
            "leases": [file for file in self._below[lease.LEASE] if 0 < file.epoch < self._epoch - 1],
        }
        if self._standing is not None:
            gone = [self._files[name] for shard_id in self._gone for name in names_of(shard_id) if name in self._files]
            unnamed = [file for file in self._parts_and_rejects() if self._is_unnamed(file)]
            held = [file for file in self._below[HELD] if self._is_unnamed(file)]
            found |= {"gone": gone, "unnamed": unnamed, "held": held}
            found |= {"indexes": list(self._unlisted_indexes()), "inputs": list(self._unnamed_inputs())}
        return {kind: found[kind] for kind in WHY if found.get(kind)}

    def _find_gone(self, parts: set[str]) -> dict[str, str]:
        """Return the paths of the inputs of committed shards whose input is gone, by shard id."""
        if self._standing is None:
            return {}
        gone: dict[str, str] = {}
        there: dict[str, bool] = {}
        behind_links = 0
        for record in self.ledger.records(sorted(self._standing.plan.unknown | self._standing.lost), former=True):
            if record.path in self._standing.former:  # it stays until others take its place
                continue
            if record.path not in there:
                there[record.path] = is_there(self._job.base, record.path)
            if there[record.path]:
                continue
            names = {part_name(record.shard_id), held_name(record.shard_id)}
            if record.shard_id in parts and not names & self._files.keys():
                behind_links += 1
            else:
                gone[record.shard_id] = record.path
        if behind_links:
            self._warnings.append(
                f"{count(behind_links, 'part')} of deleted inputs stay: no link is followed to delete"
            )
        return gone

    def _find_doubt(self) -> str:
        """Say why inputs that are not there may be out of reach, and not deleted; nothing if that is unlikely."""
        paths = set(self._gone.values())
        if self._standing is None or not paths:
            return ""
        sure = "if they were deleted, say so with --inputs-gone"
        num_there = self._standing.plan.num_files
        if len(paths) > num_there:
            return f"{len(paths)} of {count(len(paths) + num_there, 'input')} are gone, more than half: {sure}"
        for path in sorted(paths) if Path(self._job.base).is_absolute() else ():
            steps = [at := Path(self._job.base, path), *at.parents]
            if (link := next((step for step in steps if step.is_symlink() and not step.exists()), None)) is not None:
                return f"the link {link} leads nowhere, as where a disk is not mounted: {sure}"
            folder = next((above for above in at.parents if above.is_dir()), None)
            if folder is not None and next(folder.iterdir(), None) is None:
                return f"the folder {folder} is empty, as where a disk is not mounted: {sure}"
        return ""

    def _age_s(self, file: File) -> float:
        """Return for how long a file has been there; those of a shard that is gone go together, with the last of them."""
        ids = file.shard_ids & self._gone.keys()
        names = [name for shard_id in ids for name in names_of(shard_id) if name in self._files]
        return min([file.age_s, *(self._files[name].age_s for name in names)])

    def _parts_and_rejects(self) -> Iterator[File]:
        for folder, name_of in ((DATA, part_name), (REJECTS, rejects_name)):
            yield from (file for file in self._below[folder] if file.name in map(name_of, file.shard_ids))

    def _is_unnamed(self, file: File) -> bool:
        ids = file.shard_ids
        return bool(ids) and not ids & self._named

    def _unnamed_inputs(self) -> Iterator[File]:
        """Yield the copies of data in memory that neither a record nor a pending shard nor the source of the last run or the first names."""
        files = self._below[INPUTS]
        if not files or self._standing is None:
            return
        named = [canonical_json(self._job.config), *(self._text(file) for file in files if file.name == CURRENT)]
        # A manifest that the source is names blocks.
        named += [self._text(file) for file in files if file.name.endswith(".json") and file.stem in "".join(named)]
        records = self.ledger.records(sorted(self._committed), former=True)
        named += {name for record in records for name in (record.path, record.version)}
        pending = self._standing.plan.pending
        named += {name for shard in pending for name in (shard.file.path, shard.file.version, shard.file.location)}
        text = "\n".join(named)
        yield from (file for file in files if file.name != CURRENT and file.stem not in text)

    def _unlisted_indexes(self) -> Iterator[File]:
        """Yield the bundles of indexes none of which is of a file of the source."""
        if not self._below[indexes.FOLDER] or self._standing is None:
            return
        listed = {indexes.key(file) for file in self._standing.files}
        for file in self._below[indexes.FOLDER]:
            try:
                keys = set(json.loads(gzip.decompress(self.ledger.storage.read(file.name))))
            except (OSError, EOFError, ValueError, TypeError, zlib.error):
                keys = set()  # what cannot be read is made again
            if not keys & listed:
                yield file

    def _text(self, file: File) -> str:
        return self.ledger.storage.read(file.name).decode(errors="replace")

    def _strange(self) -> list[str]:
        """Name the files that no engine made."""
        ours = {*self._parts_and_rejects(), *(file for file in self._below[lease.LEASE] if file.epoch)}
        for folder in (ENGINE, COMMITS, RUNS, *WHOLE):
            ours |= set(self._below[folder])
        return sorted(file.name for file in self._files.values() if file not in ours)


def _garbage(kind: str, why: str, files: Collection[File]) -> Garbage:
    return Garbage(kind, why, sorted(file.name for file in files), sum(file.num_bytes for file in files))
