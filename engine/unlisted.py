"""
Shards in an output that the source does not have as they were: of inputs that changed, that are gone, or whose rows are in others now.

Rows of a changed input stay in the output until its new ones take their place; those of one that is gone stay. A source in memory is one
input, whatever blocks it is cut into: which rows of a block are in which one now cannot be told, since rows that are put in or taken out move
all others, a table is cut by the length of its texts, and a Ray Dataset by the size of the cluster. So if a block is not what it was, all that
is committed and not in the source any more stays until all that is pending can take its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from engine.errors import Refused, SourceChanged
from engine.sources.inventory import is_there
from engine.sources.opening import MEMORY

if TYPE_CHECKING:
    from engine.ledger import Ledger
    from engine.planning import Plan
    from engine.schema import Job
    from engine.sources.inventory import Inventory


def unlisted(
    ledger: Ledger, todo: Plan, lost: AbstractSet[str], unplanned: AbstractSet[str], inventory: Inventory, job: Job
) -> tuple[dict[str, frozenset[str]], list[str]]:
    """
    Look at shards that the inventory does not have: those that are committed, and parts that dead runs left without a record.

    Where going on could embed rows a second time under another id, it is refused: their file has another name, or the source is named from
    another folder.

    Args:
        ledger: Of the output.
        todo: What the inventory has.
        lost: Committed shards whose part is gone, and that the plan does not have.
        unplanned: Parts that are neither committed nor in the plan.
        inventory: Of the source.
        job: Of the output.

    Returns:
        The shards that others take the place of, by path, and warnings. Of a source in memory the paths of all pending blocks are there too,
        if there are such shards.

    Raises:
        Refused: The source is named from another folder.
        SourceChanged: A file has another name.
    """
    if inventory.base != job.base and len(todo.pending) == todo.num_shards:
        raise Refused(
            f"{ledger.root} was begun for sources below {job.base}, and none of the shards below {inventory.base} is in it: "
            "name the source as the first run did, or use another output folder"
        )
    if not todo.unknown and not lost and not unplanned:  # as a rule
        return {}, []
    former, absent = _former(ledger, todo, lost, unplanned, inventory)
    if inventory.base != job.base and absent:
        raise Refused(
            f"{ledger.root} was made from {job.base}, and {len(absent)} of its inputs are not below {inventory.base} "
            f"({min(absent)}): name the source as the first run did, or use another output folder"
        )
    return {path: frozenset(ids) for path, ids in former.items()}, list(_told(absent, job))


def _former(
    ledger: Ledger, todo: Plan, lost: AbstractSet[str], unplanned: AbstractSet[str], inventory: Inventory
) -> tuple[dict[str, set[str]], set[str]]:
    """Return the shards that others take the place of, by path, and the paths of the inputs that are gone."""
    is_table = inventory.base == MEMORY
    listed = {file.path for file in inventory.files}
    # Of those with rows to do: in object stores, where equal content has an equal version, copies look like one file.
    same_file = {(shard.file.size, shard.file.version): shard.file for shard in todo.pending}
    former: dict[str, set[str]] = defaultdict(set)
    absent: set[str] = set()
    for record in ledger.records(sorted(todo.unknown | lost), former=True):  # another run may just be switching
        if is_table or record.path in listed:
            former[record.path].add(record.shard_id)
        elif record.shard_id not in lost:
            if (file := same_file.get((record.size, record.version))) is not None:
                raise SourceChanged(
                    f"{file.location} looks like {record.path} under another name, and rows of that are committed: name it as it was, "
                    "or use another output folder"
                )
            absent.add(record.path)
    for shard_id, path in ledger.inputs_of_parts(unplanned):
        if is_table or path in listed:
            former[path].add(shard_id)
    if is_table and former:
        for shard in todo.pending:  # they wait, also those of other paths than the former ones have
            former[shard.file.path] |= set()
    return former, absent


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
