"""
What a plan, a resume and a long run cost the driver. No model is loaded: a constant one stands for it.

    python benchmarks/resume.py                                    all of it, about an hour
    python benchmarks/resume.py --run-shards 2000 --peer-rows 1    minutes

1. Plan and resume: `engine.plan` of a job whose shards are cut from many files; then plan and run with all of them committed,
   and with some taken back. The same number of shards with ten times the rows must cost the same; a tenth of the shards less.
2. Run: many small shards through the whole engine, with the driver's memory over time.
3. Beginning again, beside Ray Data's own checkpointing, which keeps the ids of rows: the same rows done, the same rows left.

Each measurement is a process of its own. Commits are synthesised (see `synthetic.write_commits`), runs are real.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import peers, synthetic
from benchmarks.measure import OutOfMemory, exit_on_sigterm, fresh

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.measure import Measured

PLAN, RUN = "benchmarks.synthetic:plan_job", "benchmarks.synthetic:run_job"
PEER_SHARD_ROWS = 10_000
PEER_ROWS_PER_FILE = 100_000
LOW_GIB = 3
progress = Console(stderr=True, highlight=False)
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a plan, a resume and a long run cost the driver.")
    parser.add_argument("--parts", default="plan,run,peer", help="which of plan, run, peer (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=100_000, help="shards to plan and resume (%(default)s)")
    parser.add_argument("--files", type=int, default=1_000, help="files they are cut from (%(default)s)")
    parser.add_argument("--left", type=int, default=100, help="shards that a killed run left to do (%(default)s)")
    parser.add_argument("--run-shards", type=int, default=100_000, help="shards of the long run (%(default)s)")
    parser.add_argument("--run-rows", type=int, default=10, help="rows of each of them (%(default)s)")
    parser.add_argument("--peer-rows", default="1,3,10", help="million rows done, beside the peer (%(default)s)")
    parser.add_argument("--folder", help="where to make temporary files (the system's folder for them)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(argv)

    parts = options.parts.split(",")
    results: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="engine-resume-", dir=options.folder) as name:
        folder = Path(name)
        if "plan" in parts:
            results["plan and resume"] = plan_and_resume(folder, options.shards, options.files, options.left)
        if "run" in parts:
            results["run"] = [long_run(folder, options.run_shards, options.run_rows)]
        if "peer" in parts:
            millions = [float(count) for count in options.peer_rows.split(",")]
            results["begin again"] = list(beside_peer(folder, millions))
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        for title, rows in results.items():
            show(title, rows)


def plan_and_resume(folder: Path, num_shards: int, num_files: int, num_left: int) -> list[Row]:
    """Measure plans and resumes: few rows, ten times the rows in as many shards, those rows in a tenth of the shards."""
    few = _plan_and_resume(folder, num_shards, num_files, 1, num_left)
    many = _plan_and_resume(folder, num_shards, num_files, 10, num_left)
    fewer = _plan_and_resume(folder, num_shards // 10, num_files // 10, 100, num_left)
    for row, base in zip(many, few, strict=True):
        row["MiB, to fewer rows"] = f"{row['driver MiB'] / base['driver MiB'] - 1:+.1%}"
    return [*few, *many, *fewer]


def _plan_and_resume(folder: Path, num_shards: int, num_files: int, shard_rows: int, num_left: int) -> list[Row]:
    with scratch(folder, f"{num_shards} shards of {shard_rows}") as place:
        rows_per_file = num_shards // num_files * shard_rows
        source = synthetic.write_source(place / "in", num_files=num_files, rows_per_file=rows_per_file)
        job = synthetic.job(source, place / "out", shard_rows)
        about = {"shards": num_shards, "files": num_files, "rows": num_shards * shard_rows}
        rows = [_row("plan, nothing done", about, fresh(PLAN, options=job))]
        if (found := synthetic.write_commits(job)) != num_shards:
            raise SystemExit(f"{found} shards instead of {num_shards}: give --shards that --files divides")
        rows.append(_row("plan, all committed", about, fresh(PLAN, options=job)))
        rows.append(_row("run, all committed", about, fresh(RUN, options=job)))
        synthetic.uncommit(job, num_left)
        rows.append(_row(f"plan, {num_left} left", about, fresh(PLAN, options=job)))
        again = fresh(RUN, options=job)
        if again.result["num_shards"] != num_left or again.result["pending_rows"]:
            raise SystemExit(f"the run should have made {num_left} shards: {again.result}")
        rows.append(_row(f"run, {num_left} left", about, again, start_s=again.result["start_s"]))
        return rows


def long_run(folder: Path, num_shards: int, shard_rows: int) -> Row:
    """Run many small shards, and say how the driver's memory went."""
    num_files = max(1, num_shards // 100)
    with scratch(folder, f"run of {num_shards} shards") as place:
        source = synthetic.write_source(
            place / "in", num_files=num_files, rows_per_file=num_shards // num_files * shard_rows
        )
        run = fresh(RUN, interval_s=1.0, options=synthetic.job(source, place / "out", shard_rows))
    result = run.result
    middle = run.seconds - (result["seconds"] - result["start_s"]) / 2
    second_half = [mib for second, mib in run.samples if second >= middle]
    return {
        "shards": result["num_shards"],
        "rows": result["num_rows"],
        "seconds": round(run.seconds, 1),
        "first shard s": result["start_s"],
        "shards/s": round(result["rows_per_s"] / shard_rows, 1),
        "MiB in the middle": round(second_half[0]),
        "MiB at the end": round(second_half[-1]),
        "peak MiB": round(run.peak_mib),
        "growth in the second half": f"{max(second_half) / second_half[0] - 1:+.1%}",
        "MiB over time": [round(mib) for _, mib in run.samples[:: max(1, len(run.samples) // 20)]],
    }


def beside_peer(folder: Path, millions: Sequence[float]) -> Iterator[Row]:
    """Begin again with so many million rows done, with ours and with Ray Data's checkpointing."""
    per_million = 0.0
    for million in millions:
        num_rows = round(million * 1_000_000)
        free_mib = psutil.virtual_memory().available / 1024**2 - LOW_GIB * 1024
        if per_million * million > free_mib:
            yield {"way": "Ray Data", "rows": num_rows, "remark": f"left out: {free_mib:,.0f} MiB are not enough"}
            return
        with scratch(folder, f"{million:g} million rows done") as place:
            num_files = max(1, num_rows // PEER_ROWS_PER_FILE)
            source = synthetic.write_source(place / "in", num_files=num_files, rows_per_file=num_rows // num_files)
            job = synthetic.job(source, place / "out", PEER_SHARD_ROWS)
            synthetic.write_commits(job)
            left = synthetic.uncommit(job, 10)
            done = {(s.file.path, s.start, s.stop) for s in synthetic.all_shards(job)} - set(left)
            peers.write_checkpoint(str(place / "checkpoint"), sorted(done))
            ours = fresh(RUN, watch_tree=True, options=job)
            yield _peer_row("engine", num_rows, ours, ours.result["start_s"])
            names = {name: str(place / name) for name in ("checkpoint", "output", "mark")}
            try:
                theirs = fresh(
                    "benchmarks.peers:begin_again", watch_tree=True, min_free_gib=LOW_GIB, source=str(source), **names
                )
            except OutOfMemory as error:
                yield {"way": "Ray Data", "rows": num_rows, "remark": f"ended: {error}"}
                return
            yield _peer_row("Ray Data", num_rows, theirs, theirs.result["first_s"])
            per_million = theirs.tree_mib / million


def _row(what: str, about: Row, measured: Measured, **more: Any) -> Row:
    return {
        "what": what,
        **about,
        "seconds": round(measured.seconds, 2),
        "driver MiB": round(measured.peak_mib),
        **more,
    }


def _peer_row(way: str, num_rows: int, measured: Measured, first_s: float) -> Row:
    return {
        "way": way,
        "rows": num_rows,
        "rows made": measured.result["num_rows"],
        "first row s": round(first_s, 1),
        "all s": round(measured.seconds, 1),
        "driver MiB": round(measured.peak_mib),
        "all processes MiB": round(measured.tree_mib),
    }


@contextmanager
def scratch(folder: Path, what: str) -> Iterator[Path]:
    """Have a folder for one case, gone at its end: the next one needs the disk."""
    progress.print(f"{what} …", style="dim")
    place = folder / what.replace(" ", "-")
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place)


def show(title: str, rows: list[Row]) -> None:
    """Print rows as a table; columns are those that any row has."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        is_text = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(name, justify="left" if is_text else "right")
    for row in rows:
        values = (row.get(name, "") for name in columns)
        table.add_row(*(f"{value:,}" if isinstance(value, (int, float)) else str(value) for value in values))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    exit_on_sigterm()
    main()
