"""Runs whose vectors become int8: calibrated once, through kills and resumes, and within what a provider may cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

import engine
from engine.calibration import CALIBRATION
from engine.config import load_config
from engine.pipeline.calibration import Calibrator, sample_of
from engine.survey import survey
from tests.builders import work_for
from tests.kills import ROOT, wait_until
from tests.models import HashModel
from tests.strict_server import serving

pytestmark = pytest.mark.ray

DIMENSION = 32
NUM_ROWS = 600
OPTIONS = {
    "model": "custom:tests.models.HashModel", "id_column": "id", "shard_rows": 20, "output_dtype": "int8", "gpus_per_actor": 4
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def address(shared_ray: str) -> str:
    """A cluster with GPUs that are only numbers: the calibrating actor has to leave them to the pool, whose one actor takes them all."""
    return shared_ray


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """600 rows in 30 shards."""
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.parquet", NUM_ROWS)
    return tmp_path / "in"


def write(path: Path, count: int) -> None:
    texts = [f"text {row} of {path.name}" for row in range(count)]
    pq.write_table(pa.table({"id": [f"{path.name} {row}" for row in range(count)], "text": texts}), path)


def test_a_job_is_calibrated_once_however_often_it_is_killed(source, tmp_path, address):
    """SIGKILL after the calibration; the resume reads it, embeds no sample, and goes by its scale."""
    actors = tmp_path / "actors"
    model_args = {"dimension": DIMENSION, "env_file": str(actors), "delay_s": 0.05}
    options = OPTIONS
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    out = tmp_path / "out"
    first = subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "jobs/embed.py"), "--source", str(source), "--output", str(out)),
            *(*flags, "--model-args", json.dumps(model_args), "--address", address),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: (out / CALIBRATION).exists() or first.poll() is not None)
    first.kill()
    first.wait()
    calibration = (out / CALIBRATION).read_bytes()
    before = len(actors.read_text().splitlines())
    given = {"source": str(source), "output": str(out), "model_args": model_args, "progress": False, **options}
    result = engine.run(**given)
    assert result.num_rows + result.done_before_rows == NUM_ROWS
    lines = [line.split() for line in actors.read_text().splitlines()]
    assert len(lines) == before + 1  # that of the pool
    assert {line[1] for line in lines} == {"0,1,2,3"}
    assert (out / CALIBRATION).read_bytes() == calibration
    for level in ("full", "sample"):
        verdict = engine.verify(out, level)
        assert verdict.ok, verdict.findings
    scale = json.loads(calibration)["scale"]
    rows = pads.dataset(out / "data").to_table()
    names = [name.split() for name in rows["id"].to_pylist()]
    wanted = np.stack([HashModel(DIMENSION).vector(f"text {row} of {file}") for file, row in names])
    found = np.array(rows["embedding"].to_pylist()) * scale
    assert np.abs(found - wanted).max() < scale * 0.51


@pytest.mark.usefixtures("engine_logger_as_it_was")
def test_an_output_that_reuses_int8_vectors_has_their_scale_and_embeds_no_sample(source, tmp_path):
    """Of the first output that has one; its own scale it would have found from other texts, and could have reused nothing."""
    actors = tmp_path / "actors"
    options = OPTIONS | {"model_args": {"dimension": DIMENSION, "env_file": str(actors)}, "progress": False}
    first, second = tmp_path / "first", tmp_path / "second"
    engine.run(source=str(source), output=str(first), **options)
    before = len(actors.read_text().splitlines())
    write(source / "b.parquet", 40)
    result = engine.run(source=str(source), output=str(second), reuse=[str(first)], **options)
    assert (result.num_rows, result.num_reused) == (NUM_ROWS + 40, NUM_ROWS)
    assert len(actors.read_text().splitlines()) == before + 1  # that of the pool
    of_first, of_second = (json.loads((out / CALIBRATION).read_bytes()) for out in (first, second))
    assert of_second["scale"] == of_first["scale"]
    assert (of_second["source"], of_second["usage"]) == ("reuse", None)
    assert engine.verify(second, "full").ok
    assert engine.verify(second, "sample").ok
    del options["progress"]
    asked = survey(load_config(source=str(source), output=str(tmp_path / "third"), **options))
    calibrator = Calibrator(work_for(asked))
    assert calibrator.measure(sample_of(asked.standing.plan.pending)).scale != of_first["scale"]
    calibrator.close()


@pytest.mark.soak
def test_the_sample_is_within_max_cost_and_in_what_is_said_of_it(source, tmp_path, monkeypatch):
    """What the server was paid is what parts and calibration add up to, in every run; a stop does not wait for the sample."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-cluster")
    monkeypatch.setattr(
        "engine.pipeline.budget.LOST_S", float("inf")
    )  # for which an order is waited for that no shard is
    out = tmp_path / "out"
    with serving(dimension=DIMENSION) as server:
        server.behave(rpm=None, tpm=None, latency_s=0.02, faults=[], key=None)
        given = {
            "source": str(source), "output": str(out), "model": "openai:text-embedding-3-small", "id_column": "id",
            "base_url": server.url, "shard_rows": 50, "token_price": 1000.0, "dimensions": DIMENSION,
            "output_dtype": "int8",
        }  # fmt: skip
        texts = engine.plan(**given).forecast.cost
        first = engine.run(**given, progress=False, max_cost=texts)
        assert "max-cost" in first.stopped  # the texts alone would have been within it
        assert 0 < first.pending_rows < NUM_ROWS
        assert first.provider.cost <= texts
        sample = json.loads((out / CALIBRATION).read_bytes())["usage"]["cost"]
        assert 0 < sample < texts / 5
        assert server.stats()["tokens_paid"] / 1000 == pytest.approx(first.provider.cost)
        second = engine.run(**given, progress=False, max_cost=texts + sample / 2)
        assert second.stopped
        status = engine.status(out)
        assert status.provider.cost == pytest.approx(server.stats()["tokens_paid"] / 1000)
        assert status.provider.cost <= texts + sample / 2
        assert status.provider.num_requests == server.stats()["num_requests"]
    assert engine.verify(out, "full").pending_rows == NUM_ROWS - status.num_rows
