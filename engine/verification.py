"""
Verification: an output held against its plan, its records, its files and, for a sample, its model.

    quick     plan against records against files: listings and records, no part is opened
    footers   and the footer of every part: rows, dimension, fingerprint, shard
    full      and every byte: page checksums, content checksum, vectors, rows, rejects
    sample    quick, and a few rows embedded again
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from shlex import quote
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.commits import CommitRecord
from engine.disk import cannot, is_trouble
from engine.errors import ConfigError, CorruptOutput
from engine.ledger import part_name, rejects_name
from engine.part import DAMAGE, about_of, format_of
from engine.repeated_ids import RepeatedIds
from engine.results import Finding, VerifyResult
from engine.schema import EMBEDDING, SOURCE_ROW
from engine.spot_check import embedded_again

if TYPE_CHECKING:
    from engine.ledger import Ledger
    from engine.schema import Job
    from engine.survey import Standing

Level = Literal["quick", "footers", "full", "sample"]

THREADS = 4
LOOKS_AT_ONCE = 256
AGAIN = "`engine verify {root} --level {level} --set-aside` moves it away, and the next run makes its shard again"
RESTORE = "its input is gone, so it cannot be made again: restore the part from a copy"


@dataclass(frozen=True, slots=True)
class _Span:
    """What is kept of a record while all are looked at."""

    path: str
    start: int
    stop: int
    shard_id: str


def verify(
    ledger: Ledger,
    job: Job,
    standing: Standing | None,
    *,
    level: Level,
    set_aside: bool,
    sample_rows: int,
) -> VerifyResult:
    """
    Check an output.

    Args:
        ledger: Of the output.
        job: Of the output.
        standing: The output against its source; None if the source cannot be compared.
        level: How closely to look.
        set_aside: Move what is bad out of the way, if the next run can make it again.
        sample_rows: How many rows level `sample` embeds again.
    """
    if level not in get_args(Level):
        raise ConfigError(f"level {level!r}: there are {', '.join(get_args(Level))}")
    if sample_rows < 1:
        raise ConfigError(f"sample_rows {sample_rows}: at least 1 row")
    check = _Check(ledger, job, standing, f"sample --sample-rows {sample_rows}" if level == "sample" else level)
    check.records(level)
    check.leftovers(level)
    check.repeated_ids()
    lowest = check.sample(sample_rows) if level == "sample" else None
    moved = check.set_aside() if set_aside else []
    return VerifyResult(
        output=ledger.root,
        level=level,
        num_shards=check.num_shards,
        num_rows=check.num_rows,
        num_rejects=check.num_rejects,
        pending_rows=standing.plan.pending_rows if standing else None,
        findings=check.findings,
        set_aside=moved,
        lowest_cosine=lowest,
        warnings=check.warnings,
    )


class _Check:
    """One verification: what was looked at, and what was found."""

    def __init__(self, ledger: Ledger, job: Job, standing: Standing | None, how: str) -> None:
        self.findings: list[Finding] = []
        self.warnings: list[str] = standing.told if standing else []
        self.num_shards = self.num_rows = self.num_rejects = 0
        self._again = AGAIN.format(root=quote(ledger.root), level=how)
        self._ledger = ledger
        self._job = job
        self._standing = standing
        self._irreplaceable: frozenset[str] = frozenset()
        """Shards whose input the source does not have any more, neither as it was nor changed."""
        if standing:
            self._irreplaceable = (standing.plan.unknown | standing.lost).difference(*standing.former.values())
        self._shards = ledger.shards()
        self._committed = sorted(self._shards.committed)
        self._parts = ledger.parts()
        self._rejects = ledger.rejected()
        self._has_ids = job.config.get("id_column") is not None
        self._ids = RepeatedIds()

    def records(self, level: Level) -> None:
        """Look at every committed shard: its record, its part, its rejects; and that no row is in two shards. Count those that are not held."""
        spans: list[_Span] = []
        problems: list[tuple[str, str]] = []
        for shard_id, record, problem in self._looks(level):
            if problem:
                problems.append((shard_id, problem))
            if record is not None and shard_id not in self._shards.held:
                self.num_shards += 1
                self.num_rows += record.num_rows
                self.num_rejects += record.num_rejects
                spans.append(_Span(record.path, record.start, record.stop, shard_id))
        committed = self._ledger.committed() if problems else ()  # a run may have put others in their place meanwhile
        for shard_id, problem in problems:
            if shard_id in committed:
                self._find(shard_id, problem)
        spans.sort(key=lambda span: (span.path, span.start, span.stop))
        for one, other in pairwise(spans):
            if one.path == other.path and other.start < one.stop:
                problem = (
                    f"rows {other.start} to {min(one.stop, other.stop)} of {one.path} are in two parts: "
                    f"{part_name(one.shard_id)} and {part_name(other.shard_id)}"
                )
                advice = "decide which of the two belongs here and move the other, with its record, out of the output"
                self.findings.append(Finding("", problem, advice))

    def leftovers(self, level: Level) -> None:
        """Look at what is there without a record, at what is not there yet, and at what is there still."""
        unrecorded = sorted(self._parts.keys() - self._shards.committed - self._shards.switches.named.keys())
        former = frozenset().union(*self._standing.former.values()) if self._standing else frozenset()
        waiting = self._standing.unrecorded if self._standing else frozenset(unrecorded)
        if num_waiting := len(waiting.intersection(unrecorded)):
            self.warnings.append(f"{num_waiting} parts have no record yet: the next run finishes their commit")
        if num_former := len(former.intersection(unrecorded)):
            problem = f"{num_former} parts without a record are of inputs that changed since: who reads the folder sees former rows"
            self.findings.append(Finding("", problem, "run the same command again: new rows take their place"))
        if num_left := len(set(unrecorded) - waiting - former):
            self.warnings.append(f"{num_left} parts have no record, and no run will make it: see `engine gc`")
        if level == "full":
            for shard_id in unrecorded:
                try:
                    self._ledger.part(shard_id, former=True)
                except CorruptOutput as error:
                    self._find(shard_id, error.message)
        if self._standing and self._standing.plan.pending:
            plan = self._standing.plan
            problem = f"{plan.pending_rows} rows in {len(plan.pending)} of {plan.num_shards} shards are not committed"
            self.findings.append(Finding("", problem, "run the same command again: it makes what is left"))
        elif self._has_former_rows(former):
            problem = "inputs changed, and their new rows have not taken the place of the former ones: readers do not see them"
            self.findings.append(Finding("", problem, "run the same command again: it embeds nothing for that"))

    def _has_former_rows(self, former: frozenset[str]) -> bool:
        """Say whether rows wait, or stay, although the shards of the plan are all committed: now, since a run may be ending."""
        now = self._ledger.shards()
        waiting = now.held - self._standing.plan.unknown if self._standing else frozenset()
        return bool(waiting or former & now.live or now.switches.open)

    def repeated_ids(self) -> None:
        """Say which ids level `full` has seen more than once."""
        with self._ids as found:
            self.warnings += found.warnings()

    def set_aside(self) -> list[str]:
        """Move the files of bad shards away; return their new names."""
        bad = {finding.shard_id for finding in self.findings if finding.shard_id}
        again = sorted(shard_id for shard_id in bad if self._can_be_made_again(shard_id))
        return [name for shard_id in again for name in self._ledger.set_aside(shard_id)]

    def sample(self, num_rows: int) -> float | None:
        """Embed rows again, spread over a few shards; return the lowest cosine to what is stored."""
        out = {finding.shard_id for finding in self.findings}
        if self._standing:
            out |= self._standing.plan.unknown
        good = [shard_id for shard_id in self._committed if shard_id not in out and self._can_be_made_again(shard_id)]
        lowest = None
        for shard_id, cosine, is_low in embedded_again(self._ledger, self._job, good, num_rows):
            lowest = cosine if lowest is None else min(lowest, cosine)
            if is_low:
                self._find(shard_id, f"{part_name(shard_id)}: embedded again, a vector has cosine {cosine:.6f} to it")
        if lowest is None:
            self.warnings.append("no row could be embedded again: no shard is whole, has vectors and has its input")
        return lowest

    def _looks(self, level: Level) -> Iterator[tuple[str, CommitRecord | None, str | None]]:
        """Yield every committed shard, its record, if it can be read, and what is wrong with it, if anything is."""

        def look(shard_id: str) -> tuple[str, CommitRecord | None, str | None]:
            record = None
            try:
                record = self._ledger.record(shard_id, former=True)
                return shard_id, record, next(self._problems(record, shard_id, level), None)
            except CorruptOutput as error:
                return shard_id, record, error.message
            except FileNotFoundError:
                return shard_id, record, f"{rejects_name(shard_id)} went missing while it was looked at"

        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(self._committed), LOOKS_AT_ONCE):
                yield from pool.map(look, self._committed[start : start + LOOKS_AT_ONCE])

    def _problems(self, record: CommitRecord, shard_id: str, level: Level) -> Iterator[str]:
        name = part_name(shard_id)
        if (record.shard_id, record.fingerprint) != (shard_id, self._job.fingerprint):
            yield f"the commit record of {shard_id} is of another shard or job"
        if shard_id not in self._parts:
            yield f"the part {name} is missing"
            return
        if self._parts[shard_id] != record.num_bytes:
            yield f"the part {name} has {self._parts[shard_id]} bytes instead of {record.num_bytes}"
        if bool(record.num_rejects) != (shard_id in self._rejects):
            yield f"{rejects_name(shard_id)} does not fit {record.num_rejects} rejects: it is missing, or should not be there"
        if level == "footers":
            yield from self._footer_problems(record, shard_id)
        if level == "full":
            yield from self._content_problems(record, shard_id)

    def _footer_problems(self, record: CommitRecord, shard_id: str) -> Iterator[str]:
        name = part_name(shard_id)
        try:
            with self._ledger.open_part(shard_id) as file, pq.ParquetFile(file) as parquet:
                schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
            about = about_of(schema)
            kind, vectors = schema.field(EMBEDDING).type, format_of(schema)
        except DAMAGE as error:
            if is_trouble(error):
                raise cannot("read", self._ledger.root, error) from None
            yield f"the footer of {name} cannot be read ({type(error).__name__})"
            return
        if kind != vectors.arrow_type or vectors.dtype != self._job.config.get("output_dtype", "float32"):
            yield f"the column {EMBEDDING} of {name} is {kind}, which is not what the job and the part say"
        stored = (about["fingerprint"], about["shard"]["id"], num_rows, len(about["rejects"]), vectors.dimension)
        if stored != (record.fingerprint, record.shard_id, record.num_vectors, record.num_rejects, record.dimension):
            yield f"the footer of {name} does not say what its commit record says"

    def _content_problems(self, record: CommitRecord, shard_id: str) -> Iterator[str]:
        stored = self._ledger.part(shard_id)
        if self._has_ids and shard_id not in self._shards.held:
            rows = np.asarray(stored.table.column(SOURCE_ROW))
            firsts = np.flatnonzero(np.diff(rows, prepend=-1))  # chunks of a text have its id, and repeat none
            self._ids.add(shard_id, stored.table.column(0).take(pa.array(firsts)), rows[firsts])
        if stored.record != record:
            yield f"the part {part_name(shard_id)} is not what its commit record says: its checksum or counts differ"
        if stored.rejects and self._ledger.storage.read(rejects_name(shard_id)) != stored.rejects_bytes():
            yield f"{rejects_name(shard_id)} is not what its part says"

    def _find(self, shard_id: str, problem: str) -> None:
        self.findings.append(Finding(shard_id, problem, self._again if self._can_be_made_again(shard_id) else RESTORE))

    def _can_be_made_again(self, shard_id: str) -> bool:
        return self._standing is not None and shard_id not in self._irreplaceable
