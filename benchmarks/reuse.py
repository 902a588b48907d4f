"""
What is embedded again of an input that changed a little, and how long that takes beside all of it.

    python benchmarks/reuse.py                      minutes
    python benchmarks/reuse.py --in-place           edits the input of one output, instead of making others with --reuse
    python benchmarks/reuse.py --rows 1000000 --ms-per-text 0

One file of texts is embedded whole; then 1% of rows is appended, or 1% of its texts is changed, spread evenly, or 1% of rows is put in front
of all others. Each run is real, on one Ray. The model waits for so long a text, as for a device, and answers with constants.
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

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import synthetic
from benchmarks.measure import ENVIRONMENT
from benchmarks.resume import show

if TYPE_CHECKING:
    from collections.abc import Sequence

ROW_GROUP_ROWS = 65_536


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What is embedded again of an input that changed a little.")
    parser.add_argument("--rows", type=int, default=100_000, help="of the input (default: %(default)s)")
    parser.add_argument(
        "--percent", type=float, default=1.0, help="that are appended, changed, put in front (%(default)s)"
    )
    parser.add_argument("--ms-per-text", type=float, default=0.5, help="that the model takes (%(default)s)")
    parser.add_argument("--dimension", type=int, default=384, help="of its vectors (%(default)s)")
    parser.add_argument("--in-place", action="store_true", help="change the input of one output, and run it again")
    parser.add_argument("--folder", help="where to make temporary files (the system's folder for them)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    os.environ |= ENVIRONMENT
    import ray

    ray.init(address="local", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="engine-reuse-", dir=options.folder) as name:
        rows = measure(Path(name), options)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        show(f"{options.rows:,} rows, {options.ms_per_text:g} ms a text", rows)


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all of it, and then what is left to do after each kind of change."""
    job = {
        "model": "custom:benchmarks.models.SlowModel",
        "num_actors": 1,
        "model_args": {"dimension": options.dimension, "ms_per_text": options.ms_per_text},
    }
    texts = [f"the text of row {row}, as it was at first" for row in range(options.rows)]
    num_changed = round(options.rows * options.percent / 100)
    source = write(folder / "in/texts.parquet", texts)
    whole = synthetic.run_job(job | {"source": str(source), "output": str(folder / "out")})
    rows = [row("all, at first", whole)]
    for what in ("appended", "changed", "put in front"):
        changed = change(texts, what, num_changed)
        if options.in_place:
            texts = changed
            write(source, texts)
            place = {"source": str(source), "output": str(folder / "out")}
        else:
            other = write(folder / what / "texts.parquet", changed)
            place = {"source": str(other), "output": str(folder / f"{what} out"), "reuse": [str(folder / "out")]}
        again = synthetic.run_job(job | place)
        rows.append(row(f"{options.percent:g}% {what}", again, whole))
    return rows


def change(texts: list[str], what: str, num_rows: int) -> list[str]:
    """Return texts of which some are new."""
    new = [f"{what}: number {number}" for number in range(num_rows)]
    if what == "appended":
        return texts + new
    if what == "put in front":
        return new + texts
    step = len(texts) // num_rows
    changed = list(texts)
    changed[: step * num_rows : step] = new
    return changed


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=ROW_GROUP_ROWS)
    return path


def row(what: str, result: dict[str, Any], whole: dict[str, Any] | None = None) -> dict[str, Any]:
    num_new = result["num_rows"] - result["num_reused"]
    return {
        "what": what,
        "rows made": result["num_rows"],
        "texts embedded": num_new,
        "share": f"{num_new / result['num_rows']:.2%}",
        "seconds": round(result["seconds"], 1),
        "of a full run": f"{result['seconds'] / whole['seconds']:.1%}" if whole else "100%",
        "after the first shard": round(result["seconds"] - result["start_s"], 1),
    }


if __name__ == "__main__":
    main()
