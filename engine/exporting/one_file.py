"""
An export of one file, with the ids of its rows beside it.

    vectors.npy                the vectors
    vectors.npy.ids.parquet    a column of ids, a row for each vector; in its metadata, what the export is of

Both are made in the staging folder and moved to their names when they are whole, the old ids first out of the way: ids that lie
beside a file are always those of its rows.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import EngineError, Refused
from engine.exporting import faiss_index, npy
from engine.exporting.staging import SUFFIX, staging, sync
from engine.schema import canonical_json, content_hash
from engine.storage import sync_folder

if TYPE_CHECKING:
    from engine.exporting.staging import Staging
    from engine.snapshot import Snapshot

IDS_SUFFIX = ".ids.parquet"
_KEY = b"embedding_engine_export"
_VECTORS, _IDS = "vectors", "ids.parquet"
_IDS_GROUP_ROWS = 1 << 18


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an export is of."""

    job: str
    """Of the output."""
    plan: str
    """A hash of all that decides the two files."""
    num_rows: int
    num_bytes: int
    """Of the file of vectors."""


def ids_path(target: Path) -> Path:
    """Return where the ids of an export's rows are."""
    return target.with_name(target.name + IDS_SUFFIX)


def export(snapshot: Snapshot, target: Path, *, index: str | None) -> int:
    """
    Make `target` the vectors of `snapshot`, anew if it is there with others.

    Args:
        snapshot: Of the output.
        target: The file.
        index: Which FAISS index; None for an `.npy` file.

    Returns:
        How many rows were written; 0 if it was there.

    Raises:
        Refused: If another process is at it, or there is a file of that name that is no export of this output.
        ConfigError: If there is no such index.
        CorruptOutput: If a part is missing or damaged.
    """
    plan = content_hash(canonical_json([snapshot.job_key, snapshot.digest, index]))
    if _is_current(target, plan) and not target.with_name(target.name + SUFFIX).exists():
        return 0
    with staging(target) as stage:
        if stage.progress().get("is_whole"):  # a process was killed between the two moves
            _publish(stage, target)
        _check_owner(target, snapshot)
        if _is_current(target, plan):
            return 0
        if stage.progress().get("plan") != plan:
            stage.clear()
        _make(snapshot, stage, plan, index)
        _publish(stage, target)
    return snapshot.num_rows


def _make(snapshot: Snapshot, stage: Staging, plan: str, index: str | None) -> None:
    """Make both files in the staging folder, and count their rows."""
    path = stage.path(_VECTORS)
    if index is None:
        npy.write(snapshot, stage, path, plan)
        num_vectors = npy.num_rows(path)
    else:
        faiss_index.write(snapshot, stage, path, plan, index)
        num_vectors = faiss_index.num_rows(path)
    num_ids = _write_ids(snapshot, stage, Manifest(snapshot.job_key, plan, snapshot.num_rows, path.stat().st_size))
    if not num_vectors == num_ids == snapshot.num_rows:
        raise EngineError(
            f"the export has {num_vectors:,} vectors and {num_ids:,} ids of {snapshot.num_rows:,} rows, and was left in "
            f"{stage.folder}: delete that folder and run the same command again"
        )
    stage.note(plan=plan, is_whole=True)


def _write_ids(snapshot: Snapshot, stage: Staging, manifest: Manifest) -> int:
    field = snapshot.schema.field(snapshot.id_column)
    schema = pa.schema([field], {_KEY: canonical_json(asdict(manifest)).encode()})
    num_rows = num_grouped = 0
    with stage.path(_IDS).open("wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            group: list[pa.RecordBatch] = []
            for batch in snapshot.batches([field.name]):
                group.append(batch)
                num_rows += batch.num_rows
                num_grouped += batch.num_rows
                if num_grouped >= _IDS_GROUP_ROWS:
                    writer.write_table(pa.Table.from_batches(group))
                    group, num_grouped = [], 0
            if group:
                writer.write_table(pa.Table.from_batches(group))
        sync(file)
    return num_rows


def _publish(stage: Staging, target: Path) -> None:
    """Move both files to their names. It may be killed and done again."""
    ids = ids_path(target)
    if stage.path(_VECTORS).exists():
        with suppress(FileNotFoundError):
            ids.unlink()
        sync_folder(target.parent)
        stage.path(_VECTORS).rename(target)
    if stage.path(_IDS).exists():
        stage.path(_IDS).rename(ids)
    sync_folder(target.parent)
    stage.clear()


def _is_current(target: Path, plan: str) -> bool:
    found = _manifest(target)
    return found is not None and found.plan == plan and target.is_file() and target.stat().st_size == found.num_bytes


def _manifest(target: Path) -> Manifest | None:
    """Return what the ids beside `target` say that it is; None if there are none, or they are not an export's."""
    try:
        return Manifest(**json.loads(pq.read_schema(ids_path(target)).metadata[_KEY]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_owner(target: Path, snapshot: Snapshot) -> None:
    """Make sure that nothing is at `target` that is not an export of this output."""
    found = _manifest(target)
    if found is None and (target.exists() or ids_path(target).exists()):
        raise Refused(f"{target} is there, and was not made by `engine export`: name another file, or move it away")
    if found is not None and found.job != snapshot.job_key:
        raise Refused(f"{target} is an export of another output: name another file, or move it away")
