"""
Committed shards that the source does not have as they were: of inputs that changed, that are gone, or whose rows are in others now.

Rows of a changed input stay in the output until its new ones take their place; those of one that is gone stay. A source in memory has no
inputs but the blocks that it was cut into, and may be cut otherwise the next time: a table by the length of its texts, a Ray Dataset by the
size of the cluster. Then its former blocks are not gone: their rows are in the new ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from engine.errors import Refused, SourceChanged
from engine.sources import in_memory
from engine.sources.inventory import is_there
from engine.sources.opening import MEMORY

if TYPE_CHECKING:
    from engine.commits import CommitRecord
    from engine.ledger import Ledger
    from engine.planning import Plan
    from engine.schema import Job
    from engine.sources.inventory import Inventory


def unlisted(
    ledger: Ledger, todo: Plan, lost: AbstractSet[str], inventory: Inventory, job: Job
) -> tuple[dict[str, frozenset[str]], list[str]]:
    """
    Look at committed shards that the inventory does not have, those whose part is lost among them.

    Where going on could embed rows a second time under another id, it is refused: their file has another name, or the source is named from
    another folder.

    Returns:
        The shards that others take the place of, by path, and warnings. If blocks of a source in memory are among them that it does not
        have any more, the paths of all its pending blocks are too.

    Raises:
        Refused: The source is named from another folder.
        SourceChanged: A file has another name.
    """
    if inventory.base != job.base and len(todo.pending) == todo.num_shards:
        raise Refused(
            f"{ledger.root} was begun for sources below {job.base}, and none of the shards below {inventory.base} is in it: "
            "name the source as the first run did, or use another output folder"
        )
    if not todo.unknown and not lost:
        return {}, []
    former, absent = _former(ledger, todo, lost, inventory)
    if inventory.base != job.base and absent:
        raise Refused(
            f"{ledger.root} was made from {job.base}, and {len(absent)} of its inputs are not below {inventory.base} "
            f"({min(absent)}): name the source as the first run did, or use another output folder"
        )
    return {path: frozenset(ids) for path, ids in former.items()}, list(_told(absent, job))


def _former(
    ledger: Ledger, todo: Plan, lost: AbstractSet[str], inventory: Inventory
) -> tuple[dict[str, set[str]], set[str]]:
    """Return the shards that others take the place of, by path, and the paths of the inputs that are gone."""
    listed = {file.path for file in inventory.files}
    # Of those with rows to do: in object stores, where equal content has an equal version, copies look like one file.
    same_file = {(shard.file.size, shard.file.version): shard.file for shard in todo.pending}
    former: dict[str, set[str]] = defaultdict(set)
    absent: set[str] = set()
    is_recut = False
    for record in ledger.records(sorted(todo.unknown | lost)):
        if record.path in listed:
            former[record.path].add(record.shard_id)
        elif _is_moved(record, inventory, todo.num_rows):
            former[record.path].add(record.shard_id)
            is_recut = True
        elif record.shard_id not in lost:
            if (file := same_file.get((record.size, record.version))) is not None:
                raise SourceChanged(
                    f"{file.location} looks like {record.path} under another name, and rows of that are committed: name it as it was, "
                    "or use another output folder"
                )
            absent.add(record.path)
    if is_recut:  # new blocks wait, also those of other paths than the former ones have
        for shard in todo.pending:
            former[shard.file.path] |= set()
    return former, absent


def _is_moved(record: CommitRecord, inventory: Inventory, num_rows: int) -> bool:
    """
    Say whether rows of a block that is not listed are in others now.

    Those of a table are, unless it has become so short that it ends before them. A Ray Dataset is what its blocks hold now: which rows of
    former ones are among them cannot be told.
    """
    if inventory.base != MEMORY or not inventory.files:
        return False
    start = in_memory.first_row(record.path)
    if start is None or in_memory.first_row(inventory.files[0].path) is None:
        return True
    return start + record.start < num_rows


def _told(absent: set[str], job: Job) -> Iterator[str]:
    """Say what becomes of rows of inputs that are not there any more."""
    gone = {path for path in absent if not is_there(job.base, path)}
    if gone:
        yield f"{len(gone)} inputs are gone whose rows are in the output, and stay there: {min(gone)}"
    if absent - gone:
        yield (
            f"{len(absent - gone)} inputs are not in the source any more whose rows are in the output, and stay there: "
            f"{min(absent - gone)}"
        )
