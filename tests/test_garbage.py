"""Garbage: shown first, deleted only on demand, and never anything that a record names or somebody may be using."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine.cli import main
from engine.commits import Usage
from engine.config import load_config
from engine.errors import ConfigError, EngineError, OutputInUse
from engine.history import RUNS
from engine.lease import LEASE, held
from engine.ledger import Ledger, part_name, record_name, rejects_name
from engine.object_storage import PROBES, ObjectStorage
from engine.schema import Shard, canonical_json, content_hash
from engine.storage import LocalStorage, open_storage
from engine.survey import survey
from tests.builders import USAGE, Started, fail_below, files, make_rejects, make_table
from tests.object_stores import BUCKET, serving

DAY_S = 24 * 3600.0
LEFTOVERS = {
    "former": ("_engine/superseded/part-{old}.parquet", "_engine/superseded/{old}.json"),
    "set-aside": ("_engine/set-aside/1-part-{old}.parquet.bad",),
    "staging": ("_engine/tmp/0a.staging", "_engine/probe/0b"),
    "reuse": ("_engine/reuse/0c.arrow",),
    "leases": (f"{LEASE}/00000001.json", f"{LEASE}/00000001.beat", f"{LEASE}/00000001.end"),
    "unnamed": ("data/part-{old}.parquet", "_engine/rejects/{old}.jsonl"),
    "held": ("_engine/held/part-{old}.parquet",),
    "inputs": ("_engine/inputs/{old}.parquet", "_engine/inputs/{old}.json"),
    "indexes": ("_engine/index/{old}.json.gz",),
}
OURS = (
    f"{RUNS}/20200101T000000-0a.json",
    "_engine/report.html",
    *(f"{LEASE}/{name}" for name in ("00000002.json", "00000003.json", "00000003.end")),
)
STRANGE = ("data/notes.txt", "data/part-mine.parquet", "_engine/mine/a.json", "readme.md", f"{LEASE}/mine")


class Output:
    """An output of three files in two folders, of 40 rows in two shards each, as a run leaves it, but made without Ray."""

    def __init__(self, folder: Path, out: str = "", usage: Usage = USAGE) -> None:
        self.source, self.out = folder / "in", folder / "out"
        for name in ("a", "b", "deep/c"):
            path = self.source / f"{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"id": range(40), "text": [f"{name} {row}" for row in range(40)]}), path)
        self.config = load_config(
            source=str(self.source),
            output=out or str(self.out),
            model="custom:tests.models.HashModel",
            id_column="id",
            shard_rows=20,
        )
        self.shards: dict[str, list[Shard]] = {}
        asked = survey(self.config)
        asked.ledger.claim(asked.job)
        for shard in asked.standing.plan.pending:
            self.shards.setdefault(shard.file.path, []).append(shard)
            rows = (3, 7) if shard.start == 0 else ()
            asked.ledger.publish(
                make_table(shard, without=rows),
                shard=shard,
                fingerprint=asked.job.fingerprint,
                rejects=make_rejects(shard, rows),
                usage=usage,
            )

    def write(self, *names: str) -> None:
        for name in names:
            path = self.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"{}")

    def names_of(self, *paths: str) -> set[str]:
        """Return the files of all shards of some inputs."""
        shards = [shard for path in paths for shard in self.shards[path]]
        return {name_of(shard.id) for shard in shards for name_of in (record_name, part_name)} | {
            rejects_name(shard.id) for shard in shards if shard.start == 0
        }

    def check(self) -> None:
        """Make sure that nothing is wrong, and nothing left to do."""
        verdict = engine.verify(self.out, "full")
        assert verdict.ok, verdict.findings
        assert not survey(self.config).standing.plan.pending


@pytest.fixture
def output(tmp_path) -> Output:
    return Output(tmp_path)


@contextmanager
def later(seconds: float = 2 * DAY_S) -> Iterator[None]:
    """Let so much time pass by the clock of the store."""
    local, remote = LocalStorage._now, ObjectStorage._now
    with (
        patch.object(LocalStorage, "_now", lambda storage: local(storage) + seconds),
        patch.object(ObjectStorage, "_now", lambda storage: remote(storage) + seconds),
    ):
        yield


@pytest.fixture
def two_days_later() -> Iterator[None]:
    with later():
        yield


def found(result) -> dict[str, set[str]]:
    return {garbage.kind: set(garbage.names) for garbage in result.garbage}


def named(result) -> set[str]:
    return set().union(*found(result).values())


# What is garbage


def test_in_a_bucket_garbage_is_found_and_deleted_as_on_a_disk(tmp_path, monkeypatch):
    """A deleted input's files, a probe and a part that no record names: by the store's clock, and nothing else."""
    with serving():
        out = f"s3://{BUCKET}/{tmp_path.name}/out"
        made = Output(tmp_path, out)
        storage = open_storage(out)
        probe, unnamed = f"{PROBES}/0b", part_name("f" * 32)
        storage.create(probe, b"1")
        storage.create(unnamed, b"1")
        (made.source / "a.parquet").unlink()
        assert not engine.gc(out).garbage
        now = ObjectStorage._now
        monkeypatch.setattr(ObjectStorage, "_now", lambda storage: now(storage) + 2 * DAY_S)
        expected = {"gone": made.names_of("a.parquet"), "staging": {probe}, "unnamed": {unnamed}}
        assert found(engine.gc(out, apply=True)) == expected
        assert not {name for name, _, _ in storage.ages()} & set().union(*expected.values())
        assert engine.verify(out, "full").ok


def test_a_full_disk_can_be_looked_at_and_it_is_said_what_to_delete_by_hand(output, two_days_later, monkeypatch):
    """No byte can be written, so not the lease either that deleting takes; a file without bytes tells the time."""
    output.write("_engine/tmp/0a.staging")
    before = files(output.out)
    fail_below(output.out / "_engine/tmp", monkeypatch, errno.ENOSPC, [(io, "open")])
    assert found(engine.gc(output.out)) == {"staging": {"_engine/tmp/0a.staging"}}
    with pytest.raises(
        EngineError, match=r"the disk is full.*`engine gc .*out` shows .* kinds set-aside, staging, .* by hand"
    ):
        engine.gc(output.out, apply=True)
    monkeypatch.undo()
    assert files(output.out) == before


def test_who_may_not_write_can_look_and_not_delete(output, monkeypatch):
    """By the clock of this machine, which deletes nothing."""
    output.write("_engine/tmp/0a.staging")
    fail_below(output.out / "_engine/tmp", monkeypatch, calls=[(io, "open"), (os, "open")])
    assert [kept.names for kept in engine.gc(output.out).kept] == [["_engine/tmp/0a.staging"]]
    monkeypatch.setattr(time, "time", lambda: time.time_ns() / 1e9 + 2 * DAY_S)
    assert found(engine.gc(output.out)) == {"staging": {"_engine/tmp/0a.staging"}}
    with pytest.raises(EngineError, match="permission denied: make the folder writable"):
        engine.gc(output.out, apply=True)


def test_what_may_be_named_is_put_together_once_and_not_for_each_file(output, two_days_later, monkeypatch):
    """Of an output of many thousand parts, that for each of them would take hours."""
    joined: list[int] = []

    class Spied(frozenset[str]):
        def __or__(self, other):
            joined.append(len(self))
            return super().__or__(other)

    committed = Ledger.committed
    monkeypatch.setattr(Ledger, "committed", lambda ledger: Spied(committed(ledger)))
    unnamed = {part_name("f" * 32), rejects_name("f" * 32)}
    output.write(*unnamed)
    assert found(engine.gc(output.out)) == {"unnamed": unnamed}
    assert len(joined) <= 1


def test_all_kinds_are_shown_and_then_exactly_these_are_deleted(output, two_days_later):
    """Without `apply` nothing changes; with it, all else stays, the output verifies, and there is nothing to do for a run."""
    old = "0" * 32
    expected = {kind: {name.format(old=old) for name in names} for kind, names in LEFTOVERS.items()}
    output.write(*set().union(*expected.values()), *OURS, *STRANGE)
    (output.source / "b.parquet").unlink()
    expected["gone"] = output.names_of("b.parquet")
    before = files(output.out)

    shown = engine.gc(output.out)
    assert found(shown) == expected
    assert shown.strange == sorted(STRANGE)
    assert (shown.applied, shown.kept, shown.warnings) == (False, [], [])
    assert files(output.out) == before
    total = sum((output.out / name).stat().st_size for name in named(shown))
    assert (shown.num_files, shown.num_bytes) == (len(named(shown)), total)
    assert "nothing is deleted without --apply" in shown.lines()["garbage"]

    done = engine.gc(output.out, apply=True)
    assert found(done) == expected
    left = {name: data for name, data in before.items() if name not in named(shown)}
    assert {name: data for name, data in files(output.out).items() if not name.startswith(LEASE)} == {
        name: data for name, data in left.items() if not name.startswith(LEASE)
    }
    for name in STRANGE[:2]:
        (output.out / name).unlink()
    output.check()
    assert not engine.gc(output.out).garbage


def test_what_a_record_or_a_plan_names_is_no_garbage(output, two_days_later):
    """A part that waits for its record, whose input is there: the next run takes it up. Held ones and indexes of listed files likewise."""
    waiting, done = output.shards["a.parquet"][0], output.shards["a.parquet"][1]
    (output.out / record_name(waiting.id)).unlink()
    output.write(f"_engine/held/part-{waiting.id}.parquet", f"_engine/superseded/part-{done.id}.parquet")
    (output.out / "_engine/index").mkdir()
    key = content_hash(canonical_json([1, done.file.path, done.file.size, done.file.version]))
    (output.out / "_engine/index/a.json.gz").write_bytes(gzip.compress(json.dumps({key: {}, "other": {}}).encode()))
    assert not engine.gc(output.out, apply=True).garbage
    assert survey(output.config).standing.unrecorded == {waiting.id}


def test_copies_of_a_source_in_memory_stay_while_a_record_or_the_source_names_them(output, two_days_later):
    """The manifest that the last run went by, its blocks, those that records name, and no others."""
    record = output.shards["a.parquet"][0].file.version
    inputs = output.out / "_engine/inputs"
    inputs.mkdir()
    (inputs / "current.json").write_text('{"source":"memory:1111"}')
    (inputs / "1111.json").write_text('[{"path":"rows-0","size":1,"version":"3333"}]')
    (inputs / "2222.json").write_text('[{"path":"rows-0","size":1,"version":"4444"}]')
    output.write(*(f"_engine/inputs/{version}.parquet" for version in ("3333", "4444", record)))
    found = named(engine.gc(output.out, apply=True))
    assert found == {"_engine/inputs/2222.json", "_engine/inputs/4444.parquet"}


def test_an_input_that_the_source_does_not_name_and_that_is_there_is_not_gone(output, two_days_later):
    """As one that a later run named beside the source of the first."""
    job = output.out / "_engine/job.json"
    stored = json.loads(job.read_text())
    stored["config"]["source"] = [str(output.source / "*.parquet")]
    job.write_text(json.dumps(stored))
    assert not engine.gc(output.out, apply=True).garbage


def test_records_of_parts_that_are_lost_go_with_their_input(output, two_days_later):
    """What verification could only advise to restore from a copy is no longer missed."""
    (output.source / "b.parquet").unlink()
    for shard in output.shards["b.parquet"]:
        (output.out / part_name(shard.id)).unlink()
    assert not engine.verify(output.out).ok
    assert len(named(engine.gc(output.out, apply=True))) == 3
    output.check()


# What is too young, by which clock


def test_what_came_within_the_last_day_stays(output):
    """Whatever its own time of change says, and whatever this machine takes the time for."""
    output.write(*(name.format(old="0" * 32) for names in LEFTOVERS.values() for name in names), *OURS)
    (output.source / "b.parquet").unlink()
    for path in output.out.rglob("*"):
        os.utime(path, (1, 1))
    before = files(output.out)
    with patch.object(time, "time", lambda: 4e9):
        result = engine.gc(output.out, apply=True)
    assert not result.garbage
    assert {kept.kind for kept in result.kept} == {*LEFTOVERS, "gone"}
    assert files(output.out) == before
    with later():
        assert not engine.gc(output.out, apply=True, older_than_days=3).garbage


def test_a_shard_goes_as_a_whole_once_its_last_file_is_old(output, two_days_later):
    """A record that was made anew today keeps its part."""
    (output.source / "b.parquet").unlink()
    young = output.shards["b.parquet"][1].id
    os.utime(output.out / record_name(young), (time.time() + 2 * DAY_S,) * 2)
    assert named(engine.gc(output.out, apply=True)) == output.names_of("b.parquet") - {
        record_name(young),
        part_name(young),
    }
    output.check()


@pytest.mark.parametrize("days", [0, -1])
def test_less_than_a_day_is_refused(output, days):
    """By the function, and by the command line."""
    with pytest.raises(ConfigError, match="at least 1"):
        engine.gc(output.out, older_than_days=days)
    assert main(["gc", str(output.out), "--older-than-days", str(days)]) == 2


# Inputs that are out of reach


def lose_folder(output: Output) -> None:
    output.source.rename(output.source.with_name("elsewhere"))


def empty_folder(output: Output) -> None:
    for path in output.source.rglob("*.parquet"):
        path.unlink()


def damage_another(output: Output) -> None:
    (output.source / "a.parquet").unlink()
    (output.source / "b.parquet").write_bytes(b"no Parquet")


@pytest.mark.parametrize("lose", [lose_folder, empty_folder, damage_another])
def test_a_source_out_of_reach_deletes_nothing_that_is_of_inputs(output, lose, two_days_later):
    """Not even if it is said that inputs were deleted; what has nothing to do with the source goes."""
    output.write("data/part-" + "0" * 32 + ".parquet", "_engine/tmp/0a.staging")
    lose(output)
    result = engine.gc(output.out, apply=True, inputs_gone=True)
    assert found(result) == {"staging": {"_engine/tmp/0a.staging"}}
    assert "the source cannot be compared" in result.warnings[0]


@pytest.mark.parametrize(("gone", "doubt"), [(("a", "b"), "more than half"), (("deep/c",), "deep is empty")])
def test_inputs_that_look_like_those_of_a_lost_disk_are_taken_for_deleted_only_if_somebody_says_so(
    output, gone, doubt, two_days_later
):
    """More than half of all files, or all of a folder that is still there."""
    for name in gone:
        (output.source / f"{name}.parquet").unlink()
    expected = output.names_of(*(f"{name}.parquet" for name in gone))
    before = files(output.out)
    held_back = engine.gc(output.out, apply=True)
    assert not held_back.garbage
    assert [(kept.kind, set(kept.names)) for kept in held_back.kept] == [("gone", expected)]
    assert doubt in held_back.lines()["kept"]
    assert "--inputs-gone" in held_back.lines()["kept"]
    assert files(output.out) == before
    assert named(engine.gc(output.out, apply=True, inputs_gone=True)) == expected
    output.check()


def test_inputs_behind_a_link_that_leads_nowhere_are_not_taken_for_deleted(output, tmp_path, two_days_later):
    """Its disk is not mounted; what the link lies in has other files."""
    (tmp_path / "disk").mkdir()
    (output.source / "deep").rename(tmp_path / "disk" / "mounted")
    (output.source / "deep").symlink_to(tmp_path / "disk" / "mounted")
    output.check()
    (tmp_path / "disk" / "mounted").rename(tmp_path / "elsewhere")
    held_back = engine.gc(output.out, apply=True)
    assert not held_back.garbage
    assert f"the link {output.source / 'deep'} leads nowhere" in held_back.lines()["kept"]
    assert named(engine.gc(output.out, inputs_gone=True)) == output.names_of("deep/c.parquet")


def test_no_link_is_followed(output, tmp_path, two_days_later):
    """Neither to a file nor to a folder; a record stays whose part is behind one."""
    (output.source / "b.parquet").unlink()
    (output.out / "data").rename(tmp_path / "disk")
    (output.out / "data").symlink_to(tmp_path / "disk")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"1")
    (output.out / "_engine/set-aside").symlink_to(tmp_path / "outside")
    (output.out / "_engine/tmp/link").symlink_to(tmp_path / "outside/file")
    result = engine.gc(output.out, apply=True)
    assert not result.garbage
    assert "2 parts of deleted inputs stay" in result.warnings[0]
    assert (tmp_path / "outside/file").exists()
    output.check()


# Other runs, and death


def test_beside_a_live_run_nothing_is_deleted_and_all_is_shown(output, two_days_later, capfd):
    """Exit code 3, and who the run is."""
    output.write("_engine/tmp/0a.staging")
    with held(LocalStorage(str(output.out)), "refuse"):
        assert main(["gc", str(output.out)]) == 0
        assert "left by writers that died" in capfd.readouterr().out
        assert main(["gc", str(output.out), "--apply", "--json"]) == 3
        assert json.loads(capfd.readouterr().out)["exit_code"] == 3
        with pytest.raises(OutputInUse):
            engine.gc(output.out, apply=True)
    assert (output.out / "_engine/tmp/0a.staging").exists()
    assert main(["gc", str(output.out), "--apply", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["num_files"] == 1


def test_what_a_run_names_that_ends_while_garbage_is_looked_for_stays(output, two_days_later, monkeypatch):
    """The look began before, so it is taken again once the output is held."""
    shard = output.shards["a.parquet"][0]
    record = output.out / record_name(shard.id)
    data = record.read_bytes()
    record.unlink()
    (output.source / "a.parquet").rename(output.source / "away")
    with ExitStack() as run:
        run.enter_context(held(open_storage(str(output.out)), "refuse"))

        def end_meanwhile(storage: LocalStorage, **how: Any) -> list[Any]:
            listed = list(ages(storage, **how))
            if not record.exists():
                record.write_bytes(data)
                (output.source / "away").rename(output.source / "a.parquet")
                run.close()
            return listed

        ages = LocalStorage.ages
        monkeypatch.setattr(LocalStorage, "ages", end_meanwhile)
        engine.gc(output.out, apply=True, inputs_gone=True)
    output.check()


def die_after(num_deletions: int, out: str) -> None:
    delete, left = LocalStorage.delete, iter(range(num_deletions))

    def last(storage: LocalStorage, name: str) -> None:
        if next(left, None) is None:
            os._exit(9)
        delete(storage, name)

    with later(), patch.object(LocalStorage, "delete", last):
        engine.gc(out, apply=True)


def die_at_each_deletion(folder: str, out: str) -> int:
    """Collect garbage in copies of an output, each time in a process that ends one deletion later; return how many died."""
    for number in range(100):
        copy = f"{folder}/{number}"
        os.system(f"cp -a {out} {copy}")
        if not (pid := os.fork()):
            code = 1
            try:
                die_after(number, copy)
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            return number
        assert code == 9
    raise AssertionError


def test_whenever_it_dies_no_record_is_without_its_part_and_the_next_one_ends_the_work(
    output, tmp_path, two_days_later
):
    """Between any two deletions; verification has nothing to find fault with, before and after."""
    output.write("_engine/tmp/0a.staging", f"{LEASE}/00000001.json", f"{LEASE}/00000003.json")
    (output.source / "b.parquet").unlink()
    gone = output.names_of("b.parquet")
    (tmp_path / "copies").mkdir()
    num_died = Started(die_at_each_deletion, str(tmp_path / "copies"), str(output.out)).result()
    assert num_died >= len(gone) + 2
    for number in range(num_died + 1):
        output.out = tmp_path / f"copies/{number}"
        verdict = engine.verify(output.out, "full")
        assert verdict.ok, verdict.findings
        engine.gc(output.out, apply=True)
        assert not gone & files(output.out).keys()
        assert not (output.out / "_engine/tmp/0a.staging").exists()
        output.config = output.config.model_copy(update={"output": str(output.out)})
        output.check()
