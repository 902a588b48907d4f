"""
What reading costs: planning and reading of each format, beside pyarrow and Ray Data reading the same; and memory over a giant input.

    python benchmarks/sources.py                          200 MB of text in each format, about ten minutes on two cores
    python benchmarks/sources.py --mb 20 --peers pyarrow  a look
    python benchmarks/sources.py --places local,s3 --peers ''   and in an S3 on this machine, moto's
    python benchmarks/sources.py --whole-job              and each format through a whole run with a constant model
    python benchmarks/sources.py --giant 5                memory of a run over 5 GB of JSON lines, one text of 10 MB among them

The same rows (an id of 12 characters, a number, a text of 100 to 900 characters) in every format, each measured in a fresh process.
Rates of "plan", "read" and pyarrow are rows per second of CPU time, so that other work on the machine counts less; those of Ray
Data and whole jobs are by the clock. "Plan" is what a first survey does: footers of Parquet, headers of Arrow's batches, one scan of lines; a resume finds the last two
in the output. "Read" is all shards, one after the other in one process, as tables of text and id; Ray Data has both cores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas  # noqa: F401 - Arrow imports it with its first array: not to be timed
import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.measure import MIB, exit_on_sigterm, fresh, started, status_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moto.server import ThreadedMotoServer

NAMES = ("a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.txt", "a.arrow", "a.ipc")
BUCKET = "bench"
NOT_READ = {"pyarrow": (".txt", ".txt.zst", ".csv.zst"), "ray": (".arrow", ".ipc")}
"""Formats that peers do not read: pyarrow not a piece at a time by itself, Ray Data not at all."""
ROWS_AT_ONCE = 20_000
BIG_TEXT_BYTES = 10_000_000
MODEL = {"model": "custom:benchmarks.models.ConstantModel", "model_args": {"dimension": 8}}
progress = Console(stderr=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What reading costs, by format.")
    parser.add_argument("--mb", type=int, default=200, help="MB of text in each format (%(default)s)")
    parser.add_argument("--formats", default=",".join(NAMES), help="file names (%(default)s)")
    parser.add_argument("--peers", default="pyarrow,ray", help="who else reads them (%(default)s)")
    parser.add_argument("--places", default="local", help=f"of {', '.join(PLACES)} (%(default)s)")
    parser.add_argument(
        "--whole-job", action="store_true", help="run each format through Ray with a constant model too"
    )
    parser.add_argument("--giant", type=float, metavar="GB", help="instead, watch the memory of a run over so much")
    parser.add_argument("--folder", default=None, help="where to put the files (a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)

    with tempfile.TemporaryDirectory(prefix="engine-sources-", dir=options.folder) as name:
        folder = Path(name)
        if options.giant:
            results: Any = giant(folder, options.giant)
        else:
            results = compare(folder, options)
    if options.json:
        print(json.dumps(results, indent=2))
    elif options.giant:
        show_giant(results)
    else:
        show(results, options)


# Rates


@cache
def _s3() -> ThreadedMotoServer:
    """Start an S3 on loopback: moto's, in this process; those that are measured are others."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}
    os.environ |= {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/{BUCKET}", method="PUT")).close()
    return server


def in_s3(path: Path) -> str:
    """Put a file into a bucket, and return its location there."""
    from obstore.store import S3Store

    _s3()
    S3Store(BUCKET, client_options={"allow_http": True}).put(path.name, path)
    return f"s3://{BUCKET}/{path.name}"


PLACES: dict[str, Callable[[Path], str]] = {"local": str, "s3": in_s3}
"""Where the files lie: from their path on this disk to what the engine is given."""


def compare(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write and measure each format in each place."""
    results = []
    tables = list(batches(options.mb * 1_000_000))
    for name in options.formats.split(","):
        path = folder / name
        num_rows = write(path, tables)
        for place in options.places.split(","):
            source = PLACES[place](path)
            found = {"format": name, "place": place, "rows": num_rows, "bytes": path.stat().st_size}
            calls = {"plan": "plan", "read": "read", **{peer: peer for peer in options.peers.split(",") if peer}}
            if options.whole_job:
                calls["job"] = "whole_job"
            for label, function in calls.items():
                if name.endswith(NOT_READ.get(function, ())):
                    continue
                measured = fresh(
                    f"benchmarks.sources:{function}", source=source, watch_tree=function in ("ray", "whole_job")
                )
                rows, seconds = measured.result
                if rows != num_rows:
                    raise SystemExit(f"{label} found {rows} rows in {name} instead of {num_rows}")
                found |= {label: seconds, f"{label}_mib": measured.tree_mib or measured.peak_mib}
                progress.print(f"{name} {place} {label}: {seconds:.2f} s, {found[f'{label}_mib']:.0f} MiB", style="dim")
            results.append(found)
        path.unlink()
    return results


def batches(num_bytes: int) -> Iterator[pa.Table]:
    """Make rows until their texts are so many bytes: the same ones each time."""
    chance = random.Random(7)
    words = [f"{chance.randrange(10**6):x}" for _ in range(20_000)]
    row = 0
    while num_bytes > 0:
        texts = [" ".join(chance.choices(words, k=chance.randint(18, 160))) for _ in range(ROWS_AT_ONCE)]
        ids = [f"id-{number:09}" for number in range(row, row + len(texts))]
        yield pa.table({"id": ids, "n": list(range(row, row + len(texts))), "text": texts})
        num_bytes -= sum(map(len, texts))
        row += len(texts)


def write(path: Path, tables: Sequence[pa.Table]) -> int:
    """Write rows as the format that a file's name says; return how many."""
    num_rows = 0
    sink: Any = None
    for table in tables:
        sink = sink or _sink(path, table.schema)
        sink.write(table)
        num_rows += table.num_rows
    sink.close()
    return num_rows


class _Lines:
    """Writes tables as lines."""

    def __init__(self, path: Path) -> None:
        bare = path.name.removesuffix(".gz").removesuffix(".zst")
        self._encode = {"csv": _csv, "txt": _text}.get(bare.rpartition(".")[2], _jsonl)
        raw = gzip.open(path, "wb", 6) if path.suffix == ".gz" else path.open("wb")  # noqa: SIM115 - until `close`
        self._file: Any = pa.CompressedOutputStream(raw, "zstd") if path.suffix == ".zst" else raw
        if self._encode is _csv:
            self._file.write(b"id,n,text\n")

    def write(self, table: pa.Table) -> None:
        self._file.write(self._encode(table))

    def close(self) -> None:
        self._file.close()


def _jsonl(table: pa.Table) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()


def _text(table: pa.Table) -> bytes:
    return "".join(text + "\n" for text in table["text"].to_pylist()).encode()


def _csv(table: pa.Table) -> bytes:
    return "".join(f'{row["id"]},{row["n"]},"{row["text"]}"\n' for row in table.to_pylist()).encode()


def _sink(path: Path, schema: pa.Schema) -> Any:
    if path.suffix == ".parquet":
        return pq.ParquetWriter(path, schema, compression="zstd")
    if path.suffix in (".arrow", ".ipc"):
        return (pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file)(str(path), schema)
    return _Lines(path)


def _columns(source: str) -> tuple[str, ...]:
    return () if source.endswith(".txt") else ("id",)


def plan(source: str) -> tuple[int, float]:
    """List a source and look at its files, as a first survey does; return rows and seconds of CPU."""
    from engine.sources.formats import read_shapes
    from engine.sources.inventory import list_inputs
    from engine.sources.rows import Selection

    started = time.process_time()
    shapes = read_shapes(list_inputs([source]).files, Selection("text", _columns(source)))
    return sum(shape.num_rows for shape in shapes), time.process_time() - started


def read(source: str) -> tuple[int, float]:
    """Read all shards as a reader does; return rows and seconds of CPU, without those of planning."""
    from engine.planning import cut
    from engine.schema import Shard
    from engine.sources.formats import read_shapes, read_shards
    from engine.sources.inventory import list_inputs
    from engine.sources.rows import Selection

    shape = read_shapes(list_inputs([source]).files, Selection("text", _columns(source)))[0]
    selection = Selection("text", _columns(source), dict(shape.kept_types))
    shards = [Shard.of("f" * 32, shape.file, *bounds) for bounds in shape.placed(cut(shape.row_groups, 4096))]
    started = time.process_time()
    num_rows = sum(rows.table.num_rows for rows in read_shards(shards, selection))
    return num_rows, time.process_time() - started


def pyarrow(source: str) -> tuple[int, float]:
    """Read text and id with pyarrow alone, a piece at a time where it can; return rows and seconds of CPU."""
    started = time.process_time()
    columns = ["id", "text"]
    if source.endswith(".parquet"):
        num_rows = sum(batch.num_rows for batch in pq.ParquetFile(source).iter_batches(4096, columns=columns))
    elif ".jsonl" in source:
        num_rows = pa.json.read_json(pa.input_stream(source)).select(columns).num_rows
    elif source.endswith(".csv"):
        options = pa.csv.ConvertOptions(include_columns=columns)
        num_rows = sum(batch.num_rows for batch in pa.csv.open_csv(source, convert_options=options))
    elif source.endswith(".arrow"):
        with pa.OSFile(source) as file:
            num_rows = sum(batch.num_rows for batch in pa.ipc.open_stream(file))
    else:
        with pa.OSFile(source) as file:
            opened = pa.ipc.open_file(file)
            num_rows = sum(opened.get_batch(number).num_rows for number in range(opened.num_record_batches))
    return num_rows, time.process_time() - started


def ray(source: str) -> tuple[int, float]:
    """Read text and id with Ray Data, to the driver; return rows and seconds, without those of Ray's start."""
    import ray as ray_module
    import ray.data

    ray_module.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    started = time.perf_counter()
    if source.endswith(".parquet"):
        found = ray.data.read_parquet(source, columns=["id", "text"])
    elif ".jsonl" in source:
        found = ray.data.read_json(source, lines=True, file_extensions=None)
    elif source.endswith(".csv"):
        found = ray.data.read_csv(source)
    else:
        found = ray.data.read_text(source)
    num_rows = sum(batch.num_rows for batch in found.iter_batches(batch_size=4096, batch_format="pyarrow"))
    return num_rows, time.perf_counter() - started


def whole_job(source: str) -> tuple[int, float]:
    """Run a job with a constant model; return rows and seconds, Ray's start and end included."""
    from engine import faces

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="engine-sources-out-") as out:
        result = faces.run(
            source=source, output=f"{out}/out", progress=False, keep=_columns(source) and ("n",), **MODEL
        )
    return result.num_rows, time.perf_counter() - started


# Memory


def giant(folder: Path, size_gb: float) -> dict[str, Any]:
    """Run over a giant file of JSON lines, and watch each process below the driver."""
    path, out = folder / "giant.jsonl", folder / "out"
    num_rows = 0
    has_big = False
    pieces = [(_jsonl(table), table.num_rows) for table in batches(50_000_000)]
    with path.open("wb") as file:
        while file.tell() < size_gb * 1e9:
            if not has_big and file.tell() >= size_gb * 0.5e9:
                file.write(
                    json.dumps({"id": "big", "n": 0, "text": "big words " * (BIG_TEXT_BYTES // 10)}).encode() + b"\n"
                )
                num_rows += 1
                has_big = True
            for piece, count in pieces:  # again and again: to make them anew would take longer than the run
                file.write(piece)
                num_rows += count
    progress.print(f"{path.stat().st_size / 1e9:.2f} GB in {num_rows:,} rows are written", style="dim")
    job = {"source": str(path), "output": str(out), "progress": False, "num_actors": 1, **MODEL}
    script = "import json, sys, engine; r = engine.run(**json.loads(sys.argv[1])); print(json.dumps([r.num_rows, r.num_rejects]))"
    command = [sys.executable, "-c", script, json.dumps(job)]
    began = time.perf_counter()
    samples: list[dict[str, Any]] = []
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None:
            commits = out / "_engine/commits"
            done = sum(1 for _ in os.scandir(commits)) if commits.exists() else 0
            samples.append({"done": done, "s": round(time.perf_counter() - began, 1), "mib": memory_by_role(child.pid)})
            time.sleep(1)
        if child.returncode:
            raise SystemExit(f"the run failed with {child.returncode}")
        rows, rejects = json.loads(child.stdout.read()) if child.stdout else (0, 0)
    if (rows, rejects) != (num_rows, 0):
        raise SystemExit(f"{rows} rows and {rejects} rejects instead of {num_rows}")
    return {"bytes": path.stat().st_size, "rows": num_rows, "s": samples[-1]["s"], "samples": samples}


ROLES = {
    "EmbedWorker": "actors",
    "CommittingWorker": "actors",
    "Publisher": "publishers",
    "ray::": "readers and idle workers",
}


def memory_by_role(pid: int) -> dict[str, float]:
    """Return MiB of anonymous memory by what a process is: the driver, or the largest reader, actor and publisher."""
    found = {"driver": status_bytes(pid, "RssAnon") / MIB} if psutil.pid_exists(pid) else {}
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return found
    for process in below:
        try:
            title = " ".join(process.cmdline())
            size = status_bytes(process.pid, "RssAnon") / MIB
        except (OSError, psutil.Error):
            continue
        role = next((role for part, role in ROLES.items() if part in title), None)
        if role:
            found[role] = max(found.get(role, 0.0), size)
    return found


# Tables


def show(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print rows per second, and our ratio to each peer."""
    table = Table(title=f"{options.mb} MB of text, thousands of rows/s (peak MiB)", title_justify="left")
    labels = ["plan", "read", *filter(None, options.peers.split(",")), *(["job"] if options.whole_job else [])]
    for name in ("format", "place", "MB", *labels):
        table.add_column(name, justify="left" if name in ("format", "place") else "right")
    for found in results:
        rates = [
            f"{found['rows'] / found[label] / 1000:,.0f} ({found[f'{label}_mib']:.0f})" if found.get(label) else "-"
            for label in labels
        ]
        table.add_row(found["format"], found["place"], f"{found['bytes'] / 1e6:.0f}", *rates)
    Console(width=140).print(table)


def show_giant(results: dict[str, Any]) -> None:
    """Print the highest memory of each kind of process in each part of the run."""
    samples = results["samples"]
    last = max(sample["done"] for sample in samples)
    roles = ["driver", *ROLES.values()]
    table = Table(
        title=f"{results['bytes'] / 1e9:.2f} GB, {results['rows']:,} rows in {results['s']:.0f} s: peak MiB",
        title_justify="left",
    )
    for name in ("shards committed", *roles):
        table.add_column(name, justify="right")
    bounds = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    for low, high in pairwise(bounds):
        part = [sample["mib"] for sample in samples if low * last < sample["done"] <= high * last]
        peaks = [max((one.get(role, 0.0) for one in part), default=0.0) for role in roles]
        table.add_row(f"{low:.0%} to {high:.0%}", *(f"{peak:.0f}" for peak in peaks))
    survey = [sample["mib"].get("driver", 0.0) for sample in samples if not sample["done"]]
    Console(width=140).print(table)
    Console().print(f"The driver before the first commit, the scan included: {max(survey, default=0.0):.0f} MiB")


if __name__ == "__main__":
    exit_on_sigterm()
    main()
