"""The stream: pending shards to receipts, as a Ray Data chain."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.data.context import AutoscalingConfig

from engine.commits import LEFT, Receipt
from engine.ledger import Ledger
from engine.pipeline import cluster
from engine.pipeline.budget import Drain
from engine.pipeline.datasource import Parcel, ShardDatasource
from engine.pipeline.parcel import unpack_receipts
from engine.pipeline.process import ENGINE
from engine.pipeline.publish import Publisher
from engine.pipeline.resources import LIGHT_CPUS, Resources
from engine.pipeline.worker import CommittingWorker, EmbedWorker, Work
from engine.ray_settings import MAX_READER_CRASHES
from engine.schema import Job

STALL_S = 4 * 3600
"""Ray's half an hour would end a run whose shards take a slow model longer than that, again and again."""
MAX_CRASHES = 5
"""Of actors over one parcel. Ray's default is no limit, and a text that makes a library crash would be tried for ever."""
PARCELS_WAITING = 1
"""Before an actor, so that none waits for Ray's scheduler to come round."""
POOL_GROWS_AT = 0.9
"""Of the parcels that may wait before its actors."""
TASKS_IN_FLIGHT = 8
"""For a publisher, which is through with a parcel of small shards faster than Ray's scheduler comes round (0.1 s)."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One run's way through Ray: read, embed, publish; on CPUs the actors that embed publish too."""

    parcels: Sequence[Parcel]
    work: Work
    ledger: Ledger
    job: Job
    resources: Resources
    epoch: int
    """Of the run's lease."""
    stall_s: float | None = None
    """Without any progress, after which the run is given up; by default STALL_S."""

    def receipts(self) -> Generator[Receipt]:
        """
        Run, and yield a receipt for each shard as it is committed. To stop early, close the iterator.

        Raises:
            Stopped: When the budget has stopped the run, and all that was begun is committed.
            EngineError: What a reader, an actor or a publisher raised. What was committed stays so.
        """
        # A limit of one byte makes every row, which is a parcel, a block of its own.
        wanted = {
            "target_max_block_size": 1,
            "execution_no_progress_timeout_s": self.stall_s or STALL_S,
            "autoscaling_config": AutoscalingConfig(actor_pool_util_upscaling_threshold=self._full()),
        }
        with cluster.settings(**wanted), cluster.translated():
            blocks = self._chain().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
            drain = Drain(self.work.budget, was_used=self.work.scale is not None)
            for block in blocks:
                for receipts in unpack_receipts(block):
                    yield from (receipt for receipt in receipts if receipt.outcome != LEFT)
                    drain.add(receipts)
                if drain.is_empty():
                    break
            drain.raise_if_stopped()

    def _full(self) -> float:
        """Return how many parcels are sent for each place inside the actors when the pool is to grow; Ray's own 1.75 never are."""
        inside = self.resources.parcels_inside
        return (inside + POOL_GROWS_AT * PARCELS_WAITING) / inside

    def _chain(self) -> ray.data.Dataset:
        chosen, place = self.resources, (self.ledger, self.job, self.epoch, ENGINE)
        is_last = not chosen.min_publishers
        source = ShardDatasource(self.parcels, self.work.selection, chosen.max_readers)
        embedded = ray.data.read_datasource(
            source,
            override_num_blocks=source.num_read_tasks,
            num_cpus=LIGHT_CPUS,
            concurrency=chosen.max_readers,
            ray_remote_args={"max_retries": MAX_READER_CRASHES},
        ).map_batches(
            CommittingWorker if is_last else EmbedWorker,
            fn_constructor_args=(self.work, *place) if is_last else (self.work, ENGINE),
            batch_size=1,  # a parcel a call; Ray refuses None beside GPUs
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=chosen.min_actors,
                max_size=chosen.max_actors,
                max_concurrent_calls_per_actor=chosen.parcels_inside,
                max_tasks_in_flight_per_actor=chosen.parcels_inside + PARCELS_WAITING,
                enable_true_multi_threading=True,
            ),
            num_cpus=chosen.num_cpus,
            num_gpus=chosen.num_gpus or None,
            max_task_retries=MAX_CRASHES,
        )
        if is_last:
            return embedded
        return embedded.map_batches(
            Publisher,
            fn_constructor_args=place,
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=chosen.min_publishers,
                max_size=chosen.max_actors,
                max_tasks_in_flight_per_actor=TASKS_IN_FLIGHT,
            ),
            num_cpus=LIGHT_CPUS,
            max_task_retries=MAX_CRASHES,
        )
