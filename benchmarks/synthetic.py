"""Sources and outputs of any size, made without a model: what a run would have found, and what it would have left."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine import faces
from engine.commits import Usage
from engine.config import load_config
from engine.ledger import COMMITS, DATA, part_name, record_name
from engine.part import decode, encode
from engine.schema import vectors_type
from engine.survey import survey
from engine.text_hashes import text_hashes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.schema import Shard

DIMENSION = 8
MODEL = {"model": "custom:benchmarks.models.ConstantModel", "model_args": {"dimension": DIMENSION}}
NUM_PROCESSES = os.cpu_count() or 1


def row_ids(file_path: str, start: int, stop: int) -> list[str]:
    """Return the ids of some rows of a source file, which `write_source` gave them."""
    stem = Path(file_path).stem
    return [f"{stem}-{row:08}" for row in range(start, stop)]


def write_source(folder: Path, *, num_files: int, rows_per_file: int) -> Path:
    """Write Parquet files of one row group each, with an `id` and a short `text`."""
    folder.mkdir(parents=True)
    text = pa.array([f"the text of row {row}" for row in range(rows_per_file)])
    for number in range(num_files):
        path = folder / f"{number:05}.parquet"
        pq.write_table(pa.table({"id": row_ids(path.name, 0, rows_per_file), "text": text}), path)
    return folder


def job(source: Path | str, output: Path | str, shard_rows: int) -> dict[str, Any]:
    """Return the options of a job over such a source."""
    return {"source": str(source), "output": str(output), "shard_rows": shard_rows, "id_column": "id", **MODEL}


def plan_job(options: dict[str, Any]) -> dict[str, Any]:
    """Plan a job: to be called in a fresh process."""
    return faces.plan(**options).as_json()


def run_job(options: dict[str, Any]) -> dict[str, Any]:
    """Run a job: to be called in a fresh process."""
    return faces.run(progress=False, **options).as_json()


def write_commits(options: dict[str, Any]) -> int:
    """
    Commit all shards of a job, as a finished run would have left them.

    Parts and records are the bytes that the engine writes: a part is encoded, and its record read back from it. Only the
    protocol around them (staging, fsync, links) is left out, which a listing cannot see.

    Returns:
        How many shards that was.
    """
    found = survey(load_config(**options))
    ledger = found.ledger
    ledger.claim(found.job)
    for folder in (DATA, COMMITS):
        Path(ledger.root, folder).mkdir(parents=True, exist_ok=True)
    pending = list(found.standing.plan.pending)
    pieces = [pending[number::NUM_PROCESSES] for number in range(NUM_PROCESSES)]
    with ProcessPoolExecutor(NUM_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(_commit, Path(ledger.root), found.job.fingerprint), pieces))
    return len(pending)


def uncommit(options: dict[str, Any], num_shards: int) -> list[tuple[str, int, int]]:
    """
    Take back some commits of a finished job, spread evenly over its files: what a run that was killed has left to do.

    Returns:
        File and rows of each.
    """
    shards = all_shards(options)
    chosen = list(islice(shards[:: max(1, len(shards) // num_shards)], num_shards))
    for shard in chosen:
        for name in (record_name(shard.id), part_name(shard.id)):
            Path(options["output"], name).unlink()
    return [(shard.file.path, shard.start, shard.stop) for shard in chosen]


def all_shards(options: dict[str, Any]) -> list[Shard]:
    """Return all shards of a job, done or not."""
    aside = options | {"output": f"{options['output']}-aside"}
    return list(survey(load_config(**aside)).standing.plan.pending)


def _commit(root: Path, fingerprint: str, shards: Sequence[Shard]) -> None:
    for shard in shards:
        num_rows = len(shard)
        vectors = pa.array(np.ones(num_rows * DIMENSION, np.float32))
        table = pa.table(
            {
                "id": row_ids(shard.file.path, shard.start, shard.stop),
                "embedding": pa.FixedSizeListArray.from_arrays(vectors, type=vectors_type(DIMENSION)),
                "_text_hash": text_hashes([f"the text of row {row}" for row in range(shard.start, shard.stop)]),
                "_source_row": np.arange(shard.start, shard.stop),
            }
        )
        usage = Usage(created_at="2026-11-01T00:00:00+00:00")
        data = encode(table, shard=shard, fingerprint=fingerprint, rejects=[], usage=usage)
        (root / part_name(shard.id)).write_bytes(data)
        (root / record_name(shard.id)).write_bytes(decode(data, shard.id).record.to_bytes())
