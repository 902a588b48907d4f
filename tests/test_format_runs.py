"""Formats through whole runs: the vectors that Parquet gives, and nothing lost to a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import ray

import engine
from engine.sources import indexes
from tests.hub import Hub, serving
from tests.kills import ROOT, HubJob, Job
from tests.models import HashModel
from tests.test_formats import IDS, TEXTS, small_pieces, write

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub that the environment leads to: that of workers too."""
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def cluster(hub: Hub) -> Iterator[str]:
    """One Ray for all, that outlives a driver that is killed on it."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["PYTHONPATH"] = str(ROOT)
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def vectors(out: Path, by: str = "id") -> dict[str, list[float]]:
    rows = pads.dataset(out / "data").to_table(columns=[by, "embedding"]).to_pylist()
    assert len({row[by] for row in rows}) == len(rows)
    return {row[by]: row["embedding"] for row in rows}


def test_every_kind_of_source_gives_the_vectors_that_parquet_gives(cluster, tmp_path):
    """Through Ray, parts and records; verified to the last byte; a source of lines is not scanned again by what comes after."""
    options = {
        "model": "custom:tests.models.HashModel",
        "shard_rows": 60,
        "num_actors": 1,
        "cpus_per_actor": 1,
        "progress": False,
    }
    rows = [{"id": key, "text": text} for key, text in zip(IDS, TEXTS, strict=True)]
    engine.run(
        source=str(write(tmp_path / "a.parquet", rows)), output=str(tmp_path / "parquet"), id_column="id", **options
    )
    wanted = vectors(tmp_path / "parquet")
    assert len(wanted) == len(rows)
    for name in ("a.jsonl.gz", "a.csv", "a.arrow", "a.txt"):
        out = tmp_path / name.replace(".", "-")
        kinds = {"id_column": "id"} if name != "a.txt" else {}
        texts = TEXTS if name != "a.txt" else [text.replace("\n", " ").replace("\r", " ") for text in TEXTS]
        path = write(tmp_path / name, [row | {"text": text} for row, text in zip(rows, texts, strict=True)])
        with small_pieces(256, 2000):
            result = engine.run(source=str(path), output=str(out), **kinds, **options)
            assert (result.num_rows, result.num_rejects) == (200, 0)
            assert engine.run(source=str(path), output=str(out), **kinds, **options).num_rows == 0
            assert engine.verify(out, "sample").ok
        assert engine.verify(out, "full").ok
        assert len(list((out / indexes.FOLDER).iterdir())) == 1
        if name == "a.txt":
            model = HashModel()
            wanted = {f"a.txt#{row}": model.vector(text).tolist() for row, text in enumerate(texts)}
        assert vectors(out) == wanted


def test_json_lines_with_odd_ones_survive_a_kill_of_the_driver(cluster, tmp_path):
    """SIGKILL in the middle, and the same command: each line is in the output or in the rejects, once, and the index is used again."""
    job = Job(tmp_path, cluster, delay_s=0.05)
    for path in sorted(job.source.iterdir()):
        lines_of_file = [json.dumps(row) for row in pq.read_table(path).to_pylist()]
        lines_of_file.insert(20, "")
        path.unlink()
        path.with_suffix(".jsonl").write_text("\n".join(lines_of_file))
    process = job.start()
    job.wait_for_commits(10, process)
    process.kill()
    process.communicate()
    assert 10 <= job.num_committed() < 60
    bundles = list((job.output / indexes.FOLDER).iterdir())
    job.finish()
    assert list((job.output / indexes.FOLDER).iterdir()) == bundles
    job.check()


@pytest.mark.soak
@pytest.mark.parametrize(
    "kind", ["jsonl.gz", "jsonl.zst", "csv", "csv.gz", "tsv", "tsv.zst", "arrow", "feather", "txt"]
)
def test_every_kind_of_source_survives_a_kill_of_the_driver(cluster, tmp_path, kind):
    """SIGKILL in the middle, and the same command: each row once, with the vectors of Parquet; text of a row a line has ids of its own."""
    job = Job(tmp_path, cluster)
    for path in sorted(job.source.iterdir()):
        rows = pq.read_table(path).to_pylist()
        write(path.with_suffix(f".{kind}"), [row | {"text": row["text"] or ""} for row in rows])
        path.unlink()
    if kind == "txt":
        job.id_column = None
        job.expected = {made_id(key): vector for key, vector in job.expected.items()}
        job.rejected = {made_id(key) for key in job.rejected}
    if kind in ("arrow", "feather"):  # cut where their record batches end
        job.num_shards = {"arrow": 42, "feather": 72}[kind]
    process = job.start()
    job.wait_for_commits(10, process)
    process.kill()
    process.communicate()
    assert 10 <= job.num_committed() < 60
    job.finish()
    job.check()


def made_id(key: str) -> str:
    """Return the id that the engine makes of a file and a row."""
    file, _, row = key.partition("-")
    return f"{file}.txt#{row}"


def test_a_data_set_of_the_hub_survives_a_kill_and_a_bad_hub(cluster, hub, tmp_path):
    """
    SIGKILL in the middle, and the same command, of a later commit that leaves the texts as they were, while each kind of request fails
    once: each row once, with the vectors of Parquet.
    """
    job = HubJob(tmp_path, cluster, hub)
    process = job.start()
    job.wait_for_commits(10, process)
    process.kill()
    process.communicate()
    assert 10 <= job.num_committed() < 60
    hub.push({"README.md": b"#"})
    for fault, part in (
        ((503, ""), "/revision/"),
        ("cut", "/tree/"),
        ((429, '"api";r=0;t=1'), "/paths-info/"),
        ((502, ""), "/resolve/"),
        ("cut", "/blobs/"),
    ):
        hub.fail(fault, part=part)
    job.finish()
    assert not any(fault.times for fault in hub.faults)
    job.check()
