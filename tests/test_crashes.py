"""Processes that die whenever they come to the same place: the run ends, and says what to look at."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine.errors import EngineError
from engine.pipeline.datasource import Parcel, _read
from engine.pipeline.publish import Publisher
from engine.sources.rows import Selection

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

CRASHES, STALL_S = 2, 200
"""After which the run is given up; and seconds in which it would be if there were no end to them."""


@pytest.fixture(autouse=True)
def cluster(shared_ray):
    """A Ray with GPUs that are only numbers, beside which there are publishers."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files of 70 rows."""
    (tmp_path / "in").mkdir()
    for name in "abc":
        rows = pa.table({"text": [f"text {row} of {name}" for row in range(70)]})
        pq.write_table(rows, tmp_path / "in" / f"{name}.parquet")
    return tmp_path / "in"


def run(source: Path, **options: Any):
    out = str(source.parent / "out")
    options = {"model": "custom:tests.models.HashModel", "gpus_per_actor": 0.5, "num_actors": 1} | options
    return engine.run(source=str(source), output=out, shard_rows=70, stall_s=STALL_S, progress=False, **options)


def read_and_die(parcels: Sequence[Parcel], selection: Selection) -> Iterator[pa.Table]:
    """Read as ever, but for one file, in which a library crashes."""
    if any(shard.file.path == "b.parquet" for parcel in parcels for shard in parcel):
        os.kill(os.getpid(), signal.SIGKILL)
    yield from _read(parcels, selection)


class DyingPublisher(Publisher):
    """Is killed as it is to commit."""

    def __call__(self, block: pa.Table) -> pa.Table:
        os.kill(os.getpid(), signal.SIGKILL)
        return block


def assert_ends(source: Path, monkeypatch: pytest.MonkeyPatch, place: str, dying: Any, said: str) -> None:
    """Run with what dies in its place, which ends with a message, and once more without it, which finishes the work."""
    with monkeypatch.context() as patched:
        patched.setattr(place, dying)
        with pytest.raises(EngineError, match=said):
            run(source)
    assert run(source).pending_rows == 0


def test_an_actor_whose_device_is_lost_makes_room_for_another(source):
    """Whatever a lost GPU is asked for fails: that is no fault of the model, for which the run would end."""
    result = run(source, model="custom:tests.models.LostModel", model_args={"first": str(source.parent / "first")})
    assert (result.num_rows, result.num_rejects) == (210, 0)
    assert engine.verify(source.parent / "out", "full").ok


def test_a_file_over_which_readers_die_ends_the_run_which_says_so(source, monkeypatch):
    """Ray would start a reader again for ever; the other files are committed, and wait for nobody."""
    monkeypatch.setattr("engine.pipeline.stream.MAX_READER_CRASHES", CRASHES)
    said = "a reader died again and again"
    assert_ends(source, monkeypatch, "engine.pipeline.datasource._read", read_and_die, said)


@pytest.mark.soak  # Ray is given a minute and a half to learn whether the last one was lost with its node
def test_a_shard_over_which_publishers_die_ends_the_run_which_says_so(source, monkeypatch):
    """As one over which actors die that embed."""
    monkeypatch.setattr("engine.pipeline.stream.MAX_CRASHES", CRASHES)
    said = "or a publisher, died again and again"
    assert_ends(source, monkeypatch, "engine.pipeline.stream.Publisher", DyingPublisher, said)
