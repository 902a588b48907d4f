"""
Switching: as inputs change, the parts of their new rows take the place of the former ones.

A changed input's new parts wait in `_engine/held`, with their records, until its last row is committed. Then a switch is written
down: from that instant on, who goes by the records has the new rows and not the former. Last, files are brought to where the
switch says: parts into `data` and out of it, at one instant where the disk can, then records and rejects. A process may die
anywhere in it, and the next run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine import costs
from engine.errors import EngineError
from engine.exchange import exchange
from engine.places import DATA, HELD, former_name, held_name, part_name
from engine.schema import utc_now
from engine.survey import survey
from engine.switches import Switch, Switches
from engine.wording import count

if TYPE_CHECKING:
    from engine.ledger import Ledger
    from engine.survey import Standing, Survey

logger = logging.getLogger(__name__)


def switch_all(asked: Survey, still_ours: Callable[[], None]) -> int:
    """
    Let all new rows of changed inputs take the place of the former ones that may, whoever else commits meanwhile.

    A run that was taken for dead may wake and commit rows of a former version. If it sees the switch after that, it takes them out. If it
    does not, they are there before the output is looked at here once more, after the switch.

    Args:
        asked: What the run went by.
        still_ours: Raises if the output is not this run's any more.

    Returns:
        How many inputs that was.

    Raises:
        EngineError: If another run switches at the same time.
    """
    num_inputs = 0
    while True:
        if not asked.holds():
            asked = survey(asked.config)
        num_switched = switch(asked.ledger, asked.standing, still_ours)
        if not num_switched:
            return num_inputs
        num_inputs += num_switched


def switch(ledger: Ledger, standing: Standing, still_ours: Callable[[], None]) -> int:
    """
    Let the new parts of each changed input whose rows are all committed take the place of the former ones. A source in memory is one input.

    Args:
        ledger: Of the output.
        standing: As the run found it.
        still_ours: Raises if the output is not this run's any more.

    Returns:
        How many inputs that was.

    Raises:
        EngineError: If another run switches at the same time.
    """
    still_ours()
    finish(ledger)
    if not standing.former and next(ledger.storage.names(HELD), None) is None:
        return 0  # as a rule: no listing of all records for it
    due = _due(ledger, standing)
    if due is None:
        return 0
    if not ledger.storage.create(due.name(), due.to_bytes()):
        raise EngineError(f"another run is changing {ledger.root} at the same time: run the same command again")
    finish(ledger)
    logger.info("the new rows of %s took the place of the former ones", count(len(due.files), "changed input"))
    return len(due.files)


def finish(ledger: Ledger) -> None:
    """Bring files to where the switches say that a run has written down, and maybe not lived to carry out."""
    for written in Switches.of(ledger.storage).open:
        add = {_file(shard_id): held_name(shard_id) for shard_id in written.add}
        drop = {_file(shard_id): former_name(shard_id, "part") for shard_id in written.drop}
        ledger.make_room({f"{DATA}/{name}": to for name, to in drop.items()})
        exchange(ledger.storage, DATA, add=add, drop=drop)
        ledger.supersede(written.drop)
        ledger.storage.create(written.done_name(), b"")


def is_due(standing: Standing) -> bool:
    """Say whether a run that has nothing to embed has something to switch, as far as its survey tells."""
    return bool(standing.is_switching or standing.is_waiting or standing.former)


def _due(ledger: Ledger, standing: Standing) -> Switch | None:
    """Return the switch that can be made now: of all changed inputs without a row that is pending."""
    shards = ledger.shards()
    pending = {shard.file.path for shard in standing.plan.pending if shard.id not in shards.committed}
    if standing.is_recut and pending:
        return None
    ready = standing.former.keys() - pending
    drop = frozenset(shard_id for path in ready for shard_id in standing.former[path])
    if drop:
        drop &= shards.committed | ledger.part_ids()  # a part that a dead run left without a record goes too
    files = {file.path: (file.size, file.version) for file in standing.files if file.path in ready}
    add = set()
    for record in ledger.records(sorted(shards.held & standing.known - standing.plan.unknown)):
        if record.path not in pending:
            add.add(record.shard_id)
            files[record.path] = (record.size, record.version)
    if not drop and not add:
        return None
    recorded = ledger.records(sorted(drop & shards.committed))
    paid = [record.usage.cost for record in recorded if record.usage.cost is not None]
    costs.keep(ledger, sorted(drop - shards.committed))  # of parts without a record; the switch says that of the others
    number = shards.switches.last + 1
    return Switch(number, frozenset(add), drop, files, sum(paid) if paid else None, utc_now())


def _file(shard_id: str) -> str:
    return part_name(shard_id).removeprefix(f"{DATA}/")
