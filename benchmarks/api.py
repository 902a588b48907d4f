"""
How well a provider's limits are used, and what the client costs: ours beside what people do without it.

    python benchmarks/api.py                                            about half an hour
    python benchmarks/api.py --parts limits --cases tokens-4-skewed     one case: five minutes
    python benchmarks/api.py --parts unlimited,memory                   two minutes

Everything is asked of the strict server of tests/, on loopback, with 0.2 s of latency where there are limits. The share of a limit is
measured by the server, which lets a tenth of a minute's worth be spent at once: from the last request that it accepted in the first ten
seconds to the last of all, what it accepted after the one, over what the limit allows in that time. Each way embeds the same texts in fresh processes, one way after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.api_ways import MODEL, text_of
from benchmarks.measure import ROOT, environment, exit_on_sigterm, started
from tests.strict_server import Server, num_tokens, serving

FIRST_S = 10.0
BURST_S = 6.0
TIMEOUT_S = 900
TARGET_SHARE, TARGET_REFUSALS, TARGET_RATIO = 0.95, 0.001, 3.0
LATENCY_S = 0.2
KEY = {"OPENAI_API_KEY": "sk-benchmark"}
RPM, TPM, PLENTY = 300, 600_000, 10**9
SKEWED = (0.7, 0.1, 0.1, 0.1)
ROUNDS_OF_TEXTS = {"requests": (100, 10), "tokens": (500, 40)}
"""Texts a request, and words a text."""
PEERS = {"kura": "tests/kura.txt", "daft": "benchmarks/peers.txt"}
ENGINE = "import json, sys, engine; engine.run(progress=False, **json.loads(sys.argv[1]))"
progress = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Case:
    """What is limited, and who asks."""

    bound: str
    workers: int
    is_skewed: bool

    @property
    def name(self) -> str:
        """What --cases calls it."""
        return f"{self.bound}-{self.workers}-{'skewed' if self.is_skewed else 'even'}"

    @property
    def limits(self) -> dict[str, int]:
        """Of the server; only one of them binds."""
        return {"rpm": RPM, "tpm": PLENTY} if self.bound == "requests" else {"rpm": 10_000, "tpm": TPM}

    def shares(self) -> Sequence[float]:
        """Of the texts, for each worker of ways that divide them beforehand."""
        return SKEWED if self.is_skewed and self.workers > 1 else [1 / self.workers] * self.workers


@dataclass
class Outcome:
    """Of one way in one case."""

    case: str
    way: str
    share: float
    refused: int
    refused_share: float
    texts_a_request: float
    embedded: float
    seconds: float


CASES = [Case(bound, workers, skew) for bound in ("requests", "tokens") for workers in (1, 4) for skew in (False, True)]


class Watch:
    """Looks at a server's counts ten seconds after its first answer."""

    def __init__(self, server: Server) -> None:
        self._server, self._done = server, threading.Event()
        self.then: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.2):
            stats = self._server.stats()
            if stats["first_s"] is not None and time.monotonic() - stats["first_s"] >= FIRST_S:
                self.then = stats
                return

    def stop(self) -> dict[str, Any] | None:
        """Return the counts of then; None if all was done before."""
        self._done.set()
        self._thread.join()
        return self.then


def measured(case: Case, way: str, args: argparse.Namespace) -> Outcome:
    """Run one way to its end against a server of its own."""
    batch, words = ROUNDS_OF_TEXTS[case.bound]
    sample = range(0, 10_000, 37)
    tokens = sum(num_tokens(text_of(number, words)) for number in sample) / len(sample)
    limit = RPM if case.bound == "requests" else TPM
    per_minute = limit * batch if case.bound == "requests" else limit / tokens
    num_texts = int(per_minute / 60 * args.seconds / batch) * batch
    options = {"latency_s": LATENCY_S, "constant": True, "burst_s": BURST_S, **case.limits}
    with serving(**options) as server, tempfile.TemporaryDirectory() as folder:
        watch, began = Watch(server), time.monotonic()
        try:
            if way.startswith("engine"):
                _engine(case, way, server, Path(folder), num_texts, batch)
            else:
                _peers(case, way, server, args, num_texts, tokens)
            seconds = time.monotonic() - began
        finally:
            then = watch.stop()
        stats = server.stats()
    done = "num_ok" if case.bound == "requests" else "tokens_paid"
    share = math.nan
    if then is not None and stats["last_s"] > then["last_s"] + 1:
        share = (stats[done] - then[done]) / (stats["last_s"] - then["last_s"]) * 60 / limit
    return Outcome(
        case=case.name,
        way=way,
        share=share,
        refused=stats["num_refused"],
        refused_share=stats["num_refused"] / max(stats["num_requests"], 1),
        texts_a_request=stats["num_embedded"] / max(stats["num_ok"], 1),
        embedded=stats["texts_paid"] / num_texts,
        seconds=seconds,
    )


def _engine(case: Case, way: str, server: Server, folder: Path, num_texts: int, batch: int) -> None:
    """Run the engine over shards of one request, or of a third and of three in turns."""
    words = ROUNDS_OF_TEXTS[case.bound][1]
    sizes = [3 * batch, batch // 3] if case.is_skewed else [batch]
    writer, first, number = None, 0, 0
    while first < num_texts:
        size = min(sizes[number % len(sizes)], num_texts - first)
        table = pa.table({"text": [text_of(number, words) for number in range(first, first + size)]})
        writer = writer or pq.ParquetWriter(folder / "in.parquet", table.schema)
        writer.write_table(table, row_group_size=size)
        first, number = first + size, number + 1
    writer.close()
    limits = {"requests_per_minute": case.limits["rpm"], "tokens_per_minute": case.limits["tpm"]}
    options = {
        "source": str(folder / "in.parquet"),
        "output": str(folder / "out"),
        "model": f"openai:{MODEL}",
        "base_url": server.url,
        "shard_rows": batch if not case.is_skewed else 2 * batch,
        "num_actors": case.workers,
        **({"batch_size": batch} if case.bound == "requests" else {}),
        **(limits if way == "engine, limits given" else {}),
    }
    command = [sys.executable, "-c", ENGINE, json.dumps(options)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with started(command, env=environment() | KEY, **pipes) as child:
        said = child.communicate(timeout=TIMEOUT_S)[1]
    if child.returncode:
        progress.print(f"the engine failed:\n{said.decode(errors='replace')[-3000:]}", markup=False)


def _peers(case: Case, way: str, server: Server, args: argparse.Namespace, num_texts: int, tokens: float) -> None:
    """Run a way in as many processes as there are workers, each with its share of the texts."""
    batch, words = ROUNDS_OF_TEXTS[case.bound]
    limit = RPM if case.bound == "requests" else TPM
    first, commands = 0, []
    shares = case.shares()
    for worker, share in enumerate(shares, 1):
        size = num_texts - first if worker == len(shares) else int(num_texts * share / batch) * batch
        command = [sys.executable, "-m", "benchmarks.api_ways", way, f"--url={server.url}", f"--first={first}"]
        command += [
            f"--texts={size}",
            f"--words={words}",
            f"--batch={batch}",
            f"--bound={case.bound}",
            f"--limit={limit}",
        ]
        command += [f"--limit-per-request={tokens * batch}", f"--workers={case.workers}"]
        commands.append(command)
        first += size
    pipes = {"stdout": subprocess.DEVNULL, "stderr": None if args.verbose else subprocess.DEVNULL}
    with ExitStack() as running:
        processes = [running.enter_context(started(one, env=environment() | KEY, **pipes)) for one in commands]
        codes = [process.wait(TIMEOUT_S) for process in processes]
    if any(codes):
        progress.print(f"{way}: exit codes {codes} (--verbose shows why)")


def limits(args: argparse.Namespace) -> list[Outcome]:
    """Measure all ways in all cases that were asked for."""
    ways = ["engine, limits given", "engine, limits learned", "gather", "static"]
    for peer, requirements in PEERS.items():
        if find_spec(peer) is None:
            progress.print(f"{peer}: not installed (pip install --no-deps -r {requirements})")
        else:
            ways.append(peer)
    outcomes = []
    for case in CASES:
        for way in ways if case.name in args.cases or not args.cases else ():
            if args.ways and way.split(",")[0] not in args.ways:
                continue
            outcomes += attempt(args, f"{case.name}, {way}", lambda case=case, way=way: [measured(case, way, args)], [])
            progress.print(outcomes[-1:])
    return outcomes


def attempt(args: argparse.Namespace, title: str, measure: Callable[[], Any], otherwise: Any) -> Any:
    """Measure something; a failure is told, and does not end what else is measured."""
    try:
        return measure()
    except Exception as error:
        args.failed.append(title)
        progress.print(f"{title} failed: {type(error).__name__}: {error}", markup=False)
        return otherwise


def clients(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure clients without limits, in turns; medians of texts a second, by the clock and by the client's core."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "sdk": [], "float": []}
    with serving(constant=True) as server:
        for _ in range(args.rounds):
            for way, rounds in found.items():
                texts = args.texts // 10 if way == "float" else args.texts
                rounds.append(_client(way, server, texts))
                progress.print(way, rounds[-1])
    return {
        way: {name: statistics.median(r[name] for r in rounds) for name in rounds[0]} for way, rounds in found.items()
    }


def memory() -> dict[str, float]:
    """Return the memory of our client after each part of many texts."""
    with serving(constant=True) as server:
        return _client("memory", server, 500_000)


def _client(way: str, server: Server, texts: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.api_ways", way, f"--url={server.url}", f"--texts={texts}"]
    done = subprocess.run(command, env=environment() | KEY, cwd=ROOT, check=True, capture_output=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Lay out what was found, as Markdown."""
    if outcomes := found.get("limits"):
        yield from _row(
            "case", "way", "of the limit", "refusals", "of requests", "texts a request", "embedded", "seconds"
        )
        for o in outcomes:
            share = "not limited" if math.isnan(o["share"]) else f"{o['share']:.3f}"
            refused = (str(o["refused"]), f"{o['refused_share']:.2%}")
            yield from _row(
                o["case"],
                o["way"],
                share,
                *refused,
                f"{o['texts_a_request']:.0f}",
                f"{o['embedded']:.1%}",
                f"{o['seconds']:.0f}",
            )
        ours = [o for o in outcomes if o["way"].startswith("engine")]
        met = sum(o["share"] >= TARGET_SHARE and o["refused_share"] < TARGET_REFUSALS for o in ours)
        yield f"\nengine: {met} of {len(ours)} at {TARGET_SHARE} of the limit and more, with less than {TARGET_REFUSALS:.1%} refusals\n"
    if rates := found.get("unlimited"):
        yield from _row("client", "texts/s", "texts/s per core of the client", "ours to it")
        for way, rate in rates.items():
            ratio = rates["ours"]["core"] / rate["core"]
            yield from _row(way, f"{rate['wall']:,.0f}", f"{rate['core']:,.0f}", f"{ratio:.2f}")
        is_met = rates["ours"]["core"] >= TARGET_RATIO * rates["sdk"]["core"]
        yield f"\nours to the SDK's default path: {TARGET_RATIO:g} is {'met' if is_met else 'missed'}\n"
    if sizes := found.get("memory"):
        yield from _row("MiB after", *sizes)
        yield from _row("", *(f"{size:.0f}" for size in sizes.values()))


def _row(*cells: str) -> Iterator[str]:
    yield f"| {' | '.join(cells)} |"
    if cells[0] in ("case", "client", "MiB after"):
        yield "| --- " * len(cells) + "|"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How well a provider's limits are used, and what the client costs.")
    parser.add_argument("--parts", default="limits,unlimited,memory", help="(%(default)s)")
    parser.add_argument("--cases", default="", help="such as tokens-4-skewed,requests-1-even (all)")
    parser.add_argument("--ways", default="", help="engine, gather, static, kura, daft (all)")
    parser.add_argument(
        "--seconds", type=float, default=60, help="that each way's work takes at the limit (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the unlimited clients (%(default)s)")
    parser.add_argument("--texts", type=int, default=204_800, help="of a round of an unlimited client (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show what peers say on stderr")
    parser.add_argument("--json", action="store_true", help="print one JSON object too")
    args = parser.parse_args(argv)
    args.cases, args.ways = ([name for name in value.split(",") if name] for value in (args.cases, args.ways))
    args.failed = []
    of_parts = {
        "limits": lambda: [asdict(outcome) for outcome in limits(args)],
        "unlimited": lambda: clients(args),
        "memory": memory,
    }
    asked = args.parts.split(",")
    found = {part: attempt(args, part, measure, None) for part, measure in of_parts.items() if part in asked}
    sys.stdout.write("\n".join(lines(found)) + "\n")
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(f"failed: {'; '.join(args.failed)}" if args.failed else 0)


if __name__ == "__main__":
    exit_on_sigterm()
    main()
