"""What an output has cost: no dollar is forgotten as records go, and none is counted twice, whoever dies meanwhile."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine import switching
from engine.costs import COSTS
from engine.errors import CorruptOutput, SourceChanged
from engine.ledger import Ledger, part_name, record_name
from engine.records import Records
from engine.schema import Shard, utc_now
from engine.storage import LocalStorage, open_storage
from engine.survey import survey
from engine.switches import SWITCHES, Switch
from tests.builders import USAGE, make_rejects, make_table
from tests.object_stores import BUCKET, serving
from tests.test_garbage import Output, later

PAID = replace(USAGE, num_requests=1, cost=0.25)
ALL = 6 * 0.25
"""Of the six shards of an output."""


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path, usage=PAID)


def cost(out: str | Path) -> float | None:
    use = engine.status(str(out)).provider
    return use and use.cost


def again(output: Output, shard: Shard) -> None:
    """Embed a shard once more, for a cent less: its part has other bytes."""
    asked = survey(output.config)
    asked.ledger.publish(
        make_table(shard, without=(3, 7) if shard.start == 0 else ()),
        shard=shard,
        fingerprint=asked.job.fingerprint,
        rejects=make_rejects(shard) if shard.start == 0 else [],
        usage=replace(PAID, cost=0.24),
    )


@pytest.mark.parametrize("in_a_bucket", [False, True])
def test_what_deleted_inputs_had_cost_is_counted_when_gc_has_deleted_their_records(tmp_path, in_a_bucket):
    """Night after night: a folder that rolls on would be embedded for any sum."""
    with serving():
        out = f"s3://{BUCKET}/{tmp_path.name}/out" if in_a_bucket else str(tmp_path / "out")
        output = Output(tmp_path, out, usage=PAID)
        for name in ("a", "b"):
            (output.source / f"{name}.parquet").unlink()
            with later():
                assert {garbage.kind for garbage in engine.gc(out, apply=True, inputs_gone=True).garbage} == {"gone"}
            assert cost(out) == pytest.approx(ALL)
        assert engine.status(out).num_shards == 2
        with later(1e7):
            assert not engine.gc(out, apply=True).garbage
        assert engine.gc(out).strange == []


def test_all_that_was_paid_is_told_of_an_output_without_a_shard(output):
    """All inputs were deleted, and all that they left."""
    for name in output.shards:
        (output.source / name).unlink()
    pq.write_table(pa.table({"id": [1], "text": ["new"]}), output.source / "new.parquet")
    with later():
        engine.gc(output.out, apply=True, inputs_gone=True)
    assert engine.status(output.out).num_shards == 0
    assert cost(output.out) == pytest.approx(ALL)


def test_a_gc_that_dies_at_any_deletion_neither_forgets_nor_doubles_a_cost(output, monkeypatch):
    """What is deleted has been written down; what is written down and still there is counted once."""
    (output.source / "a.parquet").unlink()
    delete = LocalStorage.delete
    for attempt in itertools.count():
        calls = itertools.count()

        def dying(storage, name, calls=calls, num_done=attempt % 2):
            if not name.startswith("_engine/lease") and next(calls) == num_done:
                raise InterruptedError
            delete(storage, name)

        monkeypatch.setattr(LocalStorage, "delete", dying)
        try:
            with later():
                engine.gc(output.out, apply=True)
        except InterruptedError:
            assert cost(output.out) == pytest.approx(ALL)
        else:
            break
    assert attempt > 4
    assert cost(output.out) == pytest.approx(ALL)
    assert engine.status(output.out).num_shards == 4


@pytest.mark.parametrize("damaged", [part_name, record_name])
def test_a_shard_that_was_set_aside_and_made_again_has_cost_both(output, damaged):
    """Whichever of part and record is damaged, the other tells what the first one had cost."""
    shard = output.shards["a.parquet"][1]
    path = output.out / damaged(shard.id)
    path.write_bytes(path.read_bytes()[:-9] + b"\0" * 9)
    assert engine.verify(output.out, "full", set_aside=True).set_aside
    assert cost(output.out) == pytest.approx(ALL)
    again(output, shard)
    assert cost(output.out) == pytest.approx(ALL + 0.24)
    output.check()
    with later():
        assert {garbage.kind for garbage in engine.gc(output.out, apply=True).garbage} == {"set-aside"}
    assert cost(output.out) == pytest.approx(ALL + 0.24)


def test_a_shard_whose_part_is_lost_has_cost_what_it_cost(output):
    """A run forgets its record, and makes it again."""
    shard = output.shards["a.parquet"][0]
    (output.out / part_name(shard.id)).unlink()
    survey(output.config).ledger.forget(shard.id)
    assert cost(output.out) == pytest.approx(ALL)
    again(output, shard)
    assert cost(output.out) == pytest.approx(ALL + 0.24)


@pytest.mark.parametrize("num_done", range(3))
def test_one_that_dies_while_a_shard_is_set_aside_neither_forgets_nor_doubles_its_cost(output, num_done):
    """Before its record is moved, after that, or as its part is left and is taken up by the next run."""
    shard = output.shards["a.parquet"][0]
    rename, calls = LocalStorage.rename, itertools.count()

    def dying(storage, name, to):
        if next(calls) == num_done:
            raise InterruptedError
        return rename(storage, name, to)

    asked = survey(output.config)
    with patch.object(LocalStorage, "rename", dying), pytest.raises(InterruptedError):
        asked.ledger.set_aside(shard.id)
    assert cost(output.out) == pytest.approx(ALL)
    asked.ledger.adopt(shard, asked.job.fingerprint)
    assert cost(output.out) == pytest.approx(ALL)


def die_before_the_record(output: Output, name: str) -> None:
    """Write an input of one shard, and let a run die between its part, of 24 cents, and its record."""
    write(output, name, "first")
    (shard,) = survey(output.config).standing.plan.pending
    with patch.object(Ledger, "_record", side_effect=InterruptedError), pytest.raises(InterruptedError):
        again(output, shard)


def write(output: Output, name: str, word: str) -> None:
    pq.write_table(pa.table({"id": range(20), "text": [f"{word} {row}" for row in range(20)]}), output.source / name)


def test_a_part_without_a_record_whose_input_changes_has_cost_what_it_cost(output):
    """It is switched out, and counted once also if the run dies that writes the switch."""
    die_before_the_record(output, "new.parquet")
    write(output, "new.parquet", "second, longer")
    (shard,) = survey(output.config).standing.plan.pending
    again(output, shard)
    create = LocalStorage.create

    def dying(storage, name, data):
        if name.startswith(SWITCHES):
            raise InterruptedError
        return create(storage, name, data)

    with patch.object(LocalStorage, "create", dying), pytest.raises(InterruptedError):
        switching.switch_all(survey(output.config), lambda: None)
    assert cost(output.out) == pytest.approx(ALL + 2 * 0.24)
    assert switching.switch_all(survey(output.config), lambda: None) == 1
    assert cost(output.out) == pytest.approx(ALL + 2 * 0.24)
    output.check()


@pytest.mark.parametrize(("name", "kind"), [("new.parquet", "unnamed"), ("a.parquet", "held")])
def test_a_part_without_a_record_that_gc_deletes_has_cost_what_it_cost(output, name, kind):
    """Whether readers saw it, or it waited to take the place of others."""
    die_before_the_record(output, name)
    (output.source / name).unlink()
    with later():
        assert kind in {garbage.kind for garbage in engine.gc(output.out, apply=True).garbage}
    assert cost(output.out) == pytest.approx(ALL + 0.24)
    output.check()


def test_free_parts_without_a_record_are_not_read_whole_to_be_deleted(tmp_path, monkeypatch):
    """There may be very many, and their footers say that they were free."""
    output = Output(tmp_path)
    for shard in output.shards["a.parquet"]:
        (output.out / record_name(shard.id)).unlink()
    (output.source / "a.parquet").unlink()
    monkeypatch.setattr(Records, "part", None)
    with later():
        assert "unnamed" in {garbage.kind for garbage in engine.gc(output.out, apply=True).garbage}


def test_what_another_run_has_superseded_before_it_was_committed_has_cost_all_the_same(output):
    """It is taken out again, and no switch says what it had cost."""
    asked = survey(output.config)
    shard = output.shards["a.parquet"][0]
    asked.ledger.set_aside(shard.id)
    ledger = asked.ledger.looked_at(0, ())
    switch = Switch(1, frozenset(), frozenset(), {shard.file.path: (shard.file.size, "another")}, None, utc_now())
    assert ledger.storage.create(switch.name(), switch.to_bytes())
    assert ledger.storage.create(switch.done_name(), b"")
    with pytest.raises(SourceChanged):
        ledger.publish(
            make_table(shard),
            shard=shard,
            fingerprint=asked.job.fingerprint,
            rejects=make_rejects(shard),
            usage=replace(PAID, cost=0.24),
        )
    assert not ledger.is_committed(shard.id)
    assert cost(output.out) == pytest.approx(ALL + 0.24)


def test_costs_that_cannot_be_read_are_named_and_not_taken_for_none(output):
    """A sum that is too low would spend more than is allowed."""
    survey(output.config).ledger.set_aside(output.shards["a.parquet"][0].id)
    (path,) = (output.out / COSTS).iterdir()
    path.write_text("[]")
    with pytest.raises(CorruptOutput, match=rf"{COSTS}/{path.name} cannot be read .*max-cost"):
        engine.status(output.out)


def test_an_output_that_cost_nothing_keeps_no_costs(tmp_path):
    """Local models."""
    output = Output(tmp_path)
    survey(output.config).ledger.set_aside(output.shards["a.parquet"][0].id)
    assert not list(open_storage(str(output.out)).names(COSTS))
