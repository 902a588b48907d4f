"""Whole runs that ask a provider: what they pay, what stops them, and what is left when they are killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import ray

import engine
from engine.commits import Receipt
from engine.errors import ConfigError, FingerprintMismatch, QuotaExhausted
from engine.model_config import ModelConfig
from engine.models.api.port import Report
from engine.pipeline import budget
from engine.schema import InputFile, Shard
from tests.kills import EMBEDDING, ROOT, kill_worker, wait_until
from tests.strict_server import Server, serving, vector
from tests.test_garbage import later

pytestmark = pytest.mark.ray

MODEL = "openai:text-embedding-3-small"
DIMENSION = 32
NUM_ROWS = 900
SHARD_ROWS = 50
BUDGET = "ray::Budget"


@pytest.fixture(scope="module", autouse=True)
def address(shared_ray) -> Iterator[str]:
    """A cluster whose workers have a key in their environment, and that outlives drivers."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OPENAI_API_KEY", "sk-of-the-cluster")
        yield shared_ray


@pytest.fixture(scope="module")
def strict() -> Iterator[Server]:
    """One server for the module; tests reset it."""
    with serving(dimension=DIMENSION) as server:
        yield server


@pytest.fixture
def server(strict: Server) -> Server:
    """A server that has been paid nothing."""
    strict.behave(rpm=None, tpm=None, latency_s=0.02, faults=[], key=None)
    strict.reset()
    return strict


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path)


def write_source(folder: Path) -> Path:
    """Write 900 rows in 18 shards, of which five have no text and ten the same."""
    texts: list[str | None] = [f"text {row} of the source, and no other" for row in range(NUM_ROWS)]
    texts[3:6] = [None, "", "  "]
    texts[500:502] = ["", None]
    texts[100:110] = ["the same"] * 10
    (folder / "in").mkdir(parents=True)
    table = pa.table({"id": [str(row) for row in range(NUM_ROWS)], "text": texts})
    pq.write_table(table, folder / "in" / "a.parquet", row_group_size=SHARD_ROWS)
    return folder / "in"


@pytest.fixture(scope="module")
def paid_run(strict: Server, tmp_path_factory) -> tuple[Path, float]:
    """A folder with `in` and its whole output `out`, which tests find in `paid`; and what it cost."""
    folder = tmp_path_factory.mktemp("paid")
    strict.behave(rpm=None, tpm=None, latency_s=0.02, faults=[], key=None)
    cost = run(write_source(folder / "now"), strict).provider.cost
    (folder / "now").rename(folder / "kept")
    return folder, cost


@pytest.fixture
def paid(paid_run: tuple[Path, float]) -> tuple[Path, float]:
    """The source, whose output lies beside it, at the same place for each test; and what it cost."""
    folder, cost = paid_run
    shutil.rmtree(folder / "now", ignore_errors=True)
    shutil.copytree(folder / "kept", folder / "now")
    return folder / "now/in", cost


def options(source: Path, server: Server, **more) -> dict[str, object]:
    given = {"source": str(source), "output": str(source.parent / "out"), "id_column": "id", "model": MODEL}
    return (
        given
        | {"base_url": server.url, "shard_rows": SHARD_ROWS, "token_price": 1000.0, "dimensions": DIMENSION}
        | more
    )


def run(source: Path, server: Server, **more):
    return engine.run(**options(source, server, **more), progress=False)


def needed_tokens(source: Path, server: Server) -> int:
    """Return what the texts cost if each is paid once in its shard."""
    forecast = engine.plan(**options(source, server, output=str(source.parent / "nowhere"))).forecast
    assert forecast is not None
    return forecast.num_tokens


def check(source: Path, num_rejects: int = 5) -> None:
    """Make sure that each row is in the output exactly once, with its own vector, or in the rejects."""
    out = source.parent / "out"
    texts = dict(zip(*pq.read_table(source / "a.parquet").to_pydict().values(), strict=True))
    table = pads.dataset(out / "data").to_table()
    ids = table["id"].to_pylist()
    rejects = [json.loads(line) for path in out.glob("_engine/rejects/*") for line in path.read_text().splitlines()]
    assert sorted([*ids, *(reject["id"] for reject in rejects)]) == sorted(texts)
    assert len(rejects) == num_rejects
    for name, found in zip(ids, table["embedding"].to_pylist(), strict=True):
        np.testing.assert_allclose(np.float32(found), vector(texts[name], DIMENSION), atol=1e-6)
    verdict = engine.verify(out, "full")
    assert verdict.ok, verdict.findings


def test_a_run_pays_each_text_once_and_tells_what_it_cost(source, server):
    """Receipts, summary and status say what the server counted, the forecast said it before, and a poisoned text is rejected alone."""
    fault = {"kind": "status", "status": 400, "message": "The input looks odd: 'text 250 of the source, and no other'"}
    server.behave(faults=[fault | {"times": -1, "containing": "text 250 of"}])
    forecast = engine.plan(**options(source, server)).forecast
    result = run(source, server)
    check(source, num_rejects=6)
    stats = server.stats()
    use = result.provider
    assert result.num_tokens == stats["tokens_paid"] == pytest.approx(forecast.num_tokens, rel=0.01)
    assert use.num_requests == stats["num_requests"]
    assert (use.num_refusals, use.num_duplicates) == (0, 9)
    assert use.cost == pytest.approx(forecast.cost, rel=0.01)
    assert use.cost == pytest.approx(stats["tokens_paid"] / 1000, rel=0.001)
    assert 0 < use.tokens_at_risk <= result.num_tokens
    assert engine.status(source.parent / "out").provider.cost == pytest.approx(use.cost)
    assert (forecast.num_duplicates, forecast.num_rejects, forecast.is_exact) == (9, 5, True)
    reason = next(reason for reason in result.reasons if "looks odd" in reason)
    assert "text 250 of" not in reason
    with pytest.raises(FingerprintMismatch, match="dimensions"):
        engine.plan(**options(source, server, dimensions=16))
    assert run(source, server).num_shards == 0
    assert server.stats()["num_requests"] == stats["num_requests"]


def test_all_small_shards_that_are_in_flight_together_are_at_risk(source, server):
    """They travel as one parcel, and a crash loses the whole of it: here all that the run paid for."""
    text = pq.read_table(source / "a.parquet")["text"].to_pylist()[10:90]
    for start in range(0, len(text), 2):
        pq.write_table(pa.table({"id": ["x", "y"], "text": text[start : start + 2]}), source / f"b{start:02}.parquet")
    (source / "a.parquet").unlink()
    result = run(source, server, shard_rows=NUM_ROWS)
    assert result.num_shards == 40
    assert result.provider.tokens_at_risk == result.num_tokens
    assert result.provider.cost_at_risk == pytest.approx(result.provider.cost)


@pytest.mark.soak
def test_several_actors_share_one_limit(source, server):
    """Three actors, none of which knows of the others, stay below what the server allows, and are never refused."""
    server.behave(rpm=600, tpm=200_000)
    result = run(source, server, num_actors=3, min_actors=3, batch_size=15)
    check(source)
    stats = server.stats()
    assert stats["num_refused"] == result.provider.num_refusals == 0
    assert result.provider.requests_per_minute_limit == 600
    seconds = stats["last_s"] - stats["first_s"]
    assert (
        stats["num_ok"] - 1 <= 600 / 60 * seconds * 1.02 + 2
    )  # evenly from the start, though the server's bucket is full then


@pytest.mark.soak  # as the one with a model of one's own
def test_a_pool_that_asks_a_provider_grows_to_its_maximum_while_there_is_work(tmp_path, server):
    """Most parcels that such an actor is sent are inside it, so that one that waits shows less than with a model of one's own."""
    server.behave(latency_s=1.0)
    (tmp_path / "in").mkdir()
    for number in range(40):
        table = pa.table({"text": [f"text {row} of file {number}" for row in range(64)]})
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    few = {"shard_rows": 64, "batch_size": 64, "concurrent_requests": 2}
    result = run(tmp_path / "in", server, id_column=None, num_actors=2, min_actors=1, **few)
    assert result.num_rows == 40 * 64
    assert server.stats()["concurrent_max"] > 2, "one actor made all requests"


def test_max_cost_stops_before_it_is_passed_and_more_money_goes_on(source, server):
    """The run ends by itself, what was paid is committed, and all runs together have cost no more."""
    needed = needed_tokens(source, server) / 1000
    first = run(source, server, max_cost=needed / 2)
    assert "max-cost" in first.stopped
    assert 0 < first.pending_rows < NUM_ROWS
    assert needed / 4 < first.provider.cost <= needed / 2
    assert server.stats()["tokens_paid"] / 1000 == pytest.approx(first.provider.cost)
    second = run(source, server, max_cost=needed * 1.001)
    assert not second.stopped
    check(source)
    assert server.stats()["tokens_paid"] / 1000 == pytest.approx(needed)


def test_a_run_that_waits_for_another_counts_what_that_one_spends_meanwhile(source, server, address, caplog):
    """Of one sum for all runs: what is left of it is known when the other has left, and not before."""
    server.behave(latency_s=1.0)
    most = needed_tokens(source, server) * 0.7 / 1000
    process = start(source, server, address, max_cost=most)
    wait_until(lambda: num_committed(source) > 0 or process.poll() is not None)
    result = run(source, server, max_cost=most, if_in_use="wait")
    assert process.wait(60) == 4
    assert "waiting until it has left" in caplog.text
    assert "max-cost" in result.stopped
    assert server.stats()["tokens_paid"] / 1000 <= most


def test_parts_that_were_left_without_a_record_are_counted_in_max_cost(source, server):
    """A run that died before it wrote their records had paid for them."""
    most = needed_tokens(source, server) / 2000
    first = run(source, server, max_cost=most)
    for record in (source.parent / "out").glob("_engine/commits/*.json"):
        record.unlink()
    again = run(source, server, max_cost=most)
    assert again.stopped
    assert again.num_rows == first.num_rows
    assert server.stats()["tokens_paid"] / 1000 <= most


def test_what_was_reused_does_not_end_a_stopping_run_before_what_is_paid_is_committed(source, server, tmp_path):
    """Parcels without a new text come through beside the orders that the driver waits for, and are none of them."""
    table = pq.read_table(source / "a.parquet")
    (tmp_path / "former").mkdir()
    pq.write_table(table.slice(0, NUM_ROWS // 2), tmp_path / "former" / "a.parquet", row_group_size=SHARD_ROWS)
    first = run(tmp_path / "former", server, output=str(tmp_path / "first"))
    paid = server.stats()["tokens_paid"]
    server.behave(latency_s=2.0)  # all orders that the money is for are answered together, after the others were left
    result = run(source, server, reuse=[str(tmp_path / "first")], max_cost=first.num_tokens / 1000 * 0.7)
    assert "max-cost" in result.stopped
    assert result.num_reused == first.num_rows
    assert result.num_tokens == server.stats()["tokens_paid"] - paid > 0


@pytest.mark.parametrize("how", ["lost", "set aside", "deleted"])
def test_money_that_was_spent_is_spent_whatever_became_of_its_records(paid, server, how):
    """A part is lost, or damaged and set aside, or an input was deleted and cleared away: nothing is left of `max_cost` for more."""
    source, most = paid
    out, path = source.parent / "out", source / "a.parquet"
    if how == "lost":
        next(out.glob("data/*")).unlink()
    elif how == "set aside":
        damaged = next(out.glob("data/*"))
        damaged.write_bytes(damaged.read_bytes()[:-9])
        assert engine.verify(out, "full", set_aside=True).set_aside
    else:
        texts = pa.array([f"text {row} of another source" for row in range(100)])
        pq.write_table(pa.table({"id": texts, "text": texts}), source / "b.parquet")
        path.unlink()
        with later():
            assert engine.gc(out, apply=True, inputs_gone=True).num_files
    again = run(source, server, max_cost=most)
    assert "max-cost" in again.stopped
    assert again.num_rows == 0
    assert server.stats()["tokens_paid"] == 0
    assert engine.status(out).provider.cost == pytest.approx(most)


def test_a_stopping_run_waits_for_its_orders_as_long_as_anything_is_heard_of_them(source, monkeypatch):
    """An order of many requests takes long where few tokens a minute are allowed: only when all is silent an actor has died with it."""
    monkeypatch.setattr(budget, "LOST_S", 1.0)
    monkeypatch.setattr(budget, "ASK_EVERY_S", 0.0)
    config = ModelConfig(model=MODEL, tokens_per_minute=10**9, request_timeout_s=0.5)
    left = Receipt.left(Shard.of("", InputFile("a.parquet", str(source), 1, ""), 0, 1))

    async def heard_of_for(seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            await client.report(await client.acquire(10), Report(10, is_answer=True))
            assert not drain.is_empty()
            await asyncio.sleep(0.2)

    with budget.shared(config, 1, None) as shared:
        client, drain = budget.BudgetClient(shared), budget.Drain(shared)
        asyncio.run(client.admit(100))
        drain.add([left])
        asyncio.run(heard_of_for(4.0))
        began = time.monotonic()
        wait_until(drain.is_empty, 30)
        assert time.monotonic() - began > 1.1, "a request may take half a second more"


def test_max_cost_wants_a_price(source, server):
    """Nobody knows what a server of one's own costs."""
    with pytest.raises(ConfigError, match="--token-price"):
        run(source, server, token_price=None, max_cost=1)


def test_a_used_up_quota_ends_the_run_and_keeps_what_is_paid(source, server):
    """Exit code 4; the same command goes on when there is money again, and pays only what is left."""
    quota = {
        "kind": "status",
        "status": 429,
        "code": "insufficient_quota",
        "message": "You exceeded your current quota.",
    }
    server.behave(faults=[quota | {"times": -1, "containing": "text 700 of"}])
    with pytest.raises(QuotaExhausted, match="quota"):
        run(source, server, concurrent_requests=2)
    num_done = engine.status(source.parent / "out").num_rows
    assert num_done > 0
    server.behave(faults=[])
    assert run(source, server).done_before_rows >= num_done
    check(source)


@pytest.mark.soak
def test_a_key_that_is_missing_is_said_in_one_line(source):
    """Where it is missing is the worker; what Ray adds to an error there is left out."""
    with pytest.raises(ConfigError, match=r"^there is no API key: set CO_API_KEY .* or give key_file$"):
        engine.run(source=str(source), output=str(source.parent / "out"), model="cohere:embed-v4.0", progress=False)


@pytest.mark.soak
def test_a_budget_that_is_killed_is_missed_but_not_needed(source, server):
    """SIGKILL of the budget's actor: actors go on at their share, and find the new one."""
    server.behave(latency_s=0.3, rpm=1200)
    process = start(source, server)
    wait_until(lambda: num_committed(source) >= 1 or process.poll() is not None)
    assert kill_worker(BUDGET, os.getpid(), process, random.Random(0))
    assert process.wait(120) == 0
    check(source)


@pytest.mark.timeout(400)
def test_a_run_that_is_killed_pays_again_for_what_was_in_flight_alone(source, server, address):
    """SIGKILL of an actor and then of the driver: every row once, and no more tokens than needed and those in flight."""
    server.behave(latency_s=1.0)  # so that there is something left when both have been killed
    needed = needed_tokens(source, server)
    process, chance = start(source, server, address), random.Random(5)
    wait_until(lambda: num_committed(source) > 0 or process.poll() is not None)
    assert kill_worker(EMBEDDING, os.getpid(), process, chance)
    time.sleep(chance.uniform(0, 0.5))
    assert process.poll() is None
    process.kill()
    process.wait()
    server.behave(latency_s=0.02)
    last = start(source, server, address)
    assert last.wait(120) == 0
    check(source)
    in_flight = 2 * 4 * needed / (NUM_ROWS / SHARD_ROWS)  # of two actors, four shards each
    kills = 2
    assert server.stats()["tokens_paid"] <= needed + kills * in_flight
    assert server.stats()["times_paid_max"] <= 1 + kills + 9  # the same text is in one shard ten times, and paid once


def start(source: Path, server: Server, address: str | None = None, **more) -> subprocess.Popen[bytes]:
    """Start the command in a process of its own, always the same one."""
    given = options(source, server, concurrent_requests=2, num_actors=2, batch_size=SHARD_ROWS, **more)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    where = [f"--address={address or ray.get_runtime_context().gcs_address}"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/embed.py"), *flags, *where],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def num_committed(source: Path) -> int:
    return len(list((source.parent / "out").glob("_engine/commits/*.json")))
