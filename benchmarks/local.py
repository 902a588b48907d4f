"""
Local models side by side: `SentenceTransformer.encode`, Ray Data's recipe, Daft and the engine, over the same texts.

    python benchmarks/local.py                          about forty minutes on two cores
    python benchmarks/local.py --parts rates --rounds 1 --short-rows 20480 --long-rows 1280    a look
    python benchmarks/local.py --parts topology         one actor of all cores, or one for each core
    python benchmarks/local.py --device cuda            on a GPU: bfloat16 and float16 too, larger batches, more rows

The texts are real, and the model is the real all-MiniLM-L6-v2, from a package: chat messages of about 15 tokens, and
conversations of very different lengths, cut by the model to 256. Each way embeds in a fresh process. In a round every way has one
turn for each kind of text, and each round begins with another way, so that a machine that slows down slows all.

rates
    Texts a second in the steady state, without cold starts. `encode` is called once with all texts in memory, after a warm-up,
    with the batch size that was best on a sample before, beyond those given if the best is the largest or the smallest of them. The
    pool is encode's own, a process of one thread for each core. The recipe of Ray's documentation runs as it is written there, and
    tuned (`local_ways.ray_recipe` says how). The bare loop reads the engine's shards and calls the engine's model, with as many
    shards in it at once as an actor has; where the engine has several actors, there are as many loops. `steady_state.py` says how
    each is timed. What is not ours is slow, and embeds a quarter of the texts, which
    are of the same mix (`local_texts.dealt`). A few hundred texts tell nothing: with few bytes the engine takes PyTorch.
    Cosines are to encode in float32; padding is its share of the tokens that are computed; idle is the device's time without
    a batch. A way's share of the peak is its FLOPs over its texts' own tokens, without padding, beside the best matrix
    multiplication in the same dtype in the same rounds, of torch or OpenVINO (`peak.py`); the engine computes texts that come again
    once, and only what it computes counts for it there.
cold
    From nothing to the vectors of 1,000 short texts on disk: `python -m engine run` and a script with `encode`, in turn.
inline
    `engine.embed` beside `encode` (as it is called by default) in one warm process, call by call.
topology
    On CPUs: one actor of all cores beside one of each core, end to end.

All ways have the same cores, or one GPU: the first of CUDA_VISIBLE_DEVICES. A part or a way that fails is told at the end, with exit
code 1, and what else was measured is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import corpus, local_report
from benchmarks.local_rounds import DTYPES, Bench, progress, rates, topology
from benchmarks.local_texts import MODEL, model_folder, text_set
from benchmarks.measure import exit_on_sigterm, fresh, num_cores, seconds_of
from engine.pipeline.resources import MAX_CORES_PER_ACTOR

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.local_texts import Row, TextSet

PARTS = ("rates", "cold", "inline", "topology")
KINDS = {"short": "messages", "long": "conversations"}
ENCODE_BATCHES = {"cpu": "8,16,32,64", "cuda": "64,256,1024,2048,4096"}
ROWS = {"cpu": (46_080, 5120), "cuda": (196_608, 21_504)}
"""Of a GPU, or of as many cores as an actor has at most."""
SHARD_ROWS = {"cpu": "5120,256", "cuda": "16384,1792"}
FEW_TEXTS = 1000
INLINE_TEXTS = (1, 10, 100, 1000)
ENCODE_SCRIPT = """
import sys
import pyarrow as pa, pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer
source, output, folder, device = sys.argv[1:]
table = pq.read_table(source)
vectors = SentenceTransformer(folder, device=device).encode(table["text"].to_pylist(), batch_size=32)
flat = pa.array(vectors.reshape(-1))
pq.write_table(table.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])), output)
"""


def main(argv: Sequence[str] | None = None) -> None:
    options = _options(argv)
    parts = options.parts.split(",")
    if options.device == "cuda":  # the engine and the recipe would have all of them, encode one
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    with tempfile.TemporaryDirectory(prefix="engine-local-", dir=options.folder) as name:
        bench = Bench(options.device, options.rounds, Path(name))
        results: dict[str, Any] = {"device": options.device, "cores": num_cores(), "parts": parts}
        results |= measured(bench, options, parts)
    results |= {"skipped": bench.skipped, "failed": bench.failed}
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        local_report.show(results)
    sys.exit(1 if bench.failed else 0)


def measured(bench: Bench, options: argparse.Namespace, parts: Sequence[str]) -> dict[str, Any]:
    """Measure the parts that are asked for; one that fails takes nothing of the others with it."""
    results: dict[str, Any] = {}
    sets = text_sets(bench, options) if {"rates", "topology"} & set(parts) else []
    few = corpus.write(bench.folder / "few.parquet", corpus.sample("messages", FEW_TEXTS))
    sizes = [int(size) for size in options.encode_batches.split(",")]
    of_parts: dict[str, Callable[[], dict[str, Any]]] = {
        "rates": lambda: rates(bench, sets, sizes),
        "topology": lambda: topology(bench, sets),
        "cold": lambda: {"cold": cold_starts(bench, few, options.cold_starts)},
        "inline": lambda: {"inline": inline(bench, few)},
    }
    for part, measure in of_parts.items():
        if part in parts:
            results |= bench.attempt(part, measure, {})
    return results


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Local models side by side.")
    parser.add_argument("--parts", default="rates,cold,inline", help=f"which of {', '.join(PARTS)} (%(default)s)")
    parser.add_argument("--device", choices=sorted(DTYPES), default="cpu", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of all ways (%(default)s)")
    parser.add_argument(
        "--short-rows", type=int, help=f"messages; 0: none ({_defaults(ROWS, 0)}; more of more than four cores)"
    )
    parser.add_argument(
        "--long-rows", type=int, help=f"conversations; 0: none ({_defaults(ROWS, 1)}; more of more than four cores)"
    )
    parser.add_argument("--shard-rows", help=f"rows of a shard of messages, of conversations ({_defaults(SHARD_ROWS)})")
    parser.add_argument("--encode-batches", help=f"batch sizes to choose encode's from ({_defaults(ENCODE_BATCHES)})")
    parser.add_argument("--cold-starts", type=int, default=3, help="of each way (%(default)s)")
    parser.add_argument("--folder", help="where to make temporary files (the system's folder for them)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(argv)
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: not one of {', '.join(PARTS)}")
    # The engine has an actor for each group of cores, and each needs several shards.
    num_actors = max(num_cores() // MAX_CORES_PER_ACTOR, 1) if options.device == "cpu" else 1
    short, long = (rows * num_actors for rows in ROWS[options.device])
    options.short_rows = short if options.short_rows is None else options.short_rows
    options.long_rows = long if options.long_rows is None else options.long_rows
    options.shard_rows = options.shard_rows or SHARD_ROWS[options.device]
    options.encode_batches = options.encode_batches or ENCODE_BATCHES[options.device]
    return options


def _defaults(of_devices: dict[str, Any], at: int | None = None) -> str:
    return ", ".join(f"{device}: {value if at is None else value[at]}" for device, value in of_devices.items())


def text_sets(bench: Bench, options: argparse.Namespace) -> list[TextSet]:
    """Draw the texts, and have their references made."""
    shard_rows = [int(rows) for rows in options.shard_rows.split(",")]
    if len(shard_rows) != len(KINDS):
        raise SystemExit(f"--shard-rows: {options.shard_rows} is not two numbers with a comma between them")
    sets = []
    for (name, kind), rows, of_shard in zip(
        KINDS.items(), (options.short_rows, options.long_rows), shard_rows, strict=True
    ):
        if rows:
            progress.print(f"{name}: the reference of {rows:,} {kind}", style="dim")
            about = (name, kind, rows, of_shard, bench.folder, bench.device)
            sets += bench.attempt(f"the reference of {name} texts", lambda about=about: [text_set(*about)], [])
    return sets


def cold_starts(bench: Bench, source: str, count: int) -> Row:
    """Return seconds from the start of a process to its end, in which it embedded a few texts from file to file."""
    seconds: dict[str, list[float]] = {"engine_s": [], "encode_s": []}
    for number in range(count):
        output = str(bench.folder / f"cold-{number}")
        job = ["--source", source, "--output", output, "--model", MODEL, "--device", bench.device]
        script = [source, f"{output}.parquet", model_folder(), bench.device]
        for name, command in {
            "engine": ("-m", "engine", "run", *job),
            "encode": ("-c", ENCODE_SCRIPT, *script),
        }.items():
            title = f"cold start {number + 1}, {name}"
            taken = bench.attempt(title, lambda command=command: [seconds_of(*command)], [])
            seconds[f"{name}_s"] += taken
            progress.print(f"{title}: {', '.join(f'{one:.1f} s' for one in taken)}", style="dim")
    return {"texts": FEW_TEXTS, **seconds}


def inline(bench: Bench, source: str) -> list[Row]:
    """Return the seconds of a call with so many texts, of `engine.embed` and of `encode`."""
    progress.print("inline", style="dim")
    rows: list[Row] = fresh(
        "benchmarks.local_ways:inline", texts={"source": source}, device=bench.device, counts=INLINE_TEXTS
    ).result
    return rows


if __name__ == "__main__":
    exit_on_sigterm()
    main()
