"""The faces for Python: what `import engine` gives, as keyword arguments of the same names as flags and YAML keys."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from engine import overview, runner
from engine.config import load_config
from engine.inline import embed
from engine.sources import in_memory
from engine.sources.opening import MEMORY
from engine.sources.rows import Selection
from engine.sources.table_kinds import is_in_memory, is_ray_dataset
from engine.sources.tables import tables_of
from engine.storage import open_storage
from engine.streams import without_core_notices

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa

    from engine.config import JobConfig
    from engine.exporting.story import ExportResult, Format
    from engine.gc_result import GcResult
    from engine.reading import Form
    from engine.reporting.projection import Projection
    from engine.reporting.story import ReportResult
    from engine.results import PlanResult, RunResult, StatusResult, VerifyResult
    from engine.storage import Storage
    from engine.verification import Level

__all__ = ["embed", "export", "gc", "plan", "read", "read_batches", "report", "run", "status", "verify"]


def plan(*, config: str | Path | None = None, **options: Any) -> PlanResult:
    """
    Say what a run would do: files, rows, shards and bytes, done and left. Writes nothing, loads no model.

    Args:
        config: A YAML file of options.
        options: Fields of `engine.config.JobConfig`, such as `source`, `output` and `model`; they win over the file. A source may be a
            table in memory, as for `run`: it is copied to a temporary folder for as long as the call takes.
    """
    if not is_in_memory(options.get("source")):
        return runner.plan(load_config(_text(config), **options))
    with tempfile.TemporaryDirectory(prefix="engine-plan-") as folder:
        inputs = open_storage(folder)
        return runner.plan(_staged(_text(config), options, inputs), inputs)


def run(*, config: str | Path | None = None, progress: bool = True, **options: Any) -> RunResult:
    """
    Embed a source into an output, and resume what is there. An interrupt returns a result that says so.

    Args:
        config: A YAML file of options.
        progress: Show it: a live line on a terminal and in notebooks, plain lines elsewhere, on stderr.
        options: Fields of `engine.config.JobConfig`, such as `source`, `output` and `model`; they win over the file. A source may also be a
            list of texts or of dicts, a dict of columns, a DataFrame of pandas or polars, an Arrow table, a Dataset of Hugging Face or of
            Ray: the columns that the job reads are copied into the output.
    """
    job = (
        _staged(_text(config), options)
        if is_in_memory(options.get("source"))
        else load_config(_text(config), **options)
    )
    if not progress:
        return runner.run(job)
    from rich.console import Console

    from engine.progress import Progress

    console = Console(stderr=True)
    notices = without_core_notices(in_notebook=True) if console.is_jupyter else nullcontext()
    with Progress(console) as shown, notices:
        return runner.run(job, on_event=shown)


def status(output: str | Path) -> StatusResult:
    """Say where an output stands, by its records; and what is pending, if its source can be read from here."""
    return overview.status(str(output))


def verify(
    output: str | Path,
    level: Level = "quick",
    *,
    set_aside: bool = False,
    sample_rows: int = 64,
) -> VerifyResult:
    """Check an output against its plan, its records and its files: see `engine.runner.verify`."""
    return runner.verify(str(output), level, set_aside=set_aside, sample_rows=sample_rows)


def report(
    output: str | Path,
    to: str | Path | None = None,
    *,
    color_by: str | None = None,
    sample_rows: int = 5000,
    projection: Projection = "auto",
) -> ReportResult:
    """Make a page about an output that opens offline: see `engine.reporting.story.report`. Needs the extra `report`."""
    from engine.reporting import story

    return story.report(str(output), _text(to), color_by=color_by, sample_rows=sample_rows, projection=projection)


def gc(output: str | Path, *, apply: bool = False, older_than_days: int = 1, inputs_gone: bool = False) -> GcResult:
    """Find what an output does not need, and delete it if `apply` says so: see `engine.garbage.gc`."""
    from engine import garbage

    return garbage.gc(str(output), apply=apply, older_than_days=older_than_days, inputs_gone=inputs_gone)


def read(
    output: str | Path, columns: Sequence[str] | None = None, as_: Form = "arrow", *, mapped: str | Path | None = None
) -> Any:
    """Read what is committed as Arrow, pandas, polars, numpy or a Ray Dataset: see `engine.reading.read`."""
    from engine import reading

    return reading.read(str(output), columns, as_, mapped=mapped)


def read_batches(output: str | Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield what is committed as record batches, in bounded memory: see `engine.reading.read_batches`."""
    from engine import reading

    return reading.read_batches(str(output), columns)


def export(
    output: str | Path,
    to: str | Path,
    *,
    format: Format | None = None,  # noqa: A002 - the flag's name
    index: str | None = None,
) -> ExportResult:
    """Make one .npy, .faiss or .lance of an output's vectors: see `engine.exporting.story.export`. Needs the extra `export`."""
    from engine.exporting import story

    return story.export(str(output), to, format=format, index=index)


def _staged(config: str | None, options: dict[str, Any], inputs: Storage | None = None) -> JobConfig:
    """Copy a source in memory to where it can be read from, and return the config of the job with its name."""
    source = options["source"]
    job = load_config(config, **options | {"source": MEMORY})
    selection = Selection.of(job)
    store = inputs or open_storage(job.output, is_single_writer=job.unsafe_single_writer)
    if is_ray_dataset(source):
        from engine.pipeline import ray_source

        name = in_memory.stage(ray_source.tables_of(source, selection.columns), store, selection, is_ordered=False)
    else:
        name = in_memory.stage(tables_of(source, selection), store, selection)
    return job.model_copy(update={"source": (name,)})


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
