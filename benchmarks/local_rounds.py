"""The rounds of `local.py`: which ways are measured with which settings, and in which order."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from benchmarks import local_report
from benchmarks.batch_search import best_size
from benchmarks.local_texts import Row, TextSet
from benchmarks.measure import fresh, num_cores
from benchmarks.peak import DTYPES, Found

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_T = TypeVar("_T")
PEERS_SHARE = 0.25
SAMPLE_SHARE = 0.1
CALL_ROWS = {"cpu": {"short": 256, "long": 64}, "cuda": {"short": 4096, "long": 1024}}
"""Of the recipe's `map_batches`: enough for `encode` to sort."""
MIN_CALLS = 5
"""Of the recipe's class, of which each actor's first is not counted."""
ENCODE_BATCH = 32
"""Of `encode`, by default: where the search for the best one failed."""
progress = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to embed: a function of `local_ways`, and what it is called with."""

    name: str
    function: str
    arguments: dict[str, Any]
    share: float = 1.0
    """Of the texts."""
    writes: bool = False


@dataclass(slots=True)
class Bench:
    """What all parts need, and what they leave behind."""

    device: str
    num_rounds: int
    folder: Path
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def attempt(self, title: str, measure: Callable[[], _T], otherwise: _T) -> _T:
        """Measure something; a failure is told, has `otherwise` for its result, and does not end what else is measured."""
        try:
            return measure()
        except Exception as error:
            self.failed.append(f"{title} failed")
            progress.print(f"{title}: {type(error).__name__}: {error}", style="red", markup=False)
            return otherwise

    def peak(self) -> list[Found]:
        """Measure how fast the machine multiplies matrices, in every dtype."""
        return [fresh("benchmarks.peak:matmul_rates", dtypes=DTYPES[self.device], device=self.device).result]

    def measure(self, way: Way, texts: TextSet, number: int) -> list[Row]:
        """Measure a way once; nothing is returned if it fails."""
        title = f"round {number + 1}, {texts.name}, {way.name}"
        return self.attempt(title, lambda: [self._measured(way, texts, title)], [])

    def _measured(self, way: Way, texts: TextSet, title: str) -> Row:
        output = self.folder / "output"
        arguments = way.arguments | ({"output": str(output)} if way.writes else {})
        try:
            measured = fresh(f"benchmarks.local_ways:{way.function}", texts=texts.given(way.share), **arguments)
        finally:
            shutil.rmtree(output, ignore_errors=True)
        row: Row = measured.result
        said = f"{row['texts_per_s']:,.1f} texts/s, cosine {row['cosine']:.7f}, {measured.seconds:.0f} s"
        progress.print(f"{title}: {said}", style="dim")
        return row


def rates(bench: Bench, sets: list[TextSet], batch_sizes: list[int]) -> dict[str, Any]:
    """Measure all ways."""
    if bench.device != "cpu":
        bench.skipped.append("encode with a pool of processes, and the tuned recipe: for CPUs only")
    if find_spec("daft") is None:
        bench.skipped.append("Daft: not installed (pip install --no-deps -r benchmarks/peers.txt)")
    found = {texts.name: encode_batches(bench, texts, batch_sizes) for texts in sets}
    ways = {texts.name: list(ways_over(bench, texts, found[texts.name])) for texts in sets}
    measured, peaks = rounds(bench, sets, ways)
    summed_up = {texts.name: local_report.summary(texts, measured[texts.name], peaks) for texts in sets}
    return {
        "rates": summed_up,
        "ratios": local_report.ratios(summed_up, bench.device),
        "peak_flops_per_s": peaks,
        "batch_rates": found,
    }


def encode_batches(bench: Bench, texts: TextSet, batch_sizes: list[int]) -> dict[str, dict[str, float]]:
    """Measure `encode` with each batch size on a sample, in every dtype."""
    found = {}
    for dtype in DTYPES[bench.device]:
        about = {"texts": texts.given(SAMPLE_SHARE), "dtype": dtype, "device": bench.device, "batch_sizes": batch_sizes}
        found[dtype] = bench.attempt(
            f"{texts.name}, the best batch size of encode {dtype}",
            lambda about=about: fresh("benchmarks.local_ways:batch_rates", **about).result,
            {},
        )
        shown = ", ".join(f"{size}: {rate:,.1f}" for size, rate in found[dtype].items())
        progress.print(f"{texts.name}, encode {dtype} by batch size: {shown}", style="dim")
    return found


def ways_over(bench: Bench, texts: TextSet, batch_rates: dict[str, dict[str, float]]) -> Iterator[Way]:
    """Yield the ways that can be measured here, each with its best settings."""
    best = {
        dtype: best_size({int(size): rate for size, rate in rates.items()}) if rates else ENCODE_BATCH
        for dtype, rates in batch_rates.items()
    }
    on = {"device": bench.device}
    for dtype, size in best.items():
        yield Way(f"encode {dtype}", "encode", on | {"dtype": dtype, "batch_size": size}, PEERS_SHARE)
    if bench.device == "cpu":
        yield Way("encode pool float32", "encode_pool", {"batch_size": best["float32"]}, PEERS_SHARE)
    call_rows = min(CALL_ROWS[bench.device][texts.name], max(texts.given(PEERS_SHARE)["rows"] // MIN_CALLS, 1))
    recipe = on | {"batch_size": best["float32"], "call_rows": call_rows}
    yield Way("Ray recipe float32", "ray_recipe", recipe | {"tuned": False}, PEERS_SHARE, writes=True)
    if bench.device == "cpu":
        yield Way("Ray recipe tuned float32", "ray_recipe", recipe | {"tuned": True}, PEERS_SHARE, writes=True)
    if find_spec("daft") is not None:
        warm_up = texts.given(SAMPLE_SHARE)
        if warm_up["rows"] < texts.given(PEERS_SHARE)["rows"]:
            yield Way("Daft float32", "daft", {"warm_up": warm_up}, PEERS_SHARE, writes=True)
        else:
            bench.skipped.append(f"Daft, {texts.name} texts: too few shards to take a run over some off one over all")
    for name, function in (("bare loop", "loop"), ("end to end", "end_to_end")):
        for dtype in best:
            ours = on | {"dtype": dtype, "shard_rows": texts.shard_rows}
            yield Way(f"{name} {dtype}", function, ours, writes=True)


def topology(bench: Bench, sets: list[TextSet]) -> dict[str, Any]:
    """Measure the engine with one actor of all cores, and with one for each core."""
    if bench.device != "cpu":
        bench.skipped.append("topology: for CPUs only")
        return {}
    ways = {texts.name: list(_topologies(texts)) for texts in sets}
    measured, peaks = rounds(bench, sets, ways)
    return {"topology": {texts.name: local_report.summary(texts, measured[texts.name], peaks) for texts in sets}}


def _topologies(texts: TextSet) -> Iterator[Way]:
    cores = num_cores()
    # By name: an actor that sees little text would take PyTorch, and the more actors, the less each sees.
    backend = "torch" if find_spec("openvino") is None else "openvino"
    for each in dict.fromkeys((cores, 1)):
        for dtype in DTYPES["cpu"]:
            job = {"dtype": dtype, "device": "cpu", "shard_rows": texts.shard_rows}
            options = {"cpus_per_actor": each, "backend": backend}
            name = f"actors: {cores // each} of {each} cores, {dtype}"
            yield Way(name, "end_to_end", job | {"options": options}, writes=True)


def rounds(
    bench: Bench, sets: list[TextSet], ways: dict[str, list[Way]]
) -> tuple[dict[str, dict[str, list[Row]]], list[Found]]:
    """Measure ways over sets of texts, round by round; return what was measured, and the rates of multiplications in each round."""
    measured: dict[str, dict[str, list[Row]]] = {name: {way.name: [] for way in own} for name, own in ways.items()}
    peaks: list[Found] = []
    for number in range(bench.num_rounds):
        peaks += bench.attempt(f"round {number + 1}, {local_report.PEAK}", bench.peak, [])
        for texts in sets:
            own = ways[texts.name]
            first = number * len(own) // bench.num_rounds
            for way in own[first:] + own[:first]:
                measured[texts.name][way.name] += bench.measure(way, texts, number)
    return measured, peaks
