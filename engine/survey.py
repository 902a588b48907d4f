"""The survey: a job looked at from both sides, what its config asks for and what its output holds. It writes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from engine.config import JobConfig, validated
from engine.errors import ConfigError, CorruptOutput, EngineError, Refused, SourceChanged, SourceError
from engine.ledger import Ledger
from engine.models import registry
from engine.planning import Plan, choose_shard_rows, make_plan
from engine.schema import FORMAT_VERSION, InputFile, Job, fingerprint_of, utc_now
from engine.sources import in_memory, indexes
from engine.sources.formats import joined, new_shapes, scan
from engine.sources.inventory import Inventory, absolute, is_there, list_inputs
from engine.sources.opening import is_staged_source
from engine.sources.rows import Selection
from engine.sources.shape import FileShape
from engine.storage import Storage, open_storage
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

    @property
    def told(self) -> list[str]:
        """The warnings, and which inputs changed: as long as their new rows did not take the place of the former ones."""
        if not self.former:
            return list(self.warnings)
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
    former, warnings = _unknown(ledger, todo, gone - missing, inventory, job)
    pending = {shard.id for shard in todo.pending}
    unplanned = parts - shards.committed - shards.switches.named.keys() - pending  # none, as a rule
    listed = {file.path for file in inventory.files} if unplanned else set()
    for shard_id, path in ledger.inputs_of_parts(unplanned):
        if path in listed:
            former[path] = former.get(path, frozenset()) | {shard_id}
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
    unrecorded = frozenset(pending & parts)
    is_switching = bool(shards.switches.open)
    return Standing(
        todo, missing, lost, unrecorded, tuple(warnings), inventory.files, former, is_switching, shards.switches.last
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


def _unknown(
    ledger: Ledger, todo: Plan, lost: AbstractSet[str], inventory: Inventory, job: Job
) -> tuple[dict[str, frozenset[str]], list[str]]:
    """
    Look at committed shards that the inventory does not have, those whose part is lost among them.

    Rows of a changed input stay in the output until its new ones take their place; those of one that is gone stay. Where going on could
    embed rows a second time under another id, it is refused: their file has another name, or the source is named from another folder.

    Returns:
        The shards of changed inputs, by path, and warnings.
    """
    if inventory.base != job.base and len(todo.pending) == todo.num_shards:
        raise Refused(
            f"{ledger.root} was begun for sources below {job.base}, and none of the shards below {inventory.base} is in it: "
            "name the source as the first run did, or use another output folder"
        )
    if not todo.unknown and not lost:
        return {}, []
    former, absent = _former(ledger, todo, lost, inventory)
    if inventory.base != job.base and absent:
        raise Refused(
            f"{ledger.root} was made from {job.base}, and {len(absent)} of its inputs are not below {inventory.base} "
            f"({min(absent)}): name the source as the first run did, or use another output folder"
        )
    return {path: frozenset(ids) for path, ids in former.items()}, list(_told(absent, job))


def _former(
    ledger: Ledger, todo: Plan, lost: AbstractSet[str], inventory: Inventory
) -> tuple[dict[str, set[str]], set[str]]:
    """Return the shards of changed inputs, by path, and the paths of the inputs that the inventory does not have."""
    listed = {file.path for file in inventory.files}
    # Of those with rows to do: in object stores, where equal content has an equal version, copies look like one file.
    same_file = {(shard.file.size, shard.file.version): shard.file for shard in todo.pending}
    former: dict[str, set[str]] = defaultdict(set)
    absent: set[str] = set()
    for record in ledger.records(sorted(todo.unknown | lost)):
        if record.path in listed:
            former[record.path].add(record.shard_id)
        elif record.shard_id not in lost:
            if (file := same_file.get((record.size, record.version))) is not None:
                raise SourceChanged(
                    f"{file.location} looks like {record.path} under another name, and rows of that are committed: name it as it was, "
                    "or use another output folder"
                )
            absent.add(record.path)
    return former, absent


def _told(absent: set[str], job: Job) -> Iterator[str]:
    """Say what becomes of rows of inputs that are not there any more."""
    gone = {path for path in absent if not is_there(job.base, path)}
    if gone:
        yield f"{len(gone)} inputs are gone whose rows are in the output, and stay there: {min(gone)}"
    if absent - gone:
        yield (
            f"{len(absent - gone)} inputs are not in the source any more whose rows are in the output, and stay there: "
            f"{min(absent - gone)}"
        )
