"""The publisher: parcels with vectors in, receipts out. All that is hard about it is in the ledger."""

from __future__ import annotations

import pyarrow as pa

from engine.ledger import Ledger
from engine.pipeline.parcel import pack_receipts, unpack


class Publisher:
    """
    A `map_batches` actor that commits shards.

    An actor, not a task: between two shards that take seconds Ray ends idle task workers, and each new one costs more than a
    second of CPU to start (`docs/decisions/0005-publishers-are-actors.md`).
    """

    def __init__(self, ledger: Ledger, fingerprint: str) -> None:
        self._ledger = ledger
        self._fingerprint = fingerprint

    def __call__(self, block: pa.Table) -> pa.Table:
        """Commit every shard in a block; return their receipts."""
        return pack_receipts(
            self._ledger.publish(
                item.table, shard=item.shard, fingerprint=self._fingerprint, rejects=item.rejects, usage=item.usage
            )
            for items in unpack(block)
            for item in items
        )
