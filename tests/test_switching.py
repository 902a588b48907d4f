"""Inputs that change: their new rows take the place of the former ones, at one instant, whoever dies meanwhile."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

import engine
from engine import exchange, lease, places, runner, switching
from engine.commits import Receipt
from engine.config import JobConfig, load_config
from engine.errors import EngineError, OutputInUse, SourceChanged
from engine.holder import Holder
from engine.ledger import Ledger
from engine.object_storage import ObjectStorage
from engine.pipeline.parcel import Item, unpack_receipts
from engine.pipeline.publish import Commits
from engine.places import DATA, HELD, SUPERSEDED, held_name, part_name
from engine.schema import EMBEDDING, SOURCE_ROW, TEXT_HASH, Shard, canonical_json
from engine.sources import in_memory
from engine.sources.formats import read_shards
from engine.sources.rows import Selection
from engine.sources.tables import tables_of
from engine.sources.texts import texts_in
from engine.storage import LocalStorage, open_storage
from engine.survey import Survey, opened, stored_config, survey
from engine.switches import Switches, since
from engine.text_hashes import text_hashes
from tests.builders import USAGE, Started, killed_at_each_call, vectors_type
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


def embed(config: JobConfig, most: int | None = None, *, last_first: bool = False) -> Survey:
    """Do what a run does, with `most` shards of those that are pending."""
    asked = survey(config)
    asked.ledger.claim(asked.job)
    in_memory.remember(asked.ledger.storage, config.source)
    switching.finish(asked.ledger)
    publish(asked, most, last_first=last_first)
    switching.switch_all(asked, lambda: None)
    return asked


def publish(asked: Survey, most: int | None = None, *, last_first: bool = False) -> None:
    commit(asked, made(asked, most, last_first=last_first))


def made(asked: Survey, most: int | None = None, *, last_first: bool = False) -> Iterator[tuple[Shard, pa.Table]]:
    """Yield pending shards with their vectors, as they are before they are committed."""
    for shard in asked.standing.plan.pending[:: -1 if last_first else 1][:most]:
        rows = next(read_shards([shard], Selection.of(asked.config, asked.job.kept_types)))
        texts = texts_in(rows)[0]
        vectors = np.stack([MODEL.vector(text) for text in texts])
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=vectors_type(vectors.shape[1]))
        columns = {"id": rows.table["id"], EMBEDDING: column, TEXT_HASH: text_hashes(texts)}
        yield shard, pa.table(columns | {SOURCE_ROW: rows.table[SOURCE_ROW]})


def commit(asked: Survey, shards: Iterable[tuple[Shard, pa.Table]]) -> None:
    for shard, table in shards:
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
    die_at_the_record(asked)
    return asked


def die_at_the_record(asked: Survey) -> None:
    dying = patch.object(Ledger, "_record", side_effect=ConnectionAbortedError)
    with dying, pytest.raises(ConnectionAbortedError):
        publish(asked, 1)


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


def named_in(verdict: engine.results.VerifyResult) -> list[str]:
    return [finding.problem for finding in verdict.findings]


STILL = "inputs changed, and their new rows have not taken the place of the former ones: readers do not see them"


@pytest.mark.parametrize("texts", [EDITED, OLD[:20], []], ids=["edit", "cut", "none"])
def test_verify_fails_until_new_rows_have_taken_the_place_of_the_former_ones(job, texts):
    """All are committed, and the run was killed before it switched: what is counted is what readers see."""
    job.write("a.parquet", texts)
    publish(survey(job.config))
    for level in ("quick", "full"):
        verdict = engine.verify(job.out, level)
        assert (named_in(verdict), verdict.num_rows, verdict.pending_rows) == ([STILL], 40, 0)
        assert not any("occur more than once" in warning for warning in verdict.warnings)
    assert engine.run(progress=False, **named(job)).num_changed_inputs == 1
    job.check()


def test_verify_fails_until_a_switch_is_carried_out(job):
    """Who goes by the records sees the new rows, and who reads the folder the former ones."""
    job.write("a.parquet", EDITED)
    asked = survey(job.config)
    publish(asked)
    with patch.object(switching, "exchange", side_effect=ConnectionAbortedError), pytest.raises(ConnectionAbortedError):
        switching.switch(asked.ledger, asked.standing, lambda: None)
    assert named_in(engine.verify(job.out, "full")) == [STILL]
    engine.run(progress=False, **named(job))
    job.check()


def test_what_waits_for_nothing_is_nothing_to_complain_of(job):
    """The input is again what it was: the output is right, and the next run puts away what was held."""
    job.write("b.parquet", OLD, 10**18)
    embed(job.config)
    job.write("b.parquet", EDITED, 2 * 10**18)
    publish(survey(job.config))
    job.write("b.parquet", OLD, 10**18)
    verdict = engine.verify(job.out, "full")
    assert (verdict.ok, verdict.num_rows) == (True, 70)


def test_new_rows_are_switched_in_though_the_former_ones_were_set_aside(job):
    """Nothing is left to embed, and nothing is left to take the place of."""
    job.write("a.parquet", OLD[:10], 10**18)
    embed(job.config)
    job.write("a.parquet", EDITED[10:20], 2 * 10**18)
    publish(survey(job.config))
    (former,) = (record for record in opened(job.out)[0].records() if record.path == "a.parquet")
    Path(job.out, part_name(former.shard_id)).write_bytes(b"")
    assert engine.verify(job.out, set_aside=True).set_aside
    assert read(job.out) == {key: vector for key, vector in job.expected().items() if key.startswith("same")}
    assert named_in(engine.verify(job.out)) == [STILL]
    engine.run(progress=False, **named(job))
    job.check()


@contextmanager
def switched_at_read(number: int, config: JobConfig) -> Iterator[list[str]]:
    """Let another run switch when so many files of an output have been read; give their names."""
    asked, original, names, lock = survey(config), LocalStorage.read, [], threading.Lock()

    def spied(storage: LocalStorage, name: str) -> bytes:
        with lock:
            names.append(name)
            is_now = len(names) == number + 1
        if is_now:
            with patch.object(LocalStorage, "read", original):
                switching.switch(asked.ledger, asked.standing, lambda: None)
        return original(storage, name)

    with patch.object(LocalStorage, "read", spied):
        yield names


def beside_a_switch(config: JobConfig, start: Path, look: Callable[[], Any]) -> Iterator[Any]:
    """Look at an output that has all new rows but has not switched, with the switch at each file that is read; give what is found."""
    publish(survey(config))
    shutil.copytree(config.output, start)
    for number in count():
        shutil.rmtree(config.output)
        shutil.copytree(start, config.output)
        with switched_at_read(number, config) as names:
            found = look()
        if len(names) <= number:
            break
        yield found
    assert number > 3


@pytest.mark.parametrize("look", ["verify", "status", "plan", "gc"])
def test_a_switch_is_no_damage_to_who_looks_meanwhile(job, tmp_path, look):
    """Whenever it comes: each lists the output at one instant, and finds what others have taken the place of where it lies then."""
    job.write("a.parquet", LONGER)
    looks: dict[str, Callable[[], Any]] = {
        "verify": lambda: engine.verify(job.out, "full"),
        "status": lambda: engine.status(job.out),
        "plan": lambda: engine.plan(**named(job)),
        "gc": lambda: engine.gc(job.out),
    }
    for found in beside_a_switch(job.config, tmp_path / "start", looks[look]):
        assert not any("missing" in warning for warning in found.warnings)
        if look == "verify":
            assert (found.ok, found.num_rows) in ((True, 40), (True, 52)), found.findings
        if look == "status":
            assert found.num_rows in (40, 52)
        assert read(job.out) == job.expected()


def test_a_run_beside_one_that_switches_finds_the_output_in_use(job, tmp_path):
    """Whenever its records go from where they were listed; or it looks after that, and finds nothing to do."""

    def look() -> EngineError | None:
        with lease.held(open_storage(job.out), "refuse"):
            try:
                engine.run(progress=False, **named(job))
            except OutputInUse as error:
                return error
        return None

    job.write("a.parquet", EDITED)
    refusals = []
    for found in beside_a_switch(job.config, tmp_path / "start", look):
        refusals.append(found)
        assert read(job.out) == job.expected()
    assert any(refusals)


def paused(job: Job, name: str = "b.parquet") -> tuple[Survey, list[tuple[Shard, pa.Table]]]:
    """Let a run over an input commit a shard of it and be held up, with the vectors of the others at hand."""
    job.write(name, ["new", *OLD[1:]], 10**18)
    asked = survey(job.config)
    at_hand = list(made(asked))
    commit(asked, at_hand[:1])
    return asked, at_hand[1:]


def test_a_run_that_wakes_when_its_input_is_what_it_was_takes_nothing_out(job):
    """Others have switched to another version of it and back: the last word holds, and these rows are in the output."""
    slow, at_hand = paused(job)
    job.write("b.parquet", EDITED, 2 * 10**18)
    embed(job.config)
    job.write("b.parquet", ["new", *OLD[1:]], 10**18)
    embed(job.config)
    commit(slow, at_hand)
    job.check()


def by_publisher(slow: Survey, epoch: int, at_hand: list[tuple[Shard, pa.Table]]) -> list[Receipt]:
    """Commit as a publisher of the run that holds an epoch does."""
    commits = Commits(slow.ledger, slow.job, epoch)
    items = [Item(shard, table, usage=replace(USAGE, embed_s=next(SECONDS))) for shard, table in at_hand]
    return [receipt for packed in unpack_receipts(commits.receipts(items)) for receipt in packed]


@pytest.mark.parametrize("is_edited", [False, True])
def test_a_run_that_wakes_after_others_have_ended_commits_only_rows_of_inputs_as_they_are(job, is_edited):
    """There is no switch to go by: when its input was edited, no former rows were there."""
    slow, at_hand = paused(job)
    slow.ledger.set_aside(slow.standing.plan.pending[0].id)
    with lease.held(slow.ledger.storage, "refuse") as former:
        pass
    if is_edited:
        job.write("b.parquet", EDITED, 2 * 10**18)
    assert run_beside(job.config) == ["b.parquet"] * 3
    with pytest.raises(SourceChanged) if is_edited else nullcontext():
        assert {receipt.outcome for receipt in by_publisher(slow, former.epoch, at_hand)} == {"present"}
    job.check()


def cut(job: Job, *sizes: int) -> JobConfig:
    """Return the job of a Ray Dataset of the same rows each time, in blocks of so many."""
    config = job.config.model_copy(update={"output": f"{job.out}-of-blocks"})
    ends = list(accumulate(sizes))
    blocks = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    tables = [{"id": [str(row) for row in block], "text": [f"text {row}" for row in block]} for block in blocks]
    selection = Selection.of(config)
    pieces = [piece for table in tables for piece in tables_of(table, selection)]
    source = in_memory.stage(pieces, open_storage(config.output), selection, is_ordered=False)
    return config.model_copy(update={"source": (source,)})


@pytest.mark.parametrize("is_recut", [False, True])
def test_a_run_that_wakes_after_its_dataset_was_cut_anew_commits_none_of_its_blocks(job, monkeypatch, is_recut):
    """Their rows are in others, which nothing says of a block."""
    monkeypatch.setattr(in_memory, "BLOCK_ROWS", 10)
    slow = survey(cut(job, 10, 10, 10))
    slow.ledger.claim(slow.job)
    with lease.held(slow.ledger.storage, "refuse") as former:
        in_memory.remember(slow.ledger.storage, slow.config.source)
        at_hand = list(made(slow))
        commit(slow, at_hand[:1])
    run_beside(cut(job, 6, 12, 12) if is_recut else slow.config)
    with pytest.raises(SourceChanged) if is_recut else nullcontext():
        by_publisher(slow, former.epoch, at_hand[1:])
    rows = {str(row): tuple(MODEL.vector(f"text {row}").tolist()) for row in range(30)}
    check(slow.config.output, rows)


class Meanwhile:
    """Somebody who does something once, as soon as a run has called a function of its own for the n-th time, or before that."""

    def __init__(self, original: Callable[..., Any], act: Callable[[], None], *, number: int = 1) -> None:
        self._original, self._act, self._left = original, act, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._original(*args, **kwargs)
        self._left -= 1
        if not self._left:
            self._act()
        return found


def run_beside(config: JobConfig) -> list[str]:
    """Run a job, but for Ray; return the paths of the shards that it embedded."""
    embedded: list[str] = []

    def stream(asked: Survey, *_: Any) -> None:
        embedded.extend(shard.file.path for shard in asked.standing.plan.pending)
        publish(asked)

    with patch.object(runner, "_stream", stream):
        runner.run(config)
    return embedded


@pytest.mark.parametrize("name", ["b.parquet", "a.parquet"], ids=["seen", "held"])
@pytest.mark.parametrize("number", range(1, 6))
def test_former_rows_that_a_paused_run_commits_as_others_take_their_place_go_with_them(job, number, name):
    """Whatever listing of the records it comes after: it finds the switch, or the run that switches finds its rows."""
    slow, at_hand = paused(job, name)
    job.write(name, EDITED, 2 * 10**18)
    waking = Meanwhile(Ledger.shards, lambda: wake(slow, at_hand), number=number)
    with patch.object(Ledger, "shards", lambda ledger: waking(ledger)):
        run_beside(job.config)
    job.check()
    came_in = set().union(*(found.add for found in since(open_storage(job.out), 0)))
    assert came_in.isdisjoint(shard.id for shard, _ in at_hand)


def wake(slow: Survey, at_hand: list[tuple[Shard, pa.Table]]) -> None:
    with suppress(SourceChanged):
        commit(slow, at_hand)


def test_rows_that_a_paused_run_commits_before_the_next_ends_go_although_none_of_that_input_were_there(job):
    """The next run had nothing to switch, and finds that it has."""
    slow, at_hand = paused(job)
    slow.ledger.set_aside(slow.standing.plan.pending[0].id)
    job.write("b.parquet", EDITED, 2 * 10**18)
    with patch.object(runner, "survey", Meanwhile(survey, lambda: wake(slow, at_hand))):
        run_beside(job.config)
    job.check()


@pytest.mark.parametrize("is_edited", [False, True])
@pytest.mark.parametrize("has_begun", [False, True], ids=["begins meanwhile", "ends meanwhile"])
def test_what_another_run_commits_while_a_run_looks_around_is_seen(job, is_edited, has_begun):
    """It is not embedded a second time, and what is no longer so is switched out: the lease is free, and still the look is too old."""
    job.write("b.parquet", OLD, 10**18)
    other = survey(job.config)
    at_hand = list(made(other))
    if is_edited:
        job.write("b.parquet", EDITED, 2 * 10**18)
    held = ExitStack()
    hold = partial(held.enter_context, lease.held(open_storage(job.out), "refuse"))
    if has_begun:
        hold()

    def end() -> None:
        if not has_begun:
            hold()
        commit(other, at_hand[:2])
        held.close()

    with patch.object(runner, "survey", Meanwhile(survey, end)):
        assert run_beside(job.config) == ["b.parquet"] * (3 if is_edited else 1)
    job.check()


@pytest.mark.parametrize("has_left", [True, False])
def test_after_a_run_that_is_over_a_run_looks_around_once(job, has_left):
    """That may take minutes: whether it has left, or is gone from this machine without a word."""
    pid = os.getpid() if has_left else Started(os.getpid).result()
    holder = replace(Holder.me(), pid=pid)
    storage = open_storage(job.out)
    storage.create(f"{lease.LEASE}/00000001.json", canonical_json(asdict(holder)).encode())
    if has_left:
        storage.create(f"{lease.LEASE}/00000001.end", b"")
    job.write("b.parquet", OLD)
    with patch.object(runner, "survey", Mock(wraps=survey)) as looks:
        run_beside(job.config)
    assert looks.call_count == 1


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


# Tables in memory, which are one input


class Table:
    """The output of 10 rows a shard and 64 a block of a table in memory that changes: made without Ray."""

    def __init__(self, folder: Path) -> None:
        self.out = str(folder / "out")

    def config(self, texts: dict[str, str], cuts: tuple[int, ...] = ()) -> JobConfig:
        """Stage texts, by their ids; with `cuts` as a Ray Dataset of blocks that end there."""
        config = load_config(
            source="memory:", output=self.out, model="custom:tests.models.HashModel", id_column="id", shard_rows=10
        )
        table = pa.table({"id": pa.array(texts, pa.string()), "text": pa.array(texts.values(), pa.string())})
        blocks = [table.slice(start, stop - start) for start, stop in pairwise(cuts)] or [table]
        selection = Selection.of(config)
        pieces = (piece for block in blocks for piece in tables_of(block, selection))
        name = in_memory.stage(pieces, open_storage(self.out), selection, is_ordered=not cuts)
        return config.model_copy(update={"source": (name,)})

    def check(self, texts: dict[str, str]) -> None:
        """Make sure that the output is that table, and has nothing left over."""
        check(self.out, vectors_of(texts))
        assert parts(self.out) == opened(self.out)[0].live()


@pytest.fixture
def table(tmp_path, monkeypatch) -> Table:
    monkeypatch.setattr(in_memory, "BLOCK_ROWS", 64)
    monkeypatch.setattr(in_memory, "PIECE_ROWS", 8)
    monkeypatch.setattr(in_memory, "BLOCK_BYTES", 4000)
    return Table(tmp_path)


def numbered(rows: Iterable[int], longer: str = "") -> dict[str, str]:
    return {f"id-{row}": f"text {row}{longer}" for row in rows}


def vectors_of(texts: dict[str, str]) -> Rows:
    return {key: tuple(MODEL.vector(text).tolist()) for key, text in texts.items()}


TABLES = {
    "filtered": numbered(row for row in range(136) if row % 3),
    "its first block dropped": numbered(range(64, 136)),
    "its last block dropped": numbered(range(128)),
    "cut": numbered(range(50)),
    "rows in front": numbered([*range(1000, 1020), *range(136)]),
    "rows within": numbered([*range(70), *range(1000, 1020), *range(70, 136)]),
    "rows behind": numbered(range(160)),
    "sorted anew": numbered(reversed(range(136))),
    "longer texts": numbered(range(136), "x" * 80),
    "other texts": numbered(range(136), "x"),
    "emptied": {},
}


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("change", TABLES)
def test_a_table_that_changes_is_switched_as_a_whole(table, change, last_first):
    """Whichever of its blocks are done first, and however it is cut now: all rows as they were until none is left to do, then those that it has."""
    former, texts = numbered(range(136)), TABLES[change]
    embed(table.config(former))
    config = table.config(texts)
    num_pending = len(survey(config).standing.plan.pending)
    for _ in range(0, num_pending, 5):
        assert read(table.out) == seen(table.out) == vectors_of(former)
        embed(config, 5, last_first=last_first)
    embed(config)
    if texts:
        table.check(texts)
    assert parts(table.out) == opened(table.out)[0].live()
    assert not embed(config).standing.former


def test_rows_behind_a_full_block_are_seen_as_they_come(table):
    """Nothing that is committed is another now."""
    embed(table.config(numbered(range(128))))
    texts = numbered(range(200))
    embed(table.config(texts), 2)
    assert read(table.out) == seen(table.out)
    assert vectors_of(numbered(range(140))).items() < read(table.out).items() < vectors_of(texts).items()
    embed(table.config(texts))
    table.check(texts)


def test_gc_looks_at_a_table_beside_a_run_that_switches_it(table, tmp_path):
    """Former records name the blocks of the copy that stay."""
    embed(table.config(numbered(range(30))))
    config = table.config(numbered(range(8)))
    in_memory.remember(open_storage(table.out), config.source)
    for found in beside_a_switch(config, tmp_path / "start", lambda: engine.gc(table.out)):
        assert not found.warnings


@pytest.mark.parametrize("num_committed", [0, 3])
def test_a_part_that_a_dead_run_left_goes_with_the_former_rows_if_a_dataset_is_cut_anew(table, num_committed):
    """Its block is not in the dataset any more: nobody would take it up, and its rows are in others."""
    texts = numbered(range(90))
    embed(table.config(texts, (0, 30, 60, 90)), num_committed)
    die_at_the_record(survey(table.config(texts, (0, 30, 60, 90))))
    before, config = parts(table.out), table.config(texts, (0, 45, 90))
    assert len(before) == num_committed + 1
    embed(config, 3)
    assert parts(table.out) == before
    embed(config)
    table.check(texts)


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
