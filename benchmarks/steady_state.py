"""
Rates in the steady state, without starts and without what comes after the last text: counted alike for all that are compared.

The first shard of each actor is never counted, nor the first batch of each actor of the recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.dataset as pads

if TYPE_CHECKING:
    from benchmarks.bare_loop import Done, Loops
    from engine.commits import CommitRecord


def of_output(output: str, num_actors: int) -> tuple[float, list[CommitRecord]]:
    """
    Return rows a second of an output of the engine, the lower of two counts, and the records of the shards that are counted.

    By devices: each shard's record says for how long the device was its own, from the end of the shard before; as the recipe, this
    leaves out starts and the last writes. By disk: from the first part to the last, in case that writing is slower. The engine's own
    `rows_per_s` counts from receipt to receipt. The first comes late, as Ray looks after it, which flatters a run of seconds by a
    tenth and more.
    """
    from engine.ledger import Ledger
    from engine.storage import open_storage

    def written_at(record: CommitRecord) -> float:
        return Path(output, f"data/part-{record.shard_id}.parquet").stat().st_mtime

    records = sorted(Ledger(open_storage(output)).records(), key=written_at)
    later = records[num_actors:]
    if not later:
        raise SystemExit(f"too few texts: {len(records)} shards for {num_actors} actors, of which each needs two")
    by_devices = num_actors * sum(one.num_rows for one in later) / sum(one.usage.embed_s for one in later)
    by_disk = sum(one.num_rows for one in records[1:]) / (written_at(records[-1]) - written_at(records[0]))
    return min(by_devices, by_disk), later


def of_loops(loops: Loops) -> tuple[float, list[Done]]:
    """Return rows a second of bare loops, added up, and the shards that are counted: of each loop those after its first."""
    rate, counted = 0.0, []
    for done in loops.done:
        first, *later = sorted(done, key=lambda one: one.at)
        if not later:
            raise SystemExit("too few texts: a bare loop had only one shard, and needs two")
        rate += sum(len(one.answer.vectors) for one in later) / (later[-1].at - first.at)
        counted += later
    return rate, counted


def of_recipe(folder: str) -> tuple[float, int]:
    """Return rows a second, added up over the actors that wrote a folder, and how many these were."""
    table = pads.dataset(folder, format="parquet").to_table(columns=["actor", "done_at"])
    actors, ends = table.column("actor").to_numpy(), table.column("done_at").to_numpy()
    rate = 0.0
    for actor in np.unique(actors):
        own = ends[actors == actor]
        later = own > own.min()
        rate += later.sum() / (own.max() - own.min()) if later.any() else 0.0
    if not rate:
        raise SystemExit("too few texts: no actor had two batches")
    return float(rate), len(np.unique(actors))
