"""Inputs that change: their new rows take the place of the former ones, at one instant, whoever dies meanwhile."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

import engine
from engine import exchange, places, switching
from engine.config import JobConfig, load_config
from engine.errors import EngineError, SourceChanged
from engine.ledger import Ledger
from engine.object_storage import ObjectStorage
from engine.places import DATA, HELD, SUPERSEDED, held_name, part_name
from engine.schema import EMBEDDING, SOURCE_ROW, TEXT_HASH
from engine.sources.formats import read_shards
from engine.sources.rows import Selection
from engine.sources.texts import texts_in
from engine.storage import LocalStorage, open_storage
from engine.survey import Survey, opened, stored_config, survey
from engine.switches import Switches
from engine.text_hashes import text_hashes
from tests.builders import USAGE, killed_at_each_call, vectors_type
from tests.models import HashModel
from tests.object_stores import BUCKET, serving

Rows = dict[str, tuple[float, ...]]
MODEL = HashModel()
exchange.GRACE_S = 0.0
OLD = [f"old {row}" for row in range(30)]
EDITED = [*OLD[:15], "edited", *OLD[16:]]
LONGER = [*EDITED, *(f"appended {row}" for row in range(12))]
SECONDS = map(float, count())
"""That shards took: never the same, as in life, so the same shard made again is another part."""


class Job:
    """A source of two files, of which one will change, and the output of 10 rows a shard that a run left: made without Ray."""

    def __init__(self, folder: Path, out: str = "") -> None:
        self.source, self.out = folder / "in", out or str(folder / "out")
        self.write("same.parquet", OLD[:10])
        self.write("a.parquet", OLD)
        self.config = load_config(
            source=str(self.source),
            output=self.out,
            model="custom:tests.models.HashModel",
            id_column="id",
            shard_rows=10,
        )
        embed(self.config)

    def write(self, name: str, texts: list[str], mtime_ns: int = 0) -> None:
        path = self.source / name
        path.parent.mkdir(exist_ok=True)
        ids = [f"{name} {row}" for row in range(len(texts))]
        pq.write_table(
            pa.table({"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())}), path, row_group_size=10
        )
        if mtime_ns:
            os.utime(path, ns=(mtime_ns, mtime_ns))

    def expected(self) -> Rows:
        table = pads.dataset(self.source).to_table()
        return {
            key: tuple(MODEL.vector(text).tolist())
            for key, text in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)
        }

    def check(self) -> None:
        """Make sure that the output is the source as it is now, and has nothing left over."""
        check(self.out, self.expected())


def embed(config: JobConfig, most: int | None = None) -> Survey:
    """Do what a run does, with `most` shards of those that are pending."""
    asked = survey(config)
    asked.ledger.claim(asked.job)
    switching.finish(asked.ledger)
    publish(asked, most)
    switching.switch(asked.ledger, asked.standing, lambda: None)
    return asked


def publish(asked: Survey, most: int | None = None) -> None:
    for shard in asked.standing.plan.pending[:most]:
        rows = next(read_shards([shard], Selection.of(asked.config, asked.job.kept_types)))
        texts = texts_in(rows)[0]
        vectors = np.stack([MODEL.vector(text) for text in texts])
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=vectors_type(vectors.shape[1]))
        columns = {"id": rows.table["id"], EMBEDDING: column, TEXT_HASH: text_hashes(texts)}
        table = pa.table(columns | {SOURCE_ROW: rows.table[SOURCE_ROW]})
        usage = replace(USAGE, embed_s=next(SECONDS))
        asked.ledger.publish(table, shard=shard, fingerprint=asked.job.fingerprint, rejects=[], usage=usage)


def again(out: str) -> None:
    """Run the job of an output again, wherever that lies."""
    embed(stored_config(opened(out)[1], out))


def again_file_by_file(out: str) -> None:
    with patch.object(exchange, "_trade_names", side_effect=OSError):
        again(out)


def read(out: str | Path) -> Rows:
    """Read by the records."""
    return _rows(engine.read(out))


def seen(out: str | Path) -> Rows:
    """Read what lies in the folder, as others do; a row that is there twice is told by its name."""
    return _rows(pads.dataset(Path(out, "data")).to_table())


def _rows(table: pa.Table) -> Rows:
    rows: Rows = {}
    for key, vector in zip(table["id"].to_pylist(), table[EMBEDDING].to_pylist(), strict=True):
        rows[f"{key} twice" if key in rows else key] = tuple(vector)
    return rows


def check(out: str, expected: Rows) -> None:
    assert read(out) == expected
    if "://" not in out:
        assert seen(out) == expected
        assert not Path(out, exchange.STAGES).exists()
    storage = open_storage(out)
    assert not list(storage.names(HELD))
    verdict = engine.verify(out, "full")
    assert verdict.ok, verdict.findings
    assert engine.status(out).num_rows == len(expected)


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


# What changes


def test_the_former_rows_stay_until_all_new_ones_are_there(job):
    """In the folder and by the records; what waits is counted as done, and `status` and `verify` say what is left."""
    before = job.expected()
    job.write("a.parquet", LONGER)
    for left in (32, 22, 12):
        assert engine.plan(**named(job)).pending_rows == left + 10
        assert "1 input changed since rows of it were committed" in engine.plan(**named(job)).warnings[0]
        embed(job.config, 1)
        assert read(job.out) == seen(job.out) == before
        status = engine.status(job.out)
        assert (status.num_rows, status.pending_rows) == (40, left)
        assert [finding.shard_id for finding in engine.verify(job.out, "full").findings] == [""]
    embed(job.config)
    job.check()
    assert not engine.status(job.out).warnings
    assert len(list(open_storage(job.out).names(SUPERSEDED))) == 6  # parts and records of three shards


def named(job: Job) -> dict:
    return {
        "source": str(job.source),
        "output": job.out,
        "model": job.config.model,
        "id_column": "id",
        "shard_rows": 10,
    }


@pytest.mark.parametrize(
    "texts", [EDITED, OLD[:22], OLD[:3], ["new", *OLD], []], ids=["edit", "cut", "few", "front", "none"]
)
def test_an_input_may_change_in_any_way(job, texts):
    """Rows that are edited, taken away, put before the others; or all of them gone."""
    job.write("a.parquet", texts)
    embed(job.config)
    job.check()


def test_an_input_that_changes_again_before_it_is_whole_goes_from_the_first_to_the_last(job):
    """What waited for rows that will never come is put away with the former rows."""
    before = job.expected()
    job.write("a.parquet", EDITED)
    embed(job.config, 2)
    job.write("a.parquet", LONGER)
    embed(job.config, 2)
    assert read(job.out) == seen(job.out) == before
    embed(job.config)
    job.check()


def test_an_input_that_becomes_what_it_was_costs_nothing(job):
    """Its rows were never gone; those that waited are."""
    job.write("b.parquet", OLD, 10**18)
    embed(job.config)
    job.write("b.parquet", EDITED, 2 * 10**18)
    embed(job.config, 1)
    job.write("b.parquet", OLD, 10**18)
    assert not embed(job.config).standing.plan.pending
    job.check()


def test_a_folder_is_always_seen_whole(job, monkeypatch):
    """Whoever lists it while inputs change to and fro sees all rows of one version and none of another."""
    monkeypatch.setattr(exchange, "GRACE_S", 0.5)
    whole: set[frozenset[str]] = set()
    has_ended = threading.Event()

    def watch() -> set[frozenset[str]]:
        listings = {frozenset(LocalStorage(job.out).names(DATA))}
        while not has_ended.is_set():
            listings.add(frozenset(LocalStorage(job.out).names(DATA)))
        return listings

    job.write("a.parquet", OLD, 10**18)
    embed(job.config)
    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch)
        try:
            for number in range(6):
                whole.add(frozenset(LocalStorage(job.out).names(DATA)))
                job.write("a.parquet", [OLD, LONGER][number % 2], (number % 2 + 1) * 10**18)
                embed(job.config)
                job.check()
        finally:
            has_ended.set()
        listings = watcher.result()
    assert len(whole) == 2
    assert listings <= whole


def test_who_began_to_read_before_reads_on(job):
    """Batches of a snapshot come from parts that others have taken the place of meanwhile."""
    before = job.expected()
    batches = engine.read_batches(job.out)
    job.write("a.parquet", EDITED)
    embed(job.config)
    assert _rows(pa.Table.from_batches(list(batches))) == before


def test_a_lost_part_of_former_rows_is_nothing_to_complain_of(job):
    """It would have gone anyway."""
    former = engine.verify(job.out).num_shards
    gone = next(shard for shard in survey(job.config).ledger.records() if shard.path == "a.parquet")
    Path(job.out, DATA, f"part-{gone.shard_id}.parquet").unlink()
    job.write("a.parquet", EDITED)
    embed(job.config)
    job.check()
    assert engine.verify(job.out).num_shards == former


@pytest.fixture(params=["disk", "bucket"])
def any_job(request, tmp_path) -> Iterator[Job]:
    """What holds wherever an output lies is tested on both."""
    with serving() if request.param == "bucket" else nullcontext():
        yield Job(tmp_path, f"s3://{BUCKET}/{tmp_path.name}/out" if request.param == "bucket" else "")


def parts(out: str) -> set[str]:
    """Return the ids of the parts that lie in the folder: each a row of a listing, as others see it."""
    return places.seen_ids(open_storage(out))


def come_back(job: Job) -> Rows:
    """Let an input change, become what it was, with its shards embedded a second time, and change again; return its rows before that."""
    job.write("a.parquet", OLD, 10**18)
    for texts, second in ((EDITED, 2), (OLD, 1)):
        embed(job.config)
        job.write("a.parquet", texts, second * 10**18)
    embed(job.config)
    before = job.expected()
    job.write("a.parquet", LONGER, 3 * 10**18)
    return before


def test_an_input_may_become_what_it_was_and_change_again(any_job):
    """Its shards have the same ids again and other bytes: both copies are kept, and who began to read reads the last one."""
    before = come_back(any_job)
    former = {record.shard_id: record for record in opened(any_job.out)[0].records() if record.path == "a.parquet"}
    batches = engine.read_batches(any_job.out)
    embed(any_job.config)
    any_job.check()
    storage, live = open_storage(any_job.out), opened(any_job.out)[0].live()
    assert parts(any_job.out) == live
    assert _rows(pa.Table.from_batches(list(batches))) == before
    copies = [name for name in storage.names(SUPERSEDED) if name[:32] in former]
    assert len(copies) == 4 * len(former)  # a part and a record of each time
    for shard_id, record in former.items():
        assert opened(any_job.out)[0].part(shard_id, former=True).record == record
        assert opened(any_job.out)[0].record(shard_id, former=True) == record
    any_job.write("a.parquet", OLD, 10**18)
    embed(any_job.config)
    any_job.check()


def test_an_output_that_such_a_change_has_stopped_is_finished(any_job):
    """As older engines left it in a bucket: the switch written, the new parts in, and other parts where the former ones go."""
    come_back(any_job)
    asked, storage = survey(any_job.config), open_storage(any_job.out)
    publish(asked)
    with patch.object(switching, "finish"):
        switching.switch(asked.ledger, asked.standing, lambda: None)
    for shard_id in Switches.of(storage).open[0].add:
        storage.rename(held_name(shard_id), part_name(shard_id))
    embed(any_job.config)
    any_job.check()
    assert parts(any_job.out) == opened(any_job.out)[0].live()


# Death, and others


def waiting(job: Job, folder: Path) -> tuple[Rows, Rows]:
    """Bring an output to where all new rows of an input are committed, and none is in yet; the former rows have come back before."""
    before = come_back(job)
    job.write("a.parquet", EDITED[:20])
    asked = survey(job.config)
    publish(asked)
    shutil.copytree(job.out, folder)
    return before, job.expected()


@pytest.mark.parametrize("run_again", [again, again_file_by_file])
def test_a_switch_that_is_killed_at_any_call_is_carried_out_by_the_next_run(job, tmp_path, run_again):
    """By the records it is all or nothing at every instant; in the folder too, where names can be traded in one step."""
    before, after = waiting(job, tmp_path / "start")
    outs = killed_at_each_call(tmp_path / "outs", run_again, start=tmp_path / "start")
    assert len(outs) > 40
    found = []
    for out in outs:
        found.append((read(out) == after, seen(out) == after))
        assert found[-1][0] or read(out) == before
        if run_again is again:
            assert found[-1][1] or seen(out) == before
        else:  # never without a row
            assert seen(out).keys() >= before.keys() & after.keys()
    assert found == sorted(found)  # never back
    for out in outs[::4]:
        run_again(str(out))
        check(str(out), after)


@pytest.mark.parametrize(("num_versions", "step"), [(100, 3), (2, 5)], ids=["ever new", "to and fro"])
def test_in_a_bucket_a_run_that_ends_at_any_request_is_finished_by_the_next(tmp_path, monkeypatch, num_versions, step):
    """By the records all or nothing; in the bucket new rows come in before the former go out."""
    with serving():
        job = Job(tmp_path, f"s3://{BUCKET}/{tmp_path.name}/out")
        for number in range(0, 100, step):
            before, version = job.expected(), number % num_versions
            job.write("a.parquet", [f"version {version}", *OLD[:12]], (version + 1) * 10**16)
            publish(survey(job.config))
            if not dies_at(number, job, monkeypatch):
                break
            assert read(job.out) in (before, job.expected())
            embed(job.config)
            assert read(job.out) == job.expected()
            assert parts(job.out) == opened(job.out)[0].live()
        assert number > 10
        job.check()


def dies_at(number: int, job: Job, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run until so many requests were made that write; say whether it died of that."""
    left = iter(range(number))
    with monkeypatch.context() as patched:
        for name in ("create", "delete", "rename"):
            patched.setattr(ObjectStorage, name, until_none_is(left, getattr(ObjectStorage, name)))
        try:
            embed(job.config)
        except ConnectionAbortedError:
            return True
    return False


def until_none_is(left: Iterator[int], original: Callable[..., Any]) -> Callable[..., Any]:
    def act(*args: Any) -> Any:
        if next(left, None) is None:
            raise ConnectionAbortedError
        return original(*args)

    return act


def die_before_the_record(job: Job, num_committed: int) -> Survey:
    """Let a run over a new input end between the part of a shard and its record, after some other shards."""
    job.write("b.parquet", OLD)
    embed(job.config, num_committed)
    asked = survey(job.config)
    dying = patch.object(Ledger, "_record", side_effect=ConnectionAbortedError)
    with dying, pytest.raises(ConnectionAbortedError):
        publish(asked, 1)
    return asked


@pytest.mark.parametrize("num_committed", [0, 1])
def test_a_part_that_a_dead_run_left_goes_with_the_former_rows_if_its_input_changes(any_job, num_committed):
    """It has no record, and readers of the folder see it: with the new rows it would be there twice."""
    die_before_the_record(any_job, num_committed)
    before = parts(any_job.out)
    any_job.write("b.parquet", LONGER)
    embed(any_job.config, 2)
    assert parts(any_job.out) == before  # not some new rows beside it
    embed(any_job.config)
    any_job.check()
    assert parts(any_job.out) == opened(any_job.out)[0].live()


def test_a_part_that_a_dead_run_left_beside_new_rows_is_found_and_taken_out(job, tmp_path):
    """As older engines did: the rows are there twice for who reads the folder."""
    died = die_before_the_record(job, 0)
    left = Path(job.out, part_name(died.standing.plan.pending[0].id))
    left.rename(tmp_path / "left")
    job.write("b.parquet", LONGER)
    embed(job.config)
    (tmp_path / "left").rename(left)
    found = engine.verify(job.out, "full").findings
    assert ["1 parts without a record are of inputs that changed" in finding.problem for finding in found] == [True]
    embed(job.config)
    job.check()


def test_a_part_without_a_record_whose_input_is_gone_is_for_gc(job):
    """No run takes it up, and `verify` does not say that one does."""
    die_before_the_record(job, 0)
    (job.source / "b.parquet").unlink()
    verdict = engine.verify(job.out, "full")
    assert verdict.warnings == ["1 parts have no record, and no run will make it: see `engine gc`"]
    assert not embed(job.config).standing.former


def test_a_run_that_others_have_overtaken_puts_nothing_old_in(job):
    """It went by a listing of before the change; what it publishes then is put away, and it ends."""
    job.write("b.parquet", OLD)
    slow = survey(job.config)
    job.write("b.parquet", EDITED)
    late = survey(job.config)
    embed(job.config, 1)
    shard = slow.standing.plan.pending[-1]
    job.write("c.parquet", OLD)
    job.write("b.parquet", LONGER)
    embed(job.config)
    with pytest.raises(SourceChanged):
        publish(late)
    assert shard.file.path == "b.parquet"
    job.check()


def test_of_two_that_switch_at_once_one_is_told(job):
    """The number of a switch is taken once."""
    job.write("a.parquet", EDITED)
    asked = survey(job.config)
    publish(asked)
    create = LocalStorage.create

    def overtaken(storage, name, data):
        if name.startswith("_engine/switches"):
            create(storage, name, data)
        return create(storage, name, data)

    with patch.object(LocalStorage, "create", overtaken), pytest.raises(EngineError, match="at the same time"):
        switching.switch(asked.ledger, asked.standing, lambda: None)
    embed(job.config)
    job.check()


# What is left


@pytest.fixture
def two_days_later() -> Iterator[None]:
    now = LocalStorage._now
    with patch.object(LocalStorage, "_now", lambda storage: now(storage) + 2 * 24 * 3600):
        yield


@pytest.mark.usefixtures("two_days_later")
def test_superseded_parts_are_garbage_and_what_waits_is_not(job):
    """`engine gc --apply` takes the former parts; a switch under way is carried out first."""
    job.write("a.parquet", EDITED)
    embed(job.config, 1)
    assert not engine.gc(job.out).garbage
    asked = survey(job.config)
    publish(asked)
    with patch.object(switching, "exchange", side_effect=ConnectionAbortedError), pytest.raises(ConnectionAbortedError):
        switching.switch(asked.ledger, asked.standing, lambda: None)
    engine.gc(job.out, apply=True)
    job.check()
    found = engine.gc(job.out, apply=True)
    assert {garbage.kind: len(garbage.names) for garbage in found.garbage} == {"former": 6}
    assert not found.strange
    job.check()
