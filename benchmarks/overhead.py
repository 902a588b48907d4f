"""
What the engine costs beside its model: `engine run` against a bare loop over the same shards, and the cold start of both.

    python benchmarks/overhead.py                                   about twelve minutes on two cores
    python benchmarks/overhead.py --rounds 1 --shards 4             a look

Both embed the same rows of real text with the same model class, settings and number of threads, each time in a fresh process.
The loop reads the engine's own shards with the engine's own reader, calls the model, and forgets the vectors; the engine also
carries them through Ray, writes them, syncs them and reads them back. Both are counted as in `local.py`, without the first shard of
an actor (`steady_state.py`). Rounds alternate in the order engine, loop, loop, engine, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks import corpus
from benchmarks.local_texts import MODEL
from benchmarks.measure import exit_on_sigterm, fresh, seconds_of, started
from benchmarks.steady_state import of_loops, of_output

if TYPE_CHECKING:
    from collections.abc import Sequence

TARGET = 0.95
COLD_TEXTS = 64
ENGINE_START = "import json, sys, engine; print(engine.run(progress=False, **json.loads(sys.argv[1])).start_s)"
LOOP_START = """
import json, sys
import pyarrow.parquet as pq
from engine.models.model_files import folder_of
from sentence_transformers import SentenceTransformer
texts = pq.read_table(sys.argv[1])["text"].to_pylist()
SentenceTransformer(str(folder_of(sys.argv[2]))).encode(texts, show_progress_bar=False)
"""
progress = Console(stderr=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the engine costs beside its model.")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of engine and loop (%(default)s)")
    parser.add_argument("--texts", choices=sorted(corpus.KINDS), default="messages", help="of chitchat (%(default)s)")
    parser.add_argument("--shards", type=int, default=25, help="shards a round; the first is not counted (%(default)s)")
    parser.add_argument("--shard-rows", type=int, default=1024, help="rows of a shard (%(default)s)")
    parser.add_argument("--batch-size", type=int, help="texts a batch (the engine's own choice)")
    parser.add_argument("--dtype", default="float32", help="what the model computes in (%(default)s)")
    parser.add_argument("--cold-starts", type=int, default=2, help="of each way (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(argv)

    with tempfile.TemporaryDirectory(prefix="engine-overhead-") as name:
        folder = Path(name)
        texts = corpus.sample(options.texts, options.shards * options.shard_rows)
        source = corpus.write(folder / "texts.parquet", texts)
        job = {"source": source, "model": MODEL, "shard_rows": options.shard_rows, "dtype": options.dtype}
        if options.batch_size:
            job["batch_size"] = options.batch_size
        rates = steady_state(folder, job, options.rounds)
        few = corpus.write(folder / "few.parquet", texts[:COLD_TEXTS])
        starts, failure = [], ""
        try:
            starts = cold_starts(folder, job | {"source": few}, options.cold_starts)
        except RuntimeError as error:  # which takes no rates with it
            failure = f"cold starts failed: {error}"
    results = summary(rates, starts) | {"texts": options.texts, "rows": len(texts), "shards": options.shards}
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)
    sys.exit(failure or 0)


def steady_state(folder: Path, job: dict[str, Any], num_rounds: int) -> dict[str, list[float]]:
    """Return the rows per second of both ways in each round."""
    rates: dict[str, list[float]] = {"engine": [], "loop": []}
    for number in range(num_rounds):
        for way in ("engine", "loop") if number % 2 == 0 else ("loop", "engine"):
            output = str(folder / f"out-{number}-{way}")
            measured = fresh(f"benchmarks.overhead:{way}", job=job | {"output": output})
            rates[way].append(measured.result)
            progress.print(f"round {number + 1}, {way}: {measured.result:.1f} rows/s", style="dim")
    return rates


def engine(job: dict[str, Any]) -> float:
    """Run a job whole; return its rows per second in the steady state."""
    from engine import faces

    result = faces.run(progress=False, **job)
    return of_output(job["output"], result.num_actors)[0]


def loop(job: dict[str, Any]) -> float:
    """Do what the actors of such a job do, and nothing else; return rows per second in the steady state."""
    from benchmarks.bare_loop import loops

    return of_loops(loops(job))[0]


def cold_starts(folder: Path, job: dict[str, Any], count: int) -> list[dict[str, float]]:
    """Return seconds from the start of a process to a few texts embedded, and what the engine says of itself."""
    starts = []
    for number in range(count):
        output = folder / f"cold-{number}"
        began = time.perf_counter()
        command = [sys.executable, "-c", ENGINE_START, json.dumps(job | {"output": str(output)})]
        with started(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            while child.poll() is None and not list(output.glob("_engine/commits/*.json")):
                time.sleep(0.01)
            engine_s = time.perf_counter() - began
            said = child.communicate()[0]
        if child.returncode:
            raise RuntimeError(f"the engine failed with {child.returncode} on {job}")
        loop_s = seconds_of("-c", LOOP_START, job["source"], MODEL.removeprefix("sentence-transformers:"))
        starts.append({"engine_s": engine_s, "start_s": float(said), "loop_s": loop_s})
        progress.print(f"cold start {number + 1}: engine {engine_s:.1f} s, encode {loop_s:.1f} s", style="dim")
    return starts


def summary(rates: dict[str, list[float]], starts: list[dict[str, float]]) -> dict[str, Any]:
    """Return medians, spreads and ratios."""
    ratios = [ours / bare for ours, bare in zip(rates["engine"], rates["loop"], strict=True)]
    return {
        "rows_per_s": rates,
        "median_rows_per_s": {way: statistics.median(values) for way, values in rates.items()},
        "ratios": ratios,
        "ratio_of_medians": statistics.median(rates["engine"]) / statistics.median(rates["loop"]),
        "median_ratio": statistics.median(ratios),
        "target": TARGET,
        "cold_start": {name: statistics.median(start[name] for start in starts) for name in starts[0]}
        if starts
        else {},
    }


def show(results: dict[str, Any]) -> None:
    """Print the results as tables."""
    rates = results["rows_per_s"]
    table = Table(
        title=f"Steady state: {results['rows']:,} {results['texts']} in {results['shards']} shards, rows/s",
        title_justify="left",
    )
    for name in (
        "way",
        *(f"round {number + 1}" for number in range(len(rates["engine"]))),
        "median",
        "lowest",
        "highest",
    ):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way, values in {**rates, "engine / loop": results["ratios"]}.items():
        digits = 3 if "/" in way else 1
        table.add_row(way, *(f"{v:.{digits}f}" for v in (*values, statistics.median(values), min(values), max(values))))
    console = Console()
    console.print(table)
    verdict = "met" if results["median_ratio"] >= TARGET else "MISSED"
    console.print(f"Median ratio {results['median_ratio']:.3f}, target {TARGET}: {verdict}")
    if results["cold_start"]:
        cold = results["cold_start"]
        console.print(
            f"Cold start, process start to {COLD_TEXTS} texts embedded: engine {cold['engine_s']:.1f} s "
            f"(of which engine.run says {cold['start_s']:.1f} s), sentence_transformers' encode {cold['loop_s']:.1f} s"
        )


if __name__ == "__main__":
    exit_on_sigterm()
    main()
