"""The survey: a job looked at from both sides, what its config asks for and what its output holds. It writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config import JobConfig, validated
from engine.errors import ConfigError, CorruptOutput, EngineError, Refused, SourceError
from engine.ledger import Ledger
from engine.models import registry
from engine.planning import Plan, choose_shard_rows, make_plan
from engine.schema import FORMAT_VERSION, InputFile, Job, fingerprint_of, utc_now
from engine.sources import in_memory, indexes
from engine.sources.formats import joined, new_shapes, scan
from engine.sources.inventory import Inventory, absolute, list_inputs
from engine.sources.opening import MEMORY, is_staged_source
from engine.sources.rows import Selection
from engine.sources.shape import FileShape
from engine.storage import Storage, open_storage
from engine.unlisted import unlisted
from engine.version import __version__
from engine.wording import count


@dataclass(frozen=True, slots=True)
class Standing:
    """An output against its source: what is left to do, and what is odd."""

    plan: Plan
    missing: frozenset[str]
    """Committed shards whose part is gone, and that the plan has as pending."""
    lost: frozenset[str]
    """Committed shards whose part is gone, and whose input is gone too."""
    unrecorded: frozenset[str]
    """Pending shards that have a part: a run died before it could write their record."""
    warnings: tuple[str, ...]
    files: tuple[InputFile, ...] = ()
    """Of the source."""
    former: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """
    Shards of other versions of inputs, by the inputs' paths: others take their place. They are committed, or a run died before it
    could write their record.
    """
    is_switching: bool = False
    """A run died while some took the place of others."""
    last_switch: int = 0
    """Number of the last time that some did."""
    is_waiting: bool = False
    """Shards of the plan are committed, and held until they take the place of others."""
    is_recut: bool = False
    """
    A source in memory is not what it was. Which rows of its former blocks are in which of the new ones is not known, so all new ones take the
    place of the former at once.
    """
    committed: frozenset[str] = frozenset()
    """All shards that had a record, and that no others had taken the place of."""

    @property
    def known(self) -> frozenset[str]:
        """All shards that may be committed without another run having done so since."""
        return self.committed.union(shard.id for shard in self.plan.pending)

    @property
    def told(self) -> list[str]:
        """The warnings, and which inputs changed: as long as their new rows did not take the place of the former ones."""
        if not self.former:
            return list(self.warnings)
        if self.is_recut:
            moved = "the source changed since rows of it were committed: its new blocks take the place of the former ones once all of them are "
            return [f"{moved}embedded", *self.warnings]
        whose = "it" if len(self.former) == 1 else "them"
        changed = (
            f"{count(len(self.former), 'input')} changed since rows of {whose} were committed: the new rows take the place of the former "
            f"ones once they are embedded: {min(self.former)}"
        )
        return [changed, *self.warnings]


@dataclass(frozen=True, slots=True)
class Survey:
    """A job that is asked for, and how far its output is."""

    standing: Standing
    config: JobConfig
    """With the model's revision pinned."""
    identity: dict[str, Any]
    """Of the model."""
    ledger: Ledger
    job: Job
    """As it is stored, or as a first run would store it."""
    found: tuple[FileShape, ...] = ()
    """Of files that had to be scanned: for the run to keep, once the output is its own."""

    def left(self) -> set[str]:
        """Return the ids of the shards that were pending and are not committed yet."""
        return {shard.id for shard in self.standing.plan.pending} - self.ledger.committed()

    def holds(self) -> bool:
        """Say whether the output has nothing but what was found and what was left to do: a run that was taken for dead may have gone on."""
        return self.ledger.committed() <= self.standing.known


def survey(config: JobConfig, inputs: Storage | None = None) -> Survey:
    """
    List the inputs, cut them, and take away what is committed.

    Args:
        config: Of the job.
        inputs: Where a source in memory is staged; in the output, unless that is not to be written.

    Raises:
        SourceError: An input is missing, unreadable or has other columns.
        FingerprintMismatch: The output is of another model or setting.
        SourceChanged: A file with committed rows has another name now.
    """
    ledger = Ledger(open_storage(config.output, is_single_writer=config.unsafe_single_writer))
    if is_staged_source(config.source):
        inventory = in_memory.listed(config.source, inputs or ledger.storage)
    else:
        inventory = list_inputs(config.source, outside=config.output)
    found = registry.pinned(config)
    pinned = config.model_copy(update={name: getattr(found, name) for name in ("model", "revision", "base_url")})
    identity = registry.identity(pinned)
    stored = ledger.job()
    shapes, scanned = _shapes(ledger, inventory, Selection.of(config, stored.kept_types if stored else None))
    asked = _job(pinned, identity, inventory, shapes)
    if stored is not None:
        ledger.check(stored, asked.fingerprint, asked.decided_by)
        _check_stored(config, stored, asked)
    job = stored or asked
    standing = _compare(ledger, job, inventory, shapes)
    ledger = ledger.looked_at(standing.last_switch, standing.former)
    return Survey(standing, pinned, identity, ledger, job, scanned)


def opened(output: str) -> tuple[Ledger, Job]:
    """
    Open an output that is there.

    Raises:
        ConfigError: If there is no output.
        CorruptOutput: If its job.json cannot be read.
    """
    ledger = Ledger(open_storage(output))
    job = ledger.job()
    if job is None:
        raise ConfigError(f"{output} is not an output of the engine: it has no _engine/job.json; check the path")
    if job.config.get("unsafe_single_writer"):
        ledger = Ledger(open_storage(output, is_single_writer=True))
    return ledger, job


def resurvey(output: str) -> tuple[Ledger, Job, Standing | None, EngineError | None]:
    """
    Open an output, and compare it with the source that it was begun with. The model is not looked for.

    Returns:
        The ledger, the job, what was found, and, if there are no findings, why the source cannot be compared.

    Raises:
        ConfigError: If there is no output.
        CorruptOutput: If its job.json cannot be read.
    """
    ledger, job = opened(output)
    config = stored_config(job, output)
    try:
        if is_staged_source(config.source):
            now = in_memory.current(ledger.storage)
            inventory = in_memory.listed((now,) if now else config.source, ledger.storage)
        else:
            inventory = list_inputs(config.source)
        shapes, _ = _shapes(ledger, inventory, Selection.of(config, job.kept_types))
        return ledger, job, _compare(ledger, job, inventory, shapes), None
    except (SourceError, Refused, CorruptOutput) as error:
        return ledger, job, None, error


def stored_config(job: Job, output: str) -> JobConfig:
    """Return the config that an output was begun with, for where the output is now."""
    try:
        return validated(JobConfig, job.config | {"output": output})
    except ConfigError as error:
        raise CorruptOutput(f"the config in {output}/_engine/job.json is not this engine's: {error.message}") from None


def _shapes(
    ledger: Ledger, inventory: Inventory, selection: Selection
) -> tuple[list[FileShape], tuple[FileShape, ...]]:
    """Return the shapes of all files, and of those that the output does not know yet, as their scan found them."""
    known = indexes.load(ledger.storage)
    shapes = scan(inventory.files, selection, known)
    return joined(shapes, selection), new_shapes(shapes, known)


def _compare(ledger: Ledger, job: Job, inventory: Inventory, shapes: list[FileShape]) -> Standing:
    # In this order: a record that is listed has had its part for some time.
    shards, parts = ledger.shards(), ledger.part_ids()
    gone = shards.committed - parts
    todo = make_plan(shapes, shard_rows=job.shard_rows, fingerprint=job.fingerprint, committed=shards.committed - gone)
    missing = frozenset(shard.id for shard in todo.pending if shard.id in gone)
    pending = {shard.id for shard in todo.pending}
    unplanned = parts - shards.committed - shards.switches.named.keys() - pending  # none, as a rule
    former, warnings = unlisted(ledger, todo, gone - missing, unplanned, inventory, job)
    if missing:
        warnings.append(f"{len(missing)} parts are gone although they were committed: a run makes them again")
    lost = gone - missing - frozenset().union(*former.values())
    if lost:
        warnings.append(
            f"{len(lost)} parts are gone although they were committed, and so are their inputs: "
            "restore either from a copy"
        )
    if not todo.num_rows:
        warnings.append("the source has no rows")
    return Standing(
        todo,
        missing,
        lost,
        unrecorded=frozenset(pending & parts),
        warnings=tuple(warnings),
        files=inventory.files,
        former=former,
        is_switching=bool(shards.switches.open),
        last_switch=shards.switches.last,
        is_waiting=not shards.held <= todo.unknown,
        is_recut=inventory.base == MEMORY and bool(former),
        committed=shards.committed,
    )


def _job(config: JobConfig, identity: dict[str, Any], inventory: Inventory, shapes: list[FileShape]) -> Job:
    model = registry.model_class(config)
    decided_by = {**config.settings(model.options), **identity, "format_version": FORMAT_VERSION}
    return Job(
        fingerprint=fingerprint_of(decided_by),
        decided_by=decided_by,
        shard_rows=config.shard_rows
        or choose_shard_rows(shapes, max_rows=model.max_shard_rows, max_bytes=model.max_shard_bytes),
        base=inventory.base,
        kept_types=dict(shapes[0].kept_types) if shapes else {},
        config=config.model_dump(mode="json") | {"source": [absolute(source) for source in config.source]},
        created_at=utc_now(),
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
