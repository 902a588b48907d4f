"""The story of a job, told in order: plan, run, status, verify."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from heapq import nlargest
from typing import TYPE_CHECKING

from engine import history, lease, switching
from engine.costs import Costs
from engine.errors import ConfigError, CorruptOutput, EngineError, SourceError, Stopped
from engine.events import PoolStarted, RunPlanned, ShardDone
from engine.former_parts import adopt_calibration, check_reuse, reuse_index
from engine.interrupts import interruptible, sigterm_interrupts
from engine.models import registry
from engine.models.api.prices import MILLION, price_of
from engine.overview import untold
from engine.planning import parcels
from engine.results import Finding, PlanResult, RunResult
from engine.sources import in_memory, indexes
from engine.storage import open_storage
from engine.survey import resurvey, survey
from engine.tally import Tally

if TYPE_CHECKING:
    from engine.config import JobConfig
    from engine.history import Entry
    from engine.lease import Lease
    from engine.pipeline.budget import Shared
    from engine.pipeline.resources import Resources
    from engine.pipeline.worker import Work
    from engine.results import VerifyResult
    from engine.storage import Storage
    from engine.survey import Survey
    from engine.verification import Level

logger = logging.getLogger(__name__)

OnEvent = Callable[[RunPlanned | PoolStarted | ShardDone], None]


def plan(config: JobConfig, inputs: Storage | None = None) -> PlanResult:
    """
    Say what a run would do. Writes nothing, loads no model, starts no Ray. For a provider's model it reads the pending texts.

    Args:
        config: Of the job.
        inputs: Where a source in memory was copied to.
    """
    from engine.forecast import forecast

    asked = survey(config, inputs)
    check_reuse(asked)
    todo = asked.standing.plan
    with tempfile.TemporaryDirectory(prefix="engine-plan-") as folder:
        expected = forecast(asked.config, todo, lambda: reuse_index(asked, open_storage(folder)))
    return PlanResult(
        output=asked.ledger.root,
        model=config.model,
        fingerprint=asked.job.fingerprint,
        num_files=todo.num_files,
        num_rows=todo.num_rows,
        num_bytes=todo.num_bytes,
        num_shards=todo.num_shards,
        shard_rows=todo.shard_rows,
        done_shards=todo.num_shards - len(todo.pending),
        done_rows=todo.done_rows,
        pending_files=todo.pending_files,
        pending_shards=len(todo.pending),
        pending_rows=todo.pending_rows,
        pending_bytes=todo.pending_bytes,
        warnings=asked.standing.told,
        forecast=expected,
        output_dtype=asked.config.output_dtype,
    )


def run(config: JobConfig, on_event: OnEvent | None = None) -> RunResult:
    """
    Embed what is pending, and commit shard by shard. Run it again to go on where it was, however it ended.

    Args:
        config: Of the job.
        on_event: Called as the work is planned, as the actors start, and after each shard.

    Raises:
        ConfigError: The config, an input or the cluster does not fit; nothing but job.json is written then.
        Refused: The output is another job's, or an input is no longer what was committed; nothing was touched. Or a live run owns
            the output, or has taken it over.
        ProviderError: The model fails whatever the text.
    """
    tally = Tally()
    settled = lease.settled(open_storage(config.output, is_single_writer=config.unsafe_single_writer))
    asked = survey(config)
    check_reuse(asked)
    _check_price(asked)
    if asked.standing.plan.pending:
        asked.ledger.storage.probe()
    if asked.ledger.claim(asked.job) != asked.job:
        asked = survey(config)  # another driver was first, and its cuts hold
    storage = asked.ledger.storage
    indexes.save(storage, asked.found)
    storage.collect_staging()
    has_work = asked.standing.plan.pending or switching.is_due(asked.standing)
    if not has_work and not in_memory.is_new(storage, config.source):
        tally.done_before_rows = asked.standing.plan.done_rows
        return tally.result(asked)
    with lease.held(storage, config.if_in_use) as owned, history.recorded(storage) as entry:
        if not owned.follows(settled):  # another run may have committed since, and the survey may have taken minutes
            asked = survey(config)
        in_memory.remember(storage, config.source)
        asked = _repaired(asked, tally)
        if asked.standing.plan.pending:
            _stream(asked, tally, on_event or (lambda _: None), owned, entry)
        tally.num_changed_inputs = switching.switch_all(asked, owned.check)
        logger.info("embedding done: %d embeddings, %d rejects", tally.num_rows, tally.num_rejects)
        result = tally.result(asked)
        entry.ended(result)
    return result


def verify(
    output: str,
    level: Level = "quick",
    *,
    set_aside: bool = False,
    sample_rows: int = 64,
) -> VerifyResult:
    """
    Check an output against its plan, its records and its files.

    Args:
        output: The folder.
        level: quick: plan against records against files. footers: rows, dimensions and fingerprint of every part.
            full: every byte, vector and row. sample: quick, and `sample_rows` rows embedded again.
        set_aside: Move bad parts away, so that the next run makes them again.
        sample_rows: How many rows to embed again.
    """
    from engine import verification

    ledger, job, standing, problem = resurvey(output)
    result = verification.verify(ledger, job, standing, level=level, set_aside=set_aside, sample_rows=sample_rows)
    if isinstance(problem, SourceError):  # out of reach from here, perhaps: what is stored may be right all the same
        result.warnings.insert(0, untold(problem))
    elif problem is not None:
        result.findings.append(Finding("", problem.message, "until then the output cannot be told to be whole"))
    return result


def _repaired(asked: Survey, tally: Tally) -> Survey:
    """Put right what dead runs and careless hands left: switches under way, records without a part, parts without a record."""
    switching.finish(asked.ledger)
    for shard_id in asked.standing.missing:
        asked.ledger.forget(shard_id)
    tally.done_before_rows = asked.standing.plan.done_rows
    return survey(asked.config) if _adopt(asked, tally) else asked


def _adopt(asked: Survey, tally: Tally) -> int:
    """Finish the commits of parts that a dead run left without a record; what cannot be read is set aside and made again."""
    shards = [shard for shard in asked.standing.plan.pending if shard.id in asked.standing.unrecorded]
    for shard in shards:
        try:
            tally.add(asked.ledger.adopt(shard, asked.job.fingerprint))
        except CorruptOutput as error:
            logger.warning("%s; it was not committed, and is set aside and made again", error.message)
            asked.ledger.set_aside(shard.id)
    return len(shards)


def _check_price(asked: Survey) -> None:
    """Refuse `max_cost` where nobody knows what a token costs."""
    if asked.config.max_cost is not None and price_of(asked.config) is None:
        raise ConfigError(
            f"max_cost: the price of {asked.config.model} is not known: give --token-price, or leave --max-cost out"
        )


def _max_tokens(asked: Survey) -> float | None:
    """Return how many tokens `max_cost` leaves for this run, after what all runs have cost: to be asked once none can be added."""
    price = price_of(asked.config)
    if asked.config.max_cost is None or not price:
        return None
    return (asked.config.max_cost - (Costs(asked.ledger).total() or 0.0)) / price * MILLION


def _stream(asked: Survey, tally: Tally, on_event: OnEvent, owned: Lease, entry: Entry) -> None:
    """Send the pending shards through Ray, and count their receipts until they are all in or somebody interrupts."""
    from engine.pipeline import cluster, resources
    from engine.pipeline.metrics import Metrics
    from engine.pipeline.stream import Stream

    todo = asked.standing.plan
    groups = list(parcels(todo.pending, todo.shard_rows))
    on_event(RunPlanned(todo.pending_rows, len(todo.pending), todo.num_rows, asked.ledger.root))
    with interruptible(tally, owned), cluster.connected(asked.config.address), sigterm_interrupts():
        nodes = cluster.capacity()
        entry.cluster = cluster.summary(nodes)
        chosen = resources.decide(asked.config, nodes, len(groups))
        if chosen.lacking:
            logger.warning("%s: waiting for a node that fits, until --stall-s", chosen.lacking)
            cluster.wait_for_room(chosen, asked.config.stall_s or cluster.NO_NODE_S, owned.check)
        tally.num_actors = chosen.max_actors
        logger.info("embedding started: %d texts in %d shards", todo.pending_rows, len(todo.pending))
        on_event(PoolStarted(chosen.max_actors, chosen.kind))
        num_inside = chosen.parcels_inside * chosen.max_actors
        tally.rows_at_risk = sum(nlargest(num_inside, (sum(map(len, group)) for group in groups)))
        exported = Metrics(asked.config.model, asked.job.fingerprint, todo.pending_rows)
        with _budget(asked.config, chosen, _max_tokens(asked), tally) as budget:
            try:
                work = _calibrated(asked, chosen, _work(asked, chosen, budget), tally, owned)
                work = replace(work, reuse=reuse_index(asked))
                stream = Stream(groups, work, asked.ledger, asked.job, chosen, owned.epoch, asked.config.stall_s)
                with closing(stream.receipts()) as receipts:
                    for receipt in receipts:
                        owned.check()
                        tally.add_streamed(receipt)
                        exported.add(receipt)
                        on_event(
                            ShardDone(receipt.num_rows, receipt.num_rejects, receipt.num_tokens, receipt.num_bytes)
                        )
            except Stopped as stopped:
                tally.stopped = stopped.message
                return
        # The ledger decides whether all is done, not what Ray brought.
        if left := asked.left():
            raise EngineError(
                f"Ray finished, and {len(left)} of {len(todo.pending)} shards are not committed: what was committed is "
                "kept; run the same command again"
            )


@contextmanager
def _budget(config: JobConfig, chosen: Resources, max_tokens: float | None, tally: Tally) -> Iterator[Shared | None]:
    """Have a budget for a job that asks a provider, and note at the end what it has learned of the limits."""
    from engine.pipeline import budget

    if registry.model_class(config.of_model()).needs(config).has_device:
        yield None
        return
    with budget.shared(config, chosen.max_actors, max_tokens) as shared:
        try:
            yield shared
        finally:
            if (found := budget.standing(shared)) is not None:
                tally.limits = found.limits


def _work(asked: Survey, chosen: Resources, budget: Shared | None) -> Work:
    from engine.pipeline.worker import Work
    from engine.sources.rows import Selection

    config = asked.config
    share = asked.standing.plan.pending_bytes // chosen.max_actors
    return Work(
        model=registry.suited(config.of_model(), share),
        identity=asked.identity,
        selection=Selection.of(config, asked.job.kept_types),
        id_column=config.id_column,
        num_threads=chosen.num_threads,
        num_gpus=chosen.num_gpus,
        log_level=logging.getLogger("engine").getEffectiveLevel(),
        price=price_of(config),
        budget=budget,
        output_dtype=config.output_dtype,
    )


def _calibrated(asked: Survey, chosen: Resources, work: Work, tally: Tally, owned: Lease) -> Work:
    """Give int8 its scale, which is found before the first shard and holds for all."""
    if work.output_dtype != "int8":
        return work
    from engine.pipeline import calibration

    adopt_calibration(asked)
    found, is_new = calibration.calibrated(
        asked.ledger.storage,
        work,
        asked.standing.plan.pending,
        chosen,
        stall_s=asked.config.stall_s,
        still_ours=owned.check,
    )
    if is_new and found.usage is not None:
        tally.add_use(found.usage)
    return replace(work, scale=found.scale)
