"""The plan: how files are cut into shards, and which shards are left to do. Pure: it opens nothing and writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from engine.schema import Shard
from engine.sources.shape import FileShape

MIN_SHARD_TEXT_BYTES = 256 * 1024
"""Text in a shard of a small job: seconds of work on a few cores."""
SHARDS_OF_A_SMALL_JOB = 64
"""What a small job is cut into, if its shards do not get too small for it: enough for a few actors to share it evenly."""
MIN_SHARD_ROWS = 64
MAX_SHARDS = 100_000
"""More than this and driver and listings are felt: larger jobs get larger shards, up to a size that memory bears."""
MAX_SHARD_TEXT_BYTES = 256 * 1024**2
LARGEST_SHARD_ROWS = 65_536
"""Even of short texts: vectors are not short, and a part is made in memory, where several of them are at work."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run has to do: all shards of the inventory, less those that are committed."""

    num_files: int
    num_rows: int
    num_bytes: int
    """Text, decoded."""
    num_shards: int
    shard_rows: int
    pending: tuple[Shard, ...]
    pending_rows: int
    pending_files: int
    unknown: frozenset[str]
    """Committed shards that the inventory does not have: their inputs are gone, or are no longer what they were."""

    @property
    def done_rows(self) -> int:
        """Rows of committed shards, the rejected among them."""
        return self.num_rows - self.pending_rows

    @property
    def pending_bytes(self) -> int:
        """Text that is left, estimated from the rows."""
        return round(self.num_bytes * self.pending_rows / self.num_rows) if self.num_rows else 0


def choose_shard_rows(shapes: Sequence[FileShape], *, max_rows: int, max_bytes: int) -> int:
    """
    Choose how many rows a shard has, from the job: enough text that what Ray spends on a shard is lost in what the model
    does, not so much that a kill costs more than a minute or so.

    Args:
        shapes: Files with their row groups.
        max_rows: Rows of short texts that the model wants in a shard.
        max_bytes: Text that it wants there. A job of very many shards gets larger ones all the same.
    """
    num_rows = sum(shape.num_rows for shape in shapes)
    text_bytes = sum(shape.text_bytes for shape in shapes)
    if not num_rows:
        return max_rows
    row_bytes = max(1.0, text_bytes / num_rows)
    shard_bytes = min(max(text_bytes / SHARDS_OF_A_SMALL_JOB, MIN_SHARD_TEXT_BYTES), max_bytes)
    by_text = min(max(int(shard_bytes / row_bytes), MIN_SHARD_ROWS), max_rows)
    by_count = -(-num_rows // MAX_SHARDS)
    by_memory = max(MIN_SHARD_ROWS, int(MAX_SHARD_TEXT_BYTES / row_bytes))
    return min(max(by_text, by_count), by_memory, LARGEST_SHARD_ROWS)


def make_plan(shapes: Sequence[FileShape], *, shard_rows: int, fingerprint: str, committed: AbstractSet[str]) -> Plan:
    """
    Cut all files and take away what is committed.

    Args:
        shapes: Files with their row groups.
        shard_rows: About how many rows a shard has.
        fingerprint: Of the job: shard ids are made from it.
        committed: Ids of committed shards.
    """
    pending: list[Shard] = []
    num_shards = num_known = 0
    for shape in shapes:
        for start, stop, place in shape.placed(cut(shape.row_groups, shard_rows)):
            shard = Shard.of(fingerprint, shape.file, start, stop, place)
            num_shards += 1
            if shard.id in committed:
                num_known += 1
            else:
                pending.append(shard)
    unknown: frozenset[str] = frozenset()
    if num_known < len(committed):
        ids = (Shard.of(fingerprint, s.file, *rows).id for s in shapes for rows in cut(s.row_groups, shard_rows))
        unknown = frozenset(committed) - frozenset(ids)
    return Plan(
        num_files=len(shapes),
        num_rows=sum(shape.num_rows for shape in shapes),
        num_bytes=sum(shape.text_bytes for shape in shapes),
        num_shards=num_shards,
        shard_rows=shard_rows,
        pending=tuple(pending),
        pending_rows=sum(len(shard) for shard in pending),
        pending_files=len({shard.file.path for shard in pending}),
        unknown=unknown,
    )


def cut(row_groups: Iterable[int], shard_rows: int) -> Iterator[tuple[int, int]]:
    """
    Cut a file into ranges of about `shard_rows` rows.

    A range ends where a row group ends, if groups are small: whole groups are put together up to `shard_rows`. A group of
    more than half as much again is cut into equal pieces. Nothing but the footer and `shard_rows` decides: not the machine,
    not the number of workers, not what is done already.
    """
    start = end = 0
    for rows in row_groups:
        if end > start and end + rows - start > shard_rows:
            yield start, end
            start = end
        if rows > shard_rows * 3 // 2:
            num_pieces = -(-rows // shard_rows)
            for piece in range(num_pieces):
                yield start + rows * piece // num_pieces, start + rows * (piece + 1) // num_pieces
            start = end = start + rows
        else:
            end += rows
    if end > start:
        yield start, end


def parcels(pending: Sequence[Shard], shard_rows: int) -> Iterator[tuple[Shard, ...]]:
    """
    Put small shards together that travel through Ray as one row: its cost is per row, and many files are tiny.

    Args:
        pending: In the order of the plan.
        shard_rows: About how many rows a shard has; a parcel has no more, unless that is fewer than `MIN_SHARD_ROWS`.

    Returns:
        Groups of neighbours of at most `max_rows` rows in all, or of a single shard.
    """
    max_rows = max(shard_rows, MIN_SHARD_ROWS)
    group: list[Shard] = []
    num_rows = 0
    for shard in pending:
        if group and num_rows + len(shard) > max_rows:
            yield tuple(group)
            group, num_rows = [], 0
        group.append(shard)
        num_rows += len(shard)
    if group:
        yield tuple(group)
