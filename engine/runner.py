"""The story of a job, told in order: plan, run, status, verify; and `embed` for a few texts without any of it."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from engine import verification
from engine.config import ModelConfig, validated
from engine.errors import ConfigError, CorruptOutput, EngineError
from engine.models import registry
from engine.plan import parcels
from engine.results import PlanResult, RunResult, RunStarted, ShardDone, StatusResult
from engine.sources.texts import reject_reason
from engine.survey import resurvey, survey

if TYPE_CHECKING:
    from engine.config import JobConfig
    from engine.models.base import BaseEmbeddingModel, Embeddings, Vectors
    from engine.pipeline.resources import Resources
    from engine.pipeline.stream import Stream
    from engine.results import VerifyResult
    from engine.schema import Receipt
    from engine.survey import Survey

logger = logging.getLogger(__name__)

OnEvent = Callable[[RunStarted | ShardDone], None]


def plan(config: JobConfig) -> PlanResult:
    """Say what a run would do. Writes nothing, loads no model, starts no Ray."""
    found = survey(config)
    todo = found.plan
    return PlanResult(
        output=found.ledger.root,
        model=config.model,
        fingerprint=found.job.fingerprint,
        num_files=todo.num_files,
        num_rows=todo.num_rows,
        num_bytes=todo.num_bytes,
        num_shards=todo.num_shards,
        shard_rows=todo.shard_rows,
        done_shards=todo.num_shards - len(todo.pending),
        done_rows=todo.done_rows,
        pending_shards=len(todo.pending),
        pending_rows=todo.pending_rows,
        pending_bytes=todo.pending_bytes,
        warnings=list(found.warnings),
    )


def run(config: JobConfig, on_event: OnEvent | None = None) -> RunResult:
    """
    Embed what is pending, and commit shard by shard. Run it again to go on where it was, however it ended.

    Args:
        config: Of the job.
        on_event: Called as the embedding starts, and after each shard.

    Raises:
        ConfigError: Before anything is written.
        Refused: The output is another job's, or an input is no longer what was committed; nothing was touched.
        ProviderError: The model fails whatever the text.
    """
    tally = Tally()
    found = survey(config)
    if found.ledger.claim(found.job) != found.job:
        found = survey(config)  # another driver was first, and its cuts hold
    found.ledger.storage.collect_staging()
    for shard_id in found.missing:
        found.ledger.set_aside(shard_id)
    tally.done_before_rows = found.plan.done_rows
    if _adopt(found, tally):
        found = survey(config)
    if found.plan.pending:
        _stream(found, tally, on_event or (lambda _: None))
    logger.info("embedding done: %d embeddings, %d rejects", tally.num_rows, tally.num_rejects)
    return _run_result(found, tally)


def status(output: str) -> StatusResult:
    """Say where an output stands, by its records; and what is pending, if its source can be read from here."""
    ledger, job, found, problem = resurvey(output)
    reasons: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    embed_s, dimension = 0.0, 0
    for record in ledger.records():
        totals["shards"] += 1
        totals["rows"] += record.num_rows
        totals["rejects"] += record.num_rejects
        totals["tokens"] += record.usage.num_tokens
        totals["bytes"] += record.num_bytes
        reasons.update(record.reasons)
        embed_s += record.usage.embed_s
        dimension = record.dimension
    return StatusResult(
        output=ledger.root,
        model=str(job.config.get("model")),
        fingerprint=job.fingerprint,
        created_at=job.created_at,
        num_shards=totals["shards"],
        num_rows=totals["rows"],
        num_rejects=totals["rejects"],
        reasons=dict(reasons.most_common()),
        num_tokens=totals["tokens"],
        num_bytes=totals["bytes"],
        dimension=dimension,
        embed_s=round(embed_s, 3),
        pending_shards=len(found.plan.pending) if found else None,
        pending_rows=found.plan.pending_rows if found else None,
        warnings=list(found.warnings) if found else [problem],
    )


def verify(
    output: str,
    level: Literal["quick", "footers", "full", "sample"] = "quick",
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
    ledger, job, found, problem = resurvey(output)
    result = verification.verify(
        ledger,
        job,
        level=level,
        set_aside=set_aside,
        sample_rows=sample_rows,
        inventory_plan=found.plan if found else None,
    )
    result.warnings.extend(found.warnings if found else [problem])
    return result


def embed(texts: Sequence[str], **options: Any) -> Vectors:
    """
    Embed a few texts here and now: no cluster, no files. It works inside a running event loop too.

    Args:
        texts: Neither empty nor blank, each a string.
        options: `model` and the other fields of `ModelConfig`. The model stays loaded for the next call.

    Returns:
        Shape (len(texts), dimension), float32.

    Raises:
        EngineError: If a text cannot be embedded; says which, by position, and why.
    """
    if isinstance(texts, str):
        raise ConfigError("embed takes a list of texts; for one text, give a list of one")
    for position, text in enumerate(texts):
        if (reason := reject_reason(text)) is not None:
            raise EngineError(f"text {position} cannot be embedded: {reason}")
    answer = _embed_aside(_resident(validated(ModelConfig, options).model_dump_json()), list(texts))
    if answer.rejects:
        position, reason = min(answer.rejects.items())
        raise EngineError(f"text {position} cannot be embedded: {reason}")
    return answer.vectors


@dataclass(slots=True)
class Tally:
    """What has become of a run so far. The driver holds this, and never a vector."""

    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    first_rows: int = 0
    num_rows: int = 0
    num_rejects: int = 0
    num_tokens: int = 0
    num_shards: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    devices: set[str] = field(default_factory=set)
    done_before_rows: int = 0
    num_actors: int = 0
    interrupted: bool = False

    def add(self, receipt: Receipt) -> None:
        """Count one shard."""
        self.last = time.perf_counter()
        self.num_rows += receipt.num_rows
        self.num_rejects += receipt.num_rejects
        self.num_tokens += receipt.num_tokens
        self.num_shards += 1
        self.reasons.update(json.loads(receipt.reasons))
        self.devices.add(receipt.device)
        if self.first is None:
            self.first, self.first_rows = self.last, self.num_rows

    @property
    def rows_per_s(self) -> float:
        """Rows per second after the first shard, which carries the cold start; of the whole if there is only one."""
        if self.first is None or self.last is None:
            return 0.0
        if self.last > self.first:
            return (self.num_rows - self.first_rows) / (self.last - self.first)
        return self.num_rows / max(self.last - self.started, 1e-9)


def _adopt(found: Survey, tally: Tally) -> int:
    """Finish the commits of parts that a dead run left without a record; what cannot be read is set aside and made again."""
    shards = [shard for shard in found.plan.pending if shard.id in found.unrecorded]
    for shard in shards:
        try:
            tally.add(found.ledger.adopt(shard, found.job.fingerprint))
        except CorruptOutput as error:
            logger.warning("%s; it was not committed, and is set aside and made again", error.message)
            found.ledger.set_aside(shard.id)
    return len(shards)


def _stream(found: Survey, tally: Tally, on_event: OnEvent) -> None:
    """Send the pending shards through Ray, and count their receipts until they are all in or somebody interrupts."""
    from engine.pipeline import cluster, resources

    todo = found.plan
    groups = list(parcels(todo.pending, todo.shard_rows))
    with _interruptible(tally), cluster.connected(found.config.address):
        chosen = resources.decide(found.config, cluster.capacity(), len(groups))
        tally.num_actors = chosen.max_actors
        logger.info("embedding started: %d texts in %d shards", todo.pending_rows, len(todo.pending))
        on_event(
            RunStarted(
                pending_rows=todo.pending_rows,
                pending_shards=len(todo.pending),
                done_rows=todo.done_rows,
                num_rows=todo.num_rows,
                num_actors=chosen.max_actors,
                device="gpu" if chosen.num_gpus else "cpu",
                output=found.ledger.root,
            )
        )
        with closing(_pipeline(found, chosen, groups).receipts()) as receipts:
            for receipt in receipts:
                tally.add(receipt)
                on_event(ShardDone(receipt.num_rows, receipt.num_rejects, receipt.num_tokens, receipt.num_bytes))


def _pipeline(found: Survey, chosen: Resources, groups: list[Any]) -> Stream:
    from engine.pipeline.stream import Stream
    from engine.pipeline.worker import Work

    config = found.config
    work = Work(
        model=validated(ModelConfig, config.model_dump(include=set(ModelConfig.model_fields))),
        identity=found.identity,
        text_column=config.text_column,
        id_column=config.id_column,
        columns=config.kept_columns,
        num_threads=chosen.num_threads,
        log_level=logging.getLogger("engine").getEffectiveLevel(),
    )
    return Stream(groups, work, found.ledger, found.job.fingerprint, chosen)


@contextmanager
def _interruptible(tally: Tally) -> Iterator[None]:
    """End a run on Ctrl-C, a notebook's stop button or SIGTERM as on its last receipt: what is committed is committed."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _raise_interrupt) if in_main else None
    try:
        yield
    except KeyboardInterrupt:
        tally.interrupted = True
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _run_result(found: Survey, tally: Tally) -> RunResult:
    config = found.config
    total_rejects = None
    if config.max_rejects is not None:
        total_rejects = sum(record.num_rejects for record in found.ledger.records())
    end = tally.last or time.perf_counter()
    return RunResult(
        output=found.ledger.root,
        model=config.model,
        num_rows=tally.num_rows,
        num_rejects=tally.num_rejects,
        reasons=dict(tally.reasons.most_common()),
        num_tokens=tally.num_tokens,
        num_shards=tally.num_shards,
        done_before_rows=tally.done_before_rows,
        pending_rows=max(found.plan.num_rows - tally.done_before_rows - tally.num_rows - tally.num_rejects, 0),
        seconds=round(end - tally.started, 3),
        start_s=round((tally.first or end) - tally.started, 3),
        rows_per_s=round(tally.rows_per_s, 3),
        num_actors=tally.num_actors,
        device=", ".join(sorted(tally.devices - {""})),
        interrupted=tally.interrupted,
        total_rejects=total_rejects,
        warnings=list(found.warnings),
    )


@lru_cache(maxsize=2)
def _resident(config: str) -> BaseEmbeddingModel:
    """Build a model once for all calls of `embed` with the same options."""
    return registry.build(ModelConfig.model_validate_json(config))


def _embed_aside(model: BaseEmbeddingModel, texts: list[str]) -> Embeddings:
    """Run the model's coroutine to its end on the one loop that all calls share, in a thread beside the caller's."""
    return asyncio.run_coroutine_threadsafe(model.embed_rows(texts), _own_loop()).result()


@lru_cache(maxsize=1)
def _own_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="engine-embed", daemon=True).start()
    return loop
