"""The publisher: parcels with vectors in, receipts out. All that is hard about it is in the ledger."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pyarrow as pa

from engine.commits import Receipt
from engine.errors import Refused, SourceChanged
from engine.lease import last_epoch
from engine.ledger import Ledger
from engine.pipeline import process
from engine.pipeline.parcel import Item, pack_receipts, unpack
from engine.schema import InputFile, Job
from engine.sources import in_memory
from engine.sources.opening import MEMORY, check_unchanged, is_staged

NICENESS = 10
"""A publisher has time; the models' threads, which wait for each other, have not."""


class Commits:
    """
    Commits parcels of a job, from any number of threads.

    Args:
        ledger: Of the output, as the run found it.
        job: As it is stored in the output.
        epoch: Of the run's lease; None if it has none.
    """

    def __init__(self, ledger: Ledger, job: Job, epoch: int | None = None) -> None:
        self._ledger = ledger
        self._job = job
        self._epoch = epoch
        self._is_checked = False

    def receipts(self, items: Sequence[Item]) -> pa.Table:
        """Commit every shard of a parcel; return their receipts, packed."""
        self._check_place()
        return pack_receipts(self._receipt(item) for item in items)

    def _receipt(self, item: Item) -> Receipt:
        if item.is_left:
            return Receipt.left(item.shard)
        self._check_source(item.shard.file)
        return self._ledger.publish(
            item.table,
            shard=item.shard,
            fingerprint=self._job.fingerprint,
            rejects=item.rejects,
            usage=item.usage,
            vectors=item.vectors,
        )

    def _check_source(self, file: InputFile) -> None:
        """
        Make sure that an input still is what it was, if another run has held the output since: it may have ended before this one woke, and
        knew only what the input is now.

        Raises:
            SourceError: If it is gone.
            SourceChanged: If it is not, or is a block of another source in memory than the output's.
        """
        storage = self._ledger.storage
        if self._epoch is None or last_epoch(storage) <= self._epoch:
            return
        check_unchanged(file)
        if is_staged(file) and file not in in_memory.listed((MEMORY,), storage).files:
            raise SourceChanged(
                f"another run has given {self._ledger.root} another source in memory meanwhile: this run has ended, and what was "
                "committed is kept"
            )

    def _check_place(self) -> None:
        """
        Make sure, once, that the output here is the driver's: the same path on another machine may be another disk.

        That disk may have an output of the same model and settings too; its job was made at another time.
        """
        if self._is_checked:
            return
        if self._ledger.job() != self._job:
            raise Refused(
                f"{self._ledger.root} on the node of a publisher is not the driver's folder: "
                "give an output on a disk that all nodes of the cluster share"
            )
        self._is_checked = True


class Publisher:
    """
    A `map_batches` actor that commits shards.

    An actor, not a task: between two shards that take seconds Ray ends idle task workers, and each new one costs more than a
    second of CPU to start (`docs/decisions/0005-publishers-are-actors.md`).
    """

    def __init__(
        self, ledger: Ledger, job: Job, epoch: int | None = None, driver: tuple[str, int] = process.ENGINE
    ) -> None:
        self._driver = driver
        self._commits = Commits(ledger, job, epoch)
        os.nice(NICENESS)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Commit every shard in a block; return their receipts."""
        process.check_engine(self._driver)  # not in the constructor, of whose errors Ray passes on the text alone
        return pa.concat_tables([self._commits.receipts(items) for items in unpack(block)])
