"""
A Lance dataset: all columns of an output, and `_shard`, which says of each row which shard it is of.

That column is the truth of what was exported: it is in one commit with the rows. Fragments are written first, a group of parts after the
other, where no version of the dataset names them yet; then one commit takes all of them into it, and takes out rows whose parts have left the
output. So a reader sees the output as it was, or as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import ConfigError, EngineError, Refused
from engine.exporting.staging import SUFFIX, staging

if TYPE_CHECKING:
    from pathlib import Path

    from engine.exporting.staging import Staging
    from engine.snapshot import LivePart, Snapshot

SHARD = "_shard"
GROUP_BYTES = 1 << 28
"""Of vectors, in the fragments that a kill makes it write again."""
_JOB = "embedding_engine_job"
LANCE_MISSING = "exporting to Lance needs pylance: pip install 'embedding-engine[export]'"


def export(snapshot: Snapshot, target: Path) -> tuple[int, int]:
    """
    Make `target` the rows of `snapshot`: what it lacks is appended, what the output has no more is deleted.

    Args:
        snapshot: Of the output.
        target: The dataset's folder.

    Returns:
        How many rows were appended and deleted.

    Raises:
        Refused: If another process is at it, or what is there is no export of this output.
        CorruptOutput: If a part is missing or damaged.
    """
    if not target.with_name(target.name + SUFFIX).exists() and _Change(snapshot, target).is_empty:
        return 0, 0
    with staging(target) as stage:
        change = _Change(snapshot, target, is_begun=stage.progress().get("job") == snapshot.job_key)
        if not change.is_empty:
            change.commit(list(change.fragments(stage)))
            after = _Change(snapshot, target)
            if not after.is_empty:
                raise EngineError(
                    f"{target} was changed by another program meanwhile: {after.num_missing:,} rows are not in it, and "
                    f"{after.num_stale:,} are too many. Run the same command again"
                )
    return change.num_missing, change.num_stale


class _Change:
    """
    What is between an output and a Lance dataset.

    Args:
        snapshot: Of the output.
        target: The dataset's folder.
        is_begun: A former process has begun this export: there may be files that no version of the dataset names.
    """

    def __init__(self, snapshot: Snapshot, target: Path, *, is_begun: bool = False) -> None:
        self._snapshot = snapshot
        self._target = target
        self._dataset = _opened(target, snapshot, is_begun)
        there = _rows_by_shard(self._dataset) if self._dataset is not None else Counter[str]()
        wanted = {part.shard_id: part.num_rows for part in snapshot.parts}
        self._missing = [part for part in snapshot.parts if part.num_rows != there[part.shard_id]]
        self._stale = {shard_id for shard_id, rows in there.items() if wanted.get(shard_id) != rows}
        self.num_missing = sum(part.num_rows for part in self._missing)
        self.num_stale = sum(there[shard_id] for shard_id in self._stale)

    @property
    def is_empty(self) -> bool:
        """The dataset is the output."""
        return self._dataset is not None and not self._missing and not self._stale

    def fragments(self, stage: Staging) -> Iterator[Any]:
        """Write what is missing, group by group, those left out that a killed process has written."""
        from lance.fragment import FragmentMetadata

        missing = {part.shard_id for part in self._missing}
        noted = stage.progress() if stage.progress().get("job") == self._snapshot.job_key else {}
        groups = [
            group for group in noted.get("groups", []) if self._is_there(group) and missing >= set(group["shards"])
        ]
        stage.note(job=self._snapshot.job_key, groups=groups)
        self._sweep(groups)
        for group in groups:
            yield from (FragmentMetadata.from_json(json.dumps(fragment)) for fragment in group["fragments"])
        written = {shard_id for group in groups for shard_id in group["shards"]}
        for parts in self._groups([part for part in self._missing if part.shard_id not in written]):
            fragments = self._write(parts)
            shards = [part.shard_id for part in parts]
            groups.append({"shards": shards, "fragments": [fragment.to_json() for fragment in fragments]})
            stage.note(job=self._snapshot.job_key, groups=groups)
            yield from fragments

    def commit(self, fragments: Sequence[Any]) -> None:
        """Take fragments into the dataset and rows of other parts out of it, at once."""
        lance = _lance()
        if self._dataset is None:
            lance.LanceDataset.commit(str(self._target), lance.LanceOperation.Overwrite(self._schema, fragments))
            return
        operation = lance.LanceOperation.Append(fragments)
        if self._stale:
            removed, updated = self._without_stale()
            operation = lance.LanceOperation.Update(
                removed_fragment_ids=removed, updated_fragments=updated, new_fragments=list(fragments)
            )
        lance.LanceDataset.commit(self._dataset, operation, read_version=self._dataset.version)

    @property
    def _schema(self) -> pa.Schema:
        schema = self._snapshot.schema.append(pa.field(SHARD, pa.string()))
        return schema.with_metadata({_JOB: self._snapshot.job_key})

    def _groups(self, parts: Sequence[LivePart]) -> Iterator[list[LivePart]]:
        """Put neighbours together until they are large enough for fragments of their own."""
        group_rows = max(1, GROUP_BYTES // (self._snapshot.width * self._snapshot.dtype.itemsize))
        group: list[LivePart] = []
        num_grouped = 0
        for part in parts:
            if part.num_rows:
                group.append(part)
                num_grouped += part.num_rows
            if num_grouped >= group_rows:
                yield group
                group, num_grouped = [], 0
        if group:
            yield group

    def _write(self, parts: Sequence[LivePart]) -> list[Any]:
        lance = _lance()
        where = str(self._target) if self._dataset is None else self._dataset
        errors: list[EngineError] = []
        reader = pa.RecordBatchReader.from_batches(self._schema, self._rows(parts, errors))
        mode = "create" if self._dataset is None else "append"
        try:
            fragments = lance.fragment.write_fragments(reader, where, schema=self._schema, mode=mode)
        except (OSError, ValueError, RuntimeError):
            if errors:
                raise errors[0] from None
            raise
        num_rows, wanted = sum(fragment.physical_rows for fragment in fragments), sum(part.num_rows for part in parts)
        if num_rows != wanted:
            raise EngineError(f"Lance has written {num_rows:,} rows of {wanted:,}: run the same command again")
        return list(fragments)

    def _rows(self, parts: Sequence[LivePart], errors: list[EngineError]) -> Iterator[pa.RecordBatch]:
        """Yield rows with their shards, and keep our error: Lance, which reads them, passes on an error of its own."""
        try:
            for part in parts:
                for batch in self._snapshot.only([part]).batches():
                    shard = pa.repeat(pa.scalar(part.shard_id), batch.num_rows)
                    yield pa.RecordBatch.from_arrays([*batch.columns, shard], schema=self._schema)
        except EngineError as error:
            errors.append(error)
            raise

    def _without_stale(self) -> tuple[list[int], list[Any]]:
        """Return which fragments have no row but those of other parts, and, of those with some, what they are without them."""
        removed, updated = [], []
        for fragment in self._dataset.get_fragments():
            there = _rows_by_shard(fragment)
            stale = sorted(there.keys() & self._stale)
            if there and len(stale) == len(there):
                removed.append(fragment.fragment_id)
            elif stale:
                listed = ", ".join(f"'{shard_id}'" for shard_id in stale)
                updated.append(fragment.delete(f"{SHARD} IN ({listed})"))
        return removed, updated

    def _sweep(self, groups: Sequence[dict[str, Any]]) -> None:
        """Delete what a killed process wrote and did not live to note, as long as no version of the dataset can name it."""
        folder = self._target / "data"
        if self._dataset is None and folder.is_dir():
            named = {file["path"] for group in groups for fragment in group["fragments"] for file in fragment["files"]}
            for path in folder.iterdir():
                if path.name not in named:
                    path.unlink()

    def _is_there(self, group: dict[str, Any]) -> bool:
        """Say whether all files of a group that was noted are there."""
        paths = [file["path"] for fragment in group["fragments"] for file in fragment["files"]]
        return all((self._target / "data" / path).exists() for path in paths)


def _opened(target: Path, snapshot: Snapshot, is_begun: bool) -> Any:
    """Return the dataset at `target`, or None if there is none yet."""
    lance = _lance()
    if not target.exists():
        return None
    try:
        dataset = lance.dataset(str(target))
    except (ValueError, OSError):
        if is_begun or (target.is_dir() and not any(target.iterdir())):
            return None
        raise Refused(
            f"{target} is there, and was not made by `engine export`: name another folder, or move it away"
        ) from None
    job = (dataset.schema.metadata or {}).get(_JOB.encode(), b"").decode()
    if job != snapshot.job_key:
        raise Refused(f"{target} is not an export of this output: name another folder, or move it away")
    return dataset


def _rows_by_shard(stored: Any) -> Counter[str]:
    """Count the rows of each shard in a dataset or a fragment, by what is stored with each row."""
    counts: Counter[str] = Counter()
    for batch in stored.scanner(columns=[SHARD]).to_batches():
        for found in pc.value_counts(batch.column(0)).to_pylist():
            counts[found["values"]] += found["counts"]
    return counts


def _lance() -> Any:
    try:
        import lance
    except ImportError:
        raise ConfigError(LANCE_MISSING) from None
    return lance
