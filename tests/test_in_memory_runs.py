"""Sources in memory through whole runs: every library, run again, grown, killed, and looked at by path afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
import ray
import ray.data

import engine
from engine import lease, runner, survey
from engine.cli import main
from engine.errors import FingerprintMismatch, OutputInUse, SourceError
from engine.events import ShardDone
from engine.progress import Progress
from engine.sources import in_memory
from engine.storage import LocalStorage, open_storage
from tests.kills import ROOT, wait_until
from tests.models import HashModel

pytestmark = pytest.mark.ray

HASH = "custom:tests.models.HashModel"
ROWS = {
    "id": [f"id-{row}" for row in range(90)],
    "text": [f"text {row}" if row not in (7, 40) else None for row in range(90)],
    "n": [row % 3 for row in range(90)],
}


@pytest.fixture(scope="module", autouse=True)
def cluster(shared_ray: str) -> str:
    return shared_ray


def run(source: Any, out: Path, **options: Any) -> engine.results.RunResult:
    options = {"model": HASH, "id_column": "id", "shard_rows": 30, "num_actors": 1, "device": "cpu"} | options
    return engine.run(source=source, output=out, progress=False, **options)


def vectors_in(out: Path) -> dict[Any, list[float]]:
    table = pads.dataset(out / "data").to_table()
    found = dict(zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True))
    assert len(found) == table.num_rows
    return found


def expected(rows: dict[str, list]) -> dict[str, list[float]]:
    pairs = zip(rows["id"], rows["text"], strict=True)
    return {name: HashModel().vector(text).tolist() for name, text in pairs if text is not None}


def test_a_table_gives_the_vectors_of_its_rows_and_is_known_again_from_every_library(tmp_path):
    """Embedded once, from pandas: the same rows from any other library find nothing to do. Status and verify go by the path alone."""
    out = tmp_path / "out"
    result = run(pd.DataFrame(ROWS), out, keep=["n"])
    assert (result.num_rows, result.num_rejects, result.pending_rows) == (88, 2, 0)
    assert vectors_in(out) == expected(ROWS)
    sources = {
        "pandas": pd.DataFrame(ROWS),
        "polars": pl.DataFrame(ROWS),
        "Arrow": pa.table(ROWS),
        "a reader": pa.table(ROWS).to_reader(),
        "a dict": ROWS,
        "dicts": pa.table(ROWS).to_pylist(),
        "Hugging Face": datasets.Dataset.from_dict(ROWS),
    }
    for name, source in sources.items():
        again = run(source, out, keep=["n"])
        assert (again.num_shards, again.done_before_rows, again.pending_rows) == (0, 90, 0), name
    out.rename(tmp_path / "moved")
    assert main(["verify", str(tmp_path / "moved"), "--level", "full"]) == 0
    assert engine.status(tmp_path / "moved").pending_rows == 0
    verdict = engine.verify(tmp_path / "moved", "sample")
    assert (verdict.ok, verdict.pending_rows, verdict.lowest_cosine) == (True, 0, pytest.approx(1))
    job = json.loads((tmp_path / "moved/_engine/job.json").read_text())
    assert job["base"] == "memory:"
    assert job["config"]["source"][0].startswith("memory:")


def test_a_ray_dataset_gives_the_vectors_of_its_rows_in_whatever_order_its_blocks_come(tmp_path):
    """Blocks in another order are the same source: nothing is left to do."""
    first, second = pa.table(ROWS).slice(0, 50), pa.table(ROWS).slice(50)
    assert run(ray.data.from_arrow([first, second]), tmp_path / "out").num_rows == 88
    assert vectors_in(tmp_path / "out") == expected(ROWS)
    again = run(ray.data.from_arrow([second, first]), tmp_path / "out")
    assert (again.num_shards, again.done_before_rows) == (0, 90)
    with pytest.raises(SourceError, match="no column 'body'"):
        engine.plan(source=ray.data.from_arrow([first]), output=tmp_path / "out", model=HASH, text_column="body")


def test_a_table_that_grew_is_pending_where_it_did(tmp_path, monkeypatch):
    """A list of texts with no ids, then more behind it: the blocks before are done. A run that is refused changes nothing."""
    monkeypatch.setattr(in_memory, "BLOCK_ROWS", 60)
    monkeypatch.setattr(in_memory, "PIECE_ROWS", 60)
    texts = [f"text {row}" for row in range(120)]
    options = {"id_column": None, "shard_rows": 60}
    assert run(texts, tmp_path / "out", **options).num_rows == 120
    longer = texts + [f"more {row}" for row in range(30)]
    with pytest.raises(FingerprintMismatch, match="dimension"):
        run(longer, tmp_path / "out", model_args={"dimension": 4}, **options)
    assert engine.status(tmp_path / "out").pending_rows == 0
    assert engine.plan(source=longer, output=tmp_path / "out", model=HASH).pending_rows == 30
    assert run(longer, tmp_path / "out", **options).num_rows == 30
    assert engine.status(tmp_path / "out").num_rows == 150
    assert engine.verify(tmp_path / "out", "full").ok
    assert vectors_in(tmp_path / "out")["rows-000000000120#7"] == HashModel().vector("more 7").tolist()


def test_a_run_that_finds_the_output_in_use_does_not_say_what_it_is_of(tmp_path):
    """Refused by the lease, with rows to embed or without any: status, verify and `memory:` still go by the table of the last run."""
    out, frame = tmp_path / "out", pd.DataFrame(ROWS)
    run(frame, out)
    names = {path.name for path in (out / "_engine/runs").iterdir()}
    with lease.held(open_storage(str(out)), "refuse"):
        for other in (pd.concat([frame, frame.assign(id=frame["id"] + " again")]), frame.head(0)):
            with pytest.raises(OutputInUse):
                run(other, out)
            assert engine.status(out).pending_rows == 0
            assert engine.plan(source="memory:", output=out, model=HASH, id_column="id").num_rows == 90
        assert run(frame, out).done_before_rows == 90  # it has nothing to say
    assert engine.verify(out).ok
    assert {path.name for path in (out / "_engine/runs").iterdir()} == names


def test_a_template_and_ids_that_repeat_go_through_a_run(tmp_path):
    """The text of two columns; ids that occur again within a shard are counted by the run (two of them), over all shards by verify."""
    frame = pd.DataFrame(
        {"id": ["a", "a", "b", None, None, "b"], "title": ["T", "U", None, "V", "W", "X"], "year": [1, 2, 3, 4, 5, 6]}
    )
    options = {"text_template": r"{title}\n{year}", "shard_rows": 3}
    result = run(frame, tmp_path / "out", **options)
    assert (result.num_rows, result.num_repeated_ids) == (6, 2)
    table = pads.dataset(tmp_path / "out/data").to_table()
    made = {tuple(vector) for vector in table["embedding"].to_pylist()}
    titles = frame["title"].fillna("")
    assert made == {tuple(HashModel().vector(f"{t}\n{y}").tolist()) for t, y in zip(titles, frame["year"], strict=True)}
    assert engine.status(tmp_path / "out").num_repeated_ids == result.num_repeated_ids
    assert "repeat" in result.lines()["ids"]
    told = engine.verify(tmp_path / "out", "full")
    assert told.ok
    assert "3 ids occur more than once, in 6 rows" in told.warnings[-1]


# Rows in other blocks

SMALL = {"shard_rows": 4}


def interrupted(source: Any, out: Path) -> None:
    """Run, and interrupt it when no more than the first parcel, of 64 rows, is committed."""

    def interrupt(_shown: Progress, event: Any) -> None:
        if isinstance(event, ShardDone):
            raise KeyboardInterrupt

    first = partial(lambda original, *args: islice(original(*args), 1), runner.parcels)
    with patch.object(Progress, "__call__", interrupt), patch.object(runner, "parcels", first):
        result = engine.run(source=source, output=out, model=HASH, id_column="id", num_actors=1, device="cpu", **SMALL)
    assert result.num_rows
    assert result.pending_rows


def check(out: Path, rows: dict[str, list]) -> None:
    """Make sure that each row is in the output once, and that nothing is left to do or to say."""
    assert vectors_in(out) == expected(rows)
    verdict = engine.verify(out, "full")
    assert (verdict.ok, verdict.warnings) == (True, []), verdict
    assert engine.status(out).pending_rows == 0


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(in_memory, "BLOCK_ROWS", 64)
    monkeypatch.setattr(in_memory, "PIECE_ROWS", 8)
    monkeypatch.setattr(in_memory, "BLOCK_BYTES", 4000)


def long_rows(num_rows: int, longer: range = range(0)) -> dict[str, list]:
    texts = [f"text {row} " + "long " * (20 + 40 * (row in longer)) for row in range(num_rows)]
    return {"id": [f"id-{row}" for row in range(num_rows)], "text": texts}


@pytest.mark.usefixtures("small_blocks")
def test_rows_of_a_table_that_come_into_other_blocks_are_there_once(tmp_path):
    """Longer texts end a block earlier: all blocks to the next fixed row begin elsewhere. Readers see the former rows until all new ones are there."""
    out, before, after = tmp_path / "out", long_rows(120), long_rows(130, range(4, 8))
    run(before, out, **SMALL)
    interrupted(after, out)
    assert vectors_in(out) == expected(before)
    assert "its new blocks take the place of the former ones" in engine.status(out).warnings[0]
    now = LocalStorage._now
    with patch.object(LocalStorage, "_now", lambda storage: now(storage) + 2 * 24 * 3600):
        engine.gc(out, apply=True)
    assert vectors_in(out) == expected(before)
    result = run(after, out, **SMALL)
    assert 0 < result.done_before_rows < 130
    assert result.num_reused == result.num_rows - 10  # all but those behind the last
    check(out, after)
    assert run(after, out, **SMALL).done_before_rows == 130
    interrupted(before, out)
    assert run(after, out, **SMALL).num_rows == 0  # what waited is put away
    check(out, after)


@pytest.mark.usefixtures("small_blocks")
def test_an_output_that_has_rows_twice_from_blocks_of_before_is_put_right(tmp_path):
    """As the engine left it before it knew of blocks that move; nothing has to be embedded for it."""
    out, after = tmp_path / "out", long_rows(120, range(4, 8))
    run(long_rows(120), out)
    with patch.object(survey, "unlisted", side_effect=lambda *_: ({}, [])):
        run(after, out)
    assert pads.dataset(out / "data").count_rows() > 120
    assert run(after, out).num_rows == 0
    check(out, after)


def test_a_ray_dataset_of_other_blocks_is_the_same_rows(tmp_path):
    """As a cluster of another size cuts it: begun in one layout, gone on with in another, then with a row that changed. Each row is there once."""
    rows = {"id": [f"id-{row}" for row in range(90)], "text": [f"text {row}" for row in range(90)]}
    out, dataset = tmp_path / "out", ray.data.from_arrow(pa.table(rows))
    interrupted(dataset.repartition(3).materialize(), out)
    begun = vectors_in(out)
    result = run(dataset.repartition(7).materialize(), out, **SMALL)
    assert (result.num_rows, result.pending_rows, result.num_reused) == (90, 0, len(begun))
    check(out, rows)
    rows["text"][40] = "another text"
    changed = ray.data.from_arrow(pa.table(rows)).repartition(2).materialize()
    interrupted(changed, out)
    assert len(vectors_in(out)) == 90
    assert vectors_in(out)["id-40"] == HashModel().vector("text 40").tolist()
    result = run(changed, out, **SMALL)
    check(out, rows)
    fewer = {name: values[:50] for name, values in rows.items()}
    run(ray.data.from_arrow(pa.table(fewer)), out, **SMALL)
    check(out, fewer)
    run(pa.table(rows), out, **SMALL)  # no longer from Ray
    check(out, rows)


SCRIPT = """
import sys
import pandas as pd
import engine

frame = pd.DataFrame({"id": range(400), "text": [f"text {row}" for row in range(400)]})
engine.run(
    source=frame, output=sys.argv[1], address=sys.argv[2], progress=False, id_column="id", shard_rows=10, num_actors=1,
    model="custom:tests.models.HashModel", model_args={"delay_s": 0.1}, device="cpu",
)
"""


def test_a_killed_script_is_finished_by_another_process(tmp_path, cluster):
    """From the same frame, made again there; what the dead one had committed is not done again. A plan needs no frame at all."""
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), cluster], env=environment, stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: len(list(out.glob("_engine/commits/*.json"))) >= 3 or process.poll() is not None)
        process.kill()
    options = {"model": HASH, "model_args": {"delay_s": 0.1}, "id_column": "id"}
    left = engine.plan(source="memory:", output=out, **options).pending_rows
    assert 0 < left < 400
    frame = pd.DataFrame({"id": np.arange(400), "text": [f"text {row}" for row in range(400)]})
    result = run(frame, out, shard_rows=10, **options)
    assert (result.num_rows + result.done_before_rows, result.pending_rows) == (400, 0)
    assert result.done_before_rows >= 30
    assert vectors_in(out) == {row: HashModel().vector(f"text {row}").tolist() for row in range(400)}
    assert engine.verify(out, "full").ok
