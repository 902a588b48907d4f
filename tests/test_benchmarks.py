"""The benchmarks: what makes their numbers right, and what a failure leaves of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest

from benchmarks import corpus, local, local_report, measure, steady_state
from benchmarks.batch_search import searched
from benchmarks.local_rounds import Bench, Way, ways_over
from benchmarks.local_texts import TextSet, dealt, drawn, lowest_cosine
from benchmarks.models import ConstantModel
from tests.kills import ROOT


def test_texts_that_are_drawn_again_are_not_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine would look them up, where all others compute them."""
    monkeypatch.setitem(corpus.KINDS, "few", lambda: iter(["a", "b", " ", "c", "c"]))
    once = drawn("few", 4)
    assert sorted(once) == ["a", "b", "c", "c"]
    assert drawn("few", 10) == [*once, *(f"2 {text}" for text in once), *(f"3 {text}" for text in once[:2])]
    assert drawn("few", 2) == corpus.sample("few", 2)


def test_texts_are_dealt_into_piles_of_the_same_lengths() -> None:
    texts = ["x" * length for length in range(1, 1001)]
    piles = np.array([len(text) for text in dealt(texts, 10)]).reshape(10, 100)
    assert sorted(piles.ravel()) == list(range(1, 1001))
    assert np.ptp(piles.mean(axis=1)) < 10


def test_the_lowest_cosine_of_float16_is_computed_in_float32(tmp_path: Path) -> None:
    reference = np.random.default_rng(0).standard_normal((500, 384), np.float32)
    reference /= np.linalg.norm(reference, axis=1, keepdims=True)
    np.save(tmp_path / "vectors.npy", reference)
    texts = {"reference": str(tmp_path / "vectors.npy"), "rows": len(reference)}
    assert lowest_cosine(reference.astype(np.float16), texts) > 0.999999


@pytest.mark.parametrize(
    ("best", "sizes", "tried"),
    [
        (512, [8, 16, 32, 64], {8, 16, 32, 64, 128, 256, 512, 1024}),
        (2, [8, 16, 32, 64], {8, 16, 32, 64, 4, 2, 1}),
        (1, [8, 16], {8, 16, 4, 2, 1}),
        (16, [8, 16, 32], {8, 16, 32}),
        (32, [16], {16, 32, 64}),
        (5000, [64, 2048], {64, 512, 128, 256}),
    ],
)
def test_the_search_for_a_batch_size_goes_on_while_the_best_is_at_an_edge(
    best: int, sizes: list[int], tried: set[int]
) -> None:
    """Up to as many texts as there are, here 1,024 or 512, and down to one."""
    most = 512 if best == 5000 else 1024
    rates = searched(lambda size: 1 / (1 + abs(np.log2(size / best))), sizes, most)
    assert set(rates) == tried
    assert max(rates, key=lambda size: rates[size]) == min(best, most)


def test_a_batch_size_that_memory_has_no_room_for_ends_the_search() -> None:
    rates = searched(lambda size: float(size) if size <= 128 else 0.0, [32, 64], 1024)
    assert rates == {32: 32, 64: 64, 128: 128, 256: 0}


def test_a_rate_of_zero_has_no_ratio() -> None:
    ways = {
        "end to end float32": {"median": 600.0},
        "Daft float32": {"median": 0.0},
        "encode float32": {"median": 300.0},
    }
    shown = local_report.ratios({"short": {"ways": ways}}, "cpu")
    assert [(row["under"], row["short"]["value"]) for row in shown] == [("encode float32", 2.0)]


def test_daft_is_left_out_and_named_where_its_warm_up_would_be_all_that_it_embeds(
    tmp_path: Path, with_daft: None
) -> None:
    """20,480 messages in shards of 5,120: a quarter of them is a shard, and so is a tenth."""
    names = {}
    for num_shards in (4, 20):
        bench = Bench("cpu", 1, tmp_path)
        texts = TextSet("short", ["x"] * (8 * num_shards), 8, tmp_path)
        rates = {dtype: {"8": 1.0} for dtype in ("float32", "bfloat16")}
        names[num_shards] = [
            "Daft float32" in [way.name for way in ways_over(bench, texts, rates)],
            bench.skipped != [],
        ]
    assert names == {4: [False, True], 20: [True, False]}


@pytest.fixture
def with_daft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it look installed: nothing of it is called here."""
    monkeypatch.setattr("benchmarks.local_rounds.find_spec", lambda _: object())


def test_ways_are_listed_though_no_batch_size_could_be_measured(tmp_path: Path) -> None:
    texts = TextSet("short", ["x"] * 160, 8, tmp_path)
    ways = list(ways_over(Bench("cpu", 1, tmp_path), texts, {"float32": {}, "bfloat16": {"8": 1.0, "16": 2.0}}))
    sizes = {way.name: way.arguments["batch_size"] for way in ways if way.function == "encode"}
    assert sizes == {"encode float32": 32, "encode bfloat16": 16}


def test_a_way_that_fails_is_told_and_ends_nothing(tmp_path: Path) -> None:
    bench = Bench("cpu", 1, tmp_path)
    assert bench.measure(Way("bad", "no_such_way", {}), TextSet("short", ["x"], 1, tmp_path), 0) == []
    assert bench.failed == ["round 1, short, bad failed"]


@pytest.mark.parametrize("error", [RuntimeError("it failed"), measure.OutOfMemory("1.0 GiB were left")])
def test_a_part_that_fails_takes_nothing_of_the_others_with_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(local, "seconds_of", fail)
    monkeypatch.setattr(local, "inline", lambda *_: [{"texts": 1, "engine_s": 0.1, "encode_s": 0.2}])
    monkeypatch.setattr(local, "text_set", fail)
    with pytest.raises(SystemExit) as ended:
        local.main(["--parts", "topology,cold,inline", "--rounds", "0", "--cold-starts", "1", "--json"])
    assert ended.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert told["inline"][0]["encode_s"] == 0.2
    assert told["failed"] == [
        "the reference of short texts failed",
        "the reference of long texts failed",
        "cold start 1, engine failed",
        "cold start 1, encode failed",
    ]
    local_report.show(told)


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"failed with 3:\nnot today"):
        measure.seconds_of("-c", "import sys; sys.stderr.write('not today'); sys.exit(3)")


class Overlapping(ConstantModel):
    """Answers its calls two by two, and notes how many are in it."""

    shards_at_once = 2
    inside: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self._two = asyncio.Barrier(2)
        self._num_inside = 0

    async def embed(self, texts: list[str]) -> Any:
        self._num_inside += 1
        async with asyncio.timeout(30):
            await self._two.wait()
        self.inside.append(self._num_inside)
        await self._two.wait()
        self._num_inside -= 1
        return await super().embed(texts)


def test_a_bare_loop_has_as_many_shards_in_the_model_as_an_actor(tmp_path: Path) -> None:
    """It waits for none of them before it reads the next; answers come in the order of shards."""
    starts, inside = measure.fresh("tests.test_benchmarks:overlap", folder=str(tmp_path)).result
    assert starts == [0, 2, 4, 6, 8, 10]
    assert inside == [2] * 6


def overlap(folder: str) -> tuple[list[int], list[int]]:
    from benchmarks.bare_loop import loops
    from tests import test_benchmarks

    source = corpus.write(Path(folder, "texts.parquet"), [f"text {number}" for number in range(12)])
    about = {"source": source, "output": f"{folder}/out", "shard_rows": 2, "cpus_per_actor": measure.num_cores()}
    (done,) = loops(about | {"model": "custom:tests.test_benchmarks.Overlapping"}).done
    return [one.shard.start for one in done], test_benchmarks.Overlapping.inside


def test_every_loop_counts_from_the_end_of_its_first_shard_to_that_of_its_last() -> None:
    """Shards overlap, so a later one may be done first."""
    assert steady_state.of_loops(_loops([1.0, 3.0, 2.0], [5.0, 7.0]))[0] == 20 / 2 + 10 / 2
    with pytest.raises(SystemExit, match="too few texts"):
        steady_state.of_loops(_loops([1.0, 2.0], [1.0]))


def _loops(*ends: list[float]) -> Any:
    done = [[SimpleNamespace(answer=SimpleNamespace(vectors=[0] * 10), at=at) for at in own] for own in ends]
    return SimpleNamespace(done=done)


ENDS = {
    "ends by itself": "import os; os._exit(1)",
    "goes on": "import time; time.sleep(60)",
}


@pytest.mark.parametrize("how", ENDS)
def test_what_a_measured_process_leaves_behind_is_ended(how: str, tmp_path: Path) -> None:
    """However it ends itself, or is ended with the benchmark."""
    note = tmp_path / "pid"
    leave = f"import pathlib, subprocess; p = subprocess.Popen(['sleep', '60']); pathlib.Path({str(note)!r}).write_text(str(p.pid)); "
    with measure.started([sys.executable, "-c", leave + ENDS[how]]) as child:
        _wait_for(lambda: note.exists() and note.read_text() and (how == "goes on" or child.poll() is not None))
    _wait_for(lambda: not _runs(int(note.read_text())))


def test_sigterm_to_a_benchmark_ends_what_it_measures(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    inner = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(60)"
    outer = f"from benchmarks import measure; measure.exit_on_sigterm(); measure.seconds_of('-c', {inner!r})"
    benchmark = subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT)
    try:
        _wait_for(lambda: note.exists() and note.read_text())
        benchmark.send_signal(signal.SIGTERM)
        assert benchmark.wait(30) == 128 + signal.SIGTERM
    finally:
        benchmark.kill()
    assert not _runs(int(note.read_text()))


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _wait_for(is_so: Callable[[], Any]) -> None:
    ends = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_the_first_gpu_alone_is_seen_by_all_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "measured", lambda *_: {"seen": os.environ["CUDA_VISIBLE_DEVICES"]})
    for given, seen in (("3,1", "3"), (None, "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given or "")  # which has it put back what `main` sets
        if given is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        with pytest.raises(SystemExit):
            local.main(["--device", "cuda", "--json"])
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
