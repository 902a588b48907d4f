"""The survey: a job looked at from both sides, what its config asks for and what its output holds. It writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from engine.config import JobConfig, validated
from engine.errors import ConfigError, CorruptOutput, Refused, SourceChanged, SourceError
from engine.ledger import Job, Ledger
from engine.models import registry
from engine.plan import Plan, choose_shard_rows, make_plan
from engine.schema import FORMAT_VERSION, fingerprint_of
from engine.sources.inventory import Inventory, list_inputs
from engine.sources.parquet import FileShape, read_shapes
from engine.storage import open_storage
from engine.version import __version__


@dataclass(frozen=True, slots=True)
class Survey:
    """A job and its output, and what is between them."""

    config: JobConfig
    """With the model's revision pinned."""
    identity: dict[str, Any]
    """Of the model."""
    ledger: Ledger
    job: Job
    """As it is stored, or as a first run would store it."""
    plan: Plan
    missing: frozenset[str]
    """Committed shards whose part is gone; the plan has them as pending."""
    unrecorded: frozenset[str]
    """Pending shards that have a part: a run died before it could write their record."""
    warnings: tuple[str, ...]


def survey(config: JobConfig) -> Survey:
    """
    List the inputs, cut them, and take away what is committed.

    Raises:
        SourceError: An input is missing, unreadable or has other columns.
        FingerprintMismatch: The output is of another model or setting.
        SourceChanged: A file is no longer what its committed rows were made from.
    """
    ledger = Ledger(open_storage(config.output))
    inventory = list_inputs(config.source, outside=config.output)
    pinned = config.model_copy(update={"revision": registry.pinned(config).revision})
    identity = registry.identity(pinned)
    shapes = read_shapes(inventory.files, text_column=config.text_column, kept=config.kept_columns)
    asked = _job(pinned, identity, inventory, shapes)
    stored = ledger.job()
    if stored is not None:
        ledger.check(stored, asked.fingerprint, asked.decided_by)
        _check_stored(config, stored, asked)
    job = stored or asked
    recorded, parts = ledger.committed(), ledger.part_ids()
    missing = frozenset(recorded - parts)
    todo = make_plan(shapes, shard_rows=job.shard_rows, fingerprint=job.fingerprint, committed=recorded - missing)
    warnings = [*_unknown_warnings(ledger, todo, inventory, job)]
    if missing:
        warnings.append(f"{len(missing)} parts are gone although they were committed: a run makes them again")
    if not todo.num_rows:
        warnings.append("the source has no rows")
    unrecorded = frozenset(shard.id for shard in todo.pending if shard.id in parts)
    return Survey(pinned, identity, ledger, job, todo, missing, unrecorded, tuple(warnings))


def opened(output: str) -> tuple[Ledger, Job]:
    """
    Open an output that exists.

    Raises:
        ConfigError: If there is none.
    """
    ledger = Ledger(open_storage(output))
    job = ledger.job()
    if job is None:
        raise ConfigError(f"{output} is not an output of the engine: it has no _engine/job.json; check the path")
    return ledger, job


def stored_config(job: Job, output: str) -> JobConfig:
    """Return the config that an output was begun with, for where the output is now."""
    try:
        return validated(JobConfig, job.config | {"output": output})
    except ConfigError as error:
        raise CorruptOutput(f"the config in {output}/_engine/job.json is not this engine's: {error.message}") from None


def resurvey(output: str) -> tuple[Ledger, Job, Survey | None, str]:
    """Open an output and survey its stored config; without a survey, the last item says why its source cannot be read."""
    ledger, job = opened(output)
    try:
        return ledger, job, survey(stored_config(job, output)), ""
    except (SourceError, SourceChanged) as error:
        return ledger, job, None, f"what is left to do cannot be told: {error.message}"


def _job(config: JobConfig, identity: dict[str, Any], inventory: Inventory, shapes: list[FileShape]) -> Job:
    decided_by = {**config.settings(), **identity, "format_version": FORMAT_VERSION}
    return Job(
        fingerprint=fingerprint_of(decided_by),
        decided_by=decided_by,
        shard_rows=config.shard_rows or choose_shard_rows(shapes),
        base=inventory.base,
        kept_types=dict(shapes[0].kept_types) if shapes else {},
        config=config.model_dump(mode="json"),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        engine_version=__version__,
        format_version=FORMAT_VERSION,
    )


def _check_stored(config: JobConfig, stored: Job, asked: Job) -> None:
    """Refuse what the fingerprint does not cover and an output still cannot change: its cuts and its columns."""
    if config.shard_rows and config.shard_rows != stored.shard_rows:
        raise Refused(
            f"shard_rows: {config.output} was cut into shards of about {stored.shard_rows} rows, and {config.shard_rows} "
            "are asked for: leave --shard-rows out, or use another output folder"
        )
    for name in ("id_column", "keep"):
        if stored.config.get(name) != asked.config[name]:
            raise Refused(
                f"{name}: the parts in {config.output} were made with {stored.config.get(name)!r}, and {asked.config[name]!r} "
                "is asked for: use the same columns, or another output folder"
            )
    if stored.kept_types != asked.kept_types:
        raise Refused(
            f"the kept columns have other types than in {config.output}: {asked.kept_types} against {stored.kept_types}; "
            "make them the same, or use another output folder"
        )


def _unknown_warnings(ledger: Ledger, todo: Plan, inventory: Inventory, job: Job) -> list[str]:
    """
    Look at committed shards that the inventory does not have.

    Their rows stay in the output. If their file is there with other content, or the source is named from another folder, going
    on could embed rows a second time under another id, so that is refused.
    """
    if not todo.unknown:
        return []
    listed = {file.path: file for file in inventory.files}
    gone: set[str] = set()
    for record in ledger.records(sorted(todo.unknown)):
        file = listed.get(record.path)
        if file is not None:
            raise SourceChanged(
                f"{file.location} changed since rows of it were committed (then {record.size} bytes, now {file.size}; or "
                "another time of change): restore it as it was, or embed the new content into another output folder. "
                "What was committed is kept"
            )
        gone.add(record.path)
    if inventory.base != job.base:
        raise Refused(
            f"{ledger.root} was made from {job.base}, and {len(gone)} of its inputs are not below {inventory.base} "
            f"({min(gone)}): name the source as the first run did, or use another output folder"
        )
    return [f"{len(gone)} inputs are gone whose rows are in the output, and stay there: {min(gone)}"]
