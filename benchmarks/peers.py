"""The peer for a resume: Ray Data's own checkpointing, which remembers ids of rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from benchmarks.synthetic import row_ids

if TYPE_CHECKING:
    from collections.abc import Iterable


def write_checkpoint(folder: str, done: Iterable[tuple[str, int, int]]) -> None:
    """Record rows as done, with Ray Data's own writer: a file for each range, as for each block that a run would write."""
    from ray.data.block import BlockAccessor
    from ray.data.checkpoint.checkpoint_writer import CheckpointWriter

    writer = CheckpointWriter.create(_config(folder))
    for path, start, stop in done:
        table = pa.table({"id": row_ids(path, start, stop)})
        writer.write_block_checkpoint(BlockAccessor.for_block(table))


def begin_again(source: str, checkpoint: str, output: str, mark: str) -> dict[str, Any]:
    """
    Run the job again over a source that is mostly done: read, a constant vector, write.

    Args:
        source: Folder of the inputs.
        checkpoint: Folder of the ids that are done.
        output: Folder to write to.
        mark: A file to create when the first row that is not done comes through.

    Returns:
        Seconds until that row, and how many rows were written.
    """
    import pyarrow.dataset as pads
    import ray
    import ray.data

    started = time.time()
    ray.init(include_dashboard=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = _config(checkpoint)
    rows = ray.data.read_parquet(source).map_batches(_embed, batch_format="pyarrow", fn_kwargs={"mark": mark})
    rows.write_parquet(output)
    ray.shutdown()
    num_rows = pads.dataset(output, format="parquet").count_rows()
    return {"first_s": Path(mark).stat().st_mtime - started, "num_rows": num_rows}


def _config(folder: str) -> Any:
    from ray.data.checkpoint import CheckpointConfig

    return CheckpointConfig(id_column="id", checkpoint_path=folder, delete_checkpoint_on_success=False)


def _embed(table: pa.Table, mark: str) -> pa.Table:
    if table.num_rows and not Path(mark).exists():
        Path(mark).touch()
    return table.drop_columns(["text"]).append_column("embedding", pa.array([[1.0] * 8] * table.num_rows))
