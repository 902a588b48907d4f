"""The publisher: parcels with vectors in, receipts out. All that is hard about it is in the ledger."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pyarrow as pa

from engine.commits import Receipt
from engine.errors import Refused
from engine.ledger import Ledger
from engine.pipeline import process
from engine.pipeline.parcel import Item, pack_receipts, unpack
from engine.schema import Job

NICENESS = 10
"""A publisher has time; the models' threads, which wait for each other, have not."""


class Commits:
    """Commits parcels of a job, from any number of threads."""

    def __init__(self, ledger: Ledger, job: Job) -> None:
        self._ledger = ledger
        self._job = job
        self._is_checked = False

    def receipts(self, items: Sequence[Item]) -> pa.Table:
        """Commit every shard of a parcel; return their receipts, packed."""
        self._check_place()
        return pack_receipts(self._receipt(item) for item in items)

    def _receipt(self, item: Item) -> Receipt:
        if item.is_left:
            return Receipt.left(item.shard)
        return self._ledger.publish(
            item.table,
            shard=item.shard,
            fingerprint=self._job.fingerprint,
            rejects=item.rejects,
            usage=item.usage,
            vectors=item.vectors,
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

    def __init__(self, ledger: Ledger, job: Job, driver: tuple[str, int] = process.ENGINE) -> None:
        self._driver = driver
        self._commits = Commits(ledger, job)
        os.nice(NICENESS)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Commit every shard in a block; return their receipts."""
        process.check_engine(self._driver)  # not in the constructor, of whose errors Ray passes on the text alone
        return pa.concat_tables([self._commits.receipts(items) for items in unpack(block)])
