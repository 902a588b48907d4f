"""The publish task: parcels with vectors in, receipts out. All that is hard about it is in the ledger."""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa

from engine.ledger import Ledger
from engine.pipeline.parcel import unpack
from engine.schema import Receipt


def publish(block: pa.Table, *, ledger: Ledger, fingerprint: str) -> pa.Table:
    """Commit every shard in a block; return a row for each receipt."""
    receipts: list[Receipt] = [
        ledger.publish(item.table, shard=item.shard, fingerprint=fingerprint, rejects=item.rejects, usage=item.usage)
        for items in unpack(block)
        for item in items
    ]
    return pa.Table.from_pylist([asdict(receipt) for receipt in receipts])
