"""Verification: every kind of damage is found, named with what to do, and mended by set-aside and a new run's publish."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine.commits import Usage
from engine.config import JobConfig, load_config
from engine.errors import ConfigError, CorruptOutput, EngineError, Refused, SourceChanged
from engine.ledger import REJECTS, Ledger, part_name, record_name, rejects_name
from engine.pipeline.publish import Commits
from engine.schema import EMBEDDING, SOURCE_ROW, TEXT_HASH, Reject, Shard, vectors_type
from engine.storage import LocalStorage
from engine.survey import Standing, survey
from tests.builders import fail_below, hashes_of
from tests.models import HashModel

LEVELS = ("quick", "footers", "full", "sample")


class Output:
    """An output of 100 rows in 5 shards, one row a reject, as a run leaves it, but made without Ray."""

    empty = (("b", 49), ("c", 0), ("c", 1))
    """File and row of texts that are rejects."""

    def __init__(self, folder: Path) -> None:
        self.source, self.out = folder / "in", folder / "out"
        self.source.mkdir()
        for name in ("a", "b"):
            texts = [f"{name} {row}" for row in range(50)]
            if name == "b":
                texts[49] = ""
            pq.write_table(pa.table({"id": range(50), "text": texts}), self.source / f"{name}.parquet")
        self.config: JobConfig = load_config(
            source=str(self.source),
            output=str(self.out),
            model="custom:tests.models.HashModel",
            id_column="id",
            shard_rows=20,
        )
        self.make()

    def make(self) -> int:
        """Publish what is pending, as a run does; return how many shards that were."""
        asked = survey(self.config)
        asked.ledger.claim(asked.job)
        for shard_id in asked.standing.missing:
            asked.ledger.set_aside(shard_id)
        for shard in asked.standing.plan.pending:
            self.publish(shard)
        return len(asked.standing.plan.pending)

    def publish(self, shard: Shard, *, noise: float = 0.0) -> None:
        """Publish a shard with the model's vectors, or such as are not."""
        asked = survey(self.config)
        name = shard.file.path[0]
        rejects = [
            Reject(row, row, "empty text") for row in range(shard.start, shard.stop) if (name, row) in self.empty
        ]
        rows = [row for row in range(shard.start, shard.stop) if (name, row) not in self.empty]
        vectors = np.zeros((0, 8)) if not rows else asyncio.run(HashModel().embed([f"{name} {row}" for row in rows]))
        vectors = (vectors + noise * np.random.default_rng(0).normal(size=vectors.shape)).astype(np.float32)
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=vectors_type(8))
        hashes = hashes_of(rows)
        table = pa.table({"id": rows, EMBEDDING: embedding, TEXT_HASH: hashes, SOURCE_ROW: pa.array(rows, pa.int64())})
        usage = Usage(created_at="now")
        asked.ledger.publish(table, shard=shard, fingerprint=asked.job.fingerprint, rejects=rejects, usage=usage)

    def parts(self) -> list[Path]:
        return sorted((self.out / "data").iterdir())

    def first_id(self) -> str:
        return self.parts()[0].stem.removeprefix("part-")

    def id_with_rejects(self) -> str:
        return next((self.out / REJECTS).iterdir()).stem


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[400] ^= 1  # in a page: the footer is at the end
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def other_footer(output: Output) -> None:
    """The part of another job, of the same length: its record is made to fit in all that a listing can see."""
    shard_id = output.first_id()
    record = output.out / record_name(shard_id)
    fields = json.loads(record.read_text())
    record.write_text(json.dumps(fields | {"num_rows": fields["num_rows"] - 1, "num_rejects": 1}))
    (output.out / REJECTS).mkdir(exist_ok=True)
    (output.out / rejects_name(shard_id)).write_text("{}\n")


DAMAGES: dict[str, tuple[str, Callable[[Output], object]]] = {
    "a part is gone": ("quick", lambda o: o.parts()[0].unlink()),
    "a part is empty": ("quick", lambda o: o.parts()[0].write_bytes(b"")),
    "a part is truncated": ("quick", lambda o: truncate(o.parts()[0])),
    "a record is empty": ("quick", lambda o: (o.out / record_name(o.first_id())).write_bytes(b"")),
    "a record is another's": (
        "quick",
        lambda o: shutil.copy(o.out / record_name(o.parts()[1].stem[5:]), o.out / record_name(o.first_id())),
    ),
    "rejects are gone": ("quick", lambda o: (o.out / rejects_name(o.id_with_rejects())).unlink()),
    "a footer says something else": ("footers", other_footer),
    "a bit is flipped": ("full", lambda o: flip(o.parts()[0])),
    "rejects were edited": ("full", lambda o: (o.out / rejects_name(o.id_with_rejects())).write_text("{}\n")),
}


def test_a_good_output_is_good_at_every_level(output):
    """And all rows were looked at."""
    for level in LEVELS:
        verdict = engine.verify(output.out, level)
        assert verdict.ok, verdict.findings
        assert (verdict.num_rows, verdict.num_rejects, verdict.num_shards, verdict.pending_rows) == (99, 1, 6, 0)
    assert verdict.lowest_cosine == pytest.approx(1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_set_aside_and_made_again(output, damage):
    """From the level on that can see it; what was bad is kept aside, and the output ends as it was."""
    before = {path.name: path.read_bytes() for path in output.parts()}
    level, harm = DAMAGES[damage]
    harm(output)
    for blind in LEVELS[: LEVELS.index(level)]:
        assert engine.verify(output.out, blind).ok
    found = engine.verify(output.out, level, set_aside=True)
    assert not found.ok
    bad = found.findings[0]
    assert bad.shard_id in bad.problem
    assert "--set-aside" in bad.advice
    assert found.set_aside
    assert all((output.out / name).exists() for name in found.set_aside)
    assert output.make() == 1
    assert {path.name: path.read_bytes() for path in output.parts()} == before
    assert engine.verify(output.out, "full").ok


@pytest.mark.parametrize("level", ["FULL", "footer", ""])
def test_a_level_that_there_is_not_is_refused(output, level):
    """It was taken for the quick one, and what is damaged within parts was called good."""
    with pytest.raises(ConfigError, match=f"level '{level}': there are quick, footers, full, sample"):
        engine.verify(output.out, level)


def test_rows_that_are_left_are_a_finding_with_what_to_do(output):
    """A new file: the output is right and not whole."""
    pq.write_table(pa.table({"id": [1], "text": ["new"]}), output.source / "c.parquet")
    verdict = engine.verify(output.out)
    assert (verdict.ok, verdict.pending_rows) == (False, 1)
    assert verdict.findings[0].problem == "1 rows in 1 of 7 shards are not committed"
    assert "run the same command again" in verdict.findings[0].advice


def test_a_part_without_a_record_is_told_and_its_damage_found(output):
    """A run died between the two: no harm, unless the part is damaged as well."""
    (output.out / record_name(output.first_id())).unlink()
    told = engine.verify(output.out, "full")
    assert "1 parts have no record yet" in told.warnings[0]
    assert [finding.shard_id for finding in told.findings] == [""]
    flip(output.parts()[0])
    assert output.first_id() in [finding.shard_id for finding in engine.verify(output.out, "full").findings]


def test_vectors_that_the_model_does_not_give_are_found_by_a_sample(output):
    """Whole and sealed, and wrong: only embedding again tells."""
    shard_id = output.first_id()
    asked = survey(output.config)
    record = asked.ledger.record(shard_id)
    asked.ledger.set_aside(shard_id)
    (shard,) = [shard for shard in survey(output.config).standing.plan.pending if shard.id == shard_id]
    output.publish(shard, noise=0.5)
    assert asked.ledger.record(shard_id).checksum != record.checksum
    assert engine.verify(output.out, "full").ok
    verdict = engine.verify(output.out, "sample")
    assert [finding.shard_id for finding in verdict.findings] == [shard_id]
    assert verdict.lowest_cosine is not None
    assert verdict.lowest_cosine < 0.99


def test_a_sample_takes_no_shard_that_has_only_rejects(output):
    """It has no vectors, and is as good as any; with nothing else to look at, that is said."""
    pq.write_table(pa.table({"id": [0, 1], "text": ["", ""]}), output.source / "c.parquet")
    output.make()
    verdict = engine.verify(output.out, "sample", set_aside=True)
    assert (verdict.ok, verdict.num_rejects, verdict.set_aside) == (True, 3, [])
    assert verdict.lowest_cosine == pytest.approx(1)
    for name in ("a", "b"):
        (output.source / f"{name}.parquet").unlink()
    verdict = engine.verify(output.out, "sample")
    assert (verdict.ok, verdict.lowest_cosine) == (True, None)
    assert any("no row could be embedded again" in warning for warning in verdict.warnings)


def test_a_sample_that_is_taken_again_is_the_same(output, monkeypatch):
    """So the command that the advice names sets aside what was found, and not what another sample finds."""
    asked = survey(output.config)
    for path in output.parts():
        asked.ledger.set_aside(path.stem.removeprefix("part-"))
    for shard in survey(output.config).standing.plan.pending:
        output.publish(shard, noise=0.5)
    monkeypatch.setattr("engine.spot_check.SAMPLED_SHARDS", 3)
    found = engine.verify(output.out, "sample", sample_rows=6).findings
    assert "--level sample --sample-rows 6 --set-aside" in found[0].advice
    again = engine.verify(output.out, "sample", sample_rows=6, set_aside=True)
    assert (len(found), again.findings) == (3, found)
    assert all(any(finding.shard_id in name for name in again.set_aside) for finding in found)


def test_a_sample_of_no_rows_is_refused(output):
    """It would look at nothing, and call it good or bad."""
    with pytest.raises(ConfigError, match="sample_rows 0: at least 1"):
        engine.verify(output.out, "sample", sample_rows=0)


def test_what_cannot_be_made_again_is_not_moved(output):
    """The input is gone: a damaged part stays where it is, and the advice is another."""
    flip(next(path for path in output.parts() if b'"path":"a.parquet"' in path.read_bytes()))
    (output.source / "a.parquet").unlink()
    verdict = engine.verify(output.out, "full", set_aside=True)
    assert not verdict.ok
    assert "restore the part from a copy" in verdict.findings[0].advice
    assert verdict.set_aside == []
    assert len(output.parts()) == 6


@pytest.mark.parametrize("level", ["quick", "sample"])
def test_what_can_be_made_again_is_found_out_once_and_not_for_each_part(output, monkeypatch, level):
    """Of changed inputs and of those that are gone: of many thousand parts, that for each of them would take hours."""
    os.utime(output.source / "a.parquet", ns=(1, 1))
    looks = 0
    of_standing = vars(Standing)["former"]

    class Spied:
        def __get__(self, standing, _):
            nonlocal looks
            looks += 1
            return of_standing.__get__(standing)

        def __set__(self, standing, former):
            of_standing.__set__(standing, former)

    monkeypatch.setattr(Standing, "former", Spied())
    engine.verify(output.out, level)
    of_none, looks = looks, 0
    for path in output.parts():
        truncate(path)
    verdict = engine.verify(output.out, level, set_aside=True)
    assert len(verdict.set_aside) >= 6
    assert looks == of_none


def test_a_source_out_of_reach_is_a_warning_and_the_rest_is_checked(output):
    """On another machine, say: what is there is verified, what is left cannot be told."""
    shutil.rmtree(output.source)
    verdict = engine.verify(output.out, "full")
    assert (verdict.ok, verdict.pending_rows, verdict.num_rows) == (True, None, 99)
    assert "what is left to do cannot be told" in verdict.warnings[0]
    status = engine.status(output.out)
    assert (status.pending_rows, status.num_rows) == (None, 99)


def test_a_source_that_may_not_be_looked_at_is_a_warning_too(output, monkeypatch):
    """Who may read an output need not be let to its source."""
    fail_below(output.source.parent / "in", monkeypatch)
    for warnings in (
        engine.verify(output.out).warnings,
        engine.status(output.out).warnings,
        engine.gc(output.out).warnings,
    ):
        assert "Permission denied" in warnings[0]


class Stale(io.BytesIO):
    """A file that can be opened, and not be read."""

    def read(self, *_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    readinto = read


@pytest.mark.parametrize("when", ["opened", "read"])
def test_parts_that_the_disk_does_not_give_are_not_damaged(output, monkeypatch, when):
    """They would be moved away, and a provider be paid again, for a disk that is out of reach for a moment."""
    if when == "opened":
        fail_below(output.out / "data", monkeypatch, errno.ESTALE, [(io, "open")])
    else:
        monkeypatch.setattr(LocalStorage, "open", lambda *_: Stale(output.parts()[0].read_bytes()))
    for look in (lambda: engine.verify(output.out, "footers", set_aside=True), lambda: engine.read(output.out)):
        with pytest.raises(EngineError, match=r"cannot read .*/out \(Stale file handle\): check the disk"):
            look()
    assert len(output.parts()) == 6


def test_a_command_in_an_advice_can_be_pasted(tmp_path):
    """Also where the output's path has a space in it."""
    (tmp_path / "my texts").mkdir()
    output = Output(tmp_path / "my texts")
    output.parts()[0].unlink()
    pasted = f"`engine verify '{output.out}' --"
    assert pasted in engine.verify(output.out).findings[0].advice
    with pytest.raises(CorruptOutput, match=re.escape(pasted)):
        engine.read(output.out)


def test_rows_in_two_parts_are_found(output):
    """A file was swapped under the same name, and both its versions were forced in: quick sees rows twice."""
    shard_id = output.first_id()
    record = json.loads((output.out / record_name(shard_id)).read_text())
    twin = "f" * 32
    (output.out / record_name(twin)).write_text(json.dumps(record | {"shard_id": twin, "version": "1"}))
    shutil.copy(output.out / part_name(shard_id), output.out / part_name(twin))
    problems = [finding.problem for finding in engine.verify(output.out).findings]
    assert any("are in two parts" in problem for problem in problems)


def test_rejects_that_should_not_be_there_are_found(output):
    """A row would be embedded and rejected both."""
    shard_id = next(path.stem[5:] for path in output.parts() if path.stem[5:] != output.id_with_rejects())
    (output.out / rejects_name(shard_id)).write_text("{}\n")
    (finding,) = engine.verify(output.out).findings
    assert "should not be there" in finding.problem


def test_an_input_that_changed_is_left_to_do(output):
    """The output is what it was, and no longer of its source: its new rows are missing."""
    os.utime(output.source / "a.parquet", ns=(1, 1))
    verdict = engine.verify(output.out)
    assert not verdict.ok
    assert "are not committed" in verdict.findings[0].problem
    assert "1 input changed since rows of it were committed" in verdict.warnings[0]


def test_an_input_under_another_name_is_refused(output):
    """Its rows would be embedded a second time."""
    (output.source / "a.parquet").rename(output.source / "z.parquet")
    with pytest.raises(SourceChanged, match=r"looks like a\.parquet under another name"):
        survey(output.config)


def test_a_source_from_another_folder_is_refused_before_the_first_commit_too(tmp_path):
    """Nothing is committed yet, and a first driver may be about to."""
    (tmp_path / "in/deep").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in/deep/a.parquet")
    options = {"output": str(tmp_path / "out"), "model": "custom:tests.models.HashModel"}
    asked = survey(load_config(source=str(tmp_path / "in"), **options))
    asked.ledger.claim(asked.job)
    with pytest.raises(Refused, match="name the source as the first run did"):
        survey(load_config(source=str(tmp_path / "in/deep"), **options))


def test_a_commit_on_another_disk_is_refused(output, tmp_path):
    """The same path on a node that does not share it: the shard must not be committed where nobody looks."""
    asked = survey(output.config)
    elsewhere = Ledger(LocalStorage(str(tmp_path / "elsewhere")))
    with pytest.raises(Refused, match="a disk that all nodes of the cluster share"):
        Commits(elsewhere, asked.job).receipts([])
    assert not (tmp_path / "elsewhere").exists()
    elsewhere.claim(
        replace(asked.job, created_at="2020-01-01T00:00:00+00:00")
    )  # of the same model and settings, on that disk
    with pytest.raises(Refused, match="a disk that all nodes of the cluster share"):
        Commits(elsewhere, asked.job).receipts([])
    Commits(asked.ledger, asked.job).receipts([])


def test_a_resume_cuts_the_shards_of_the_first_run(tmp_path):
    """Whatever it would choose now: the size is the job's, and stored with it."""
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["a"] * 1000}), tmp_path / "in/a.parquet")
    config = load_config(
        source=str(tmp_path / "in"), output=str(tmp_path / "out"), model="custom:tests.models.HashModel"
    )
    first = survey(config)
    first.ledger.claim(first.job)
    pq.write_table(pa.table({"text": [str(row) * 5000 for row in range(1000)]}), tmp_path / "in/long.parquet")
    other = survey(config.model_copy(update={"output": str(tmp_path / "other")}))
    assert other.job.shard_rows != first.job.shard_rows
    assert survey(config).job.shard_rows == first.job.shard_rows


def test_ids_that_occur_more_than_once_are_told_and_are_no_problem(output):
    """Level full counts them over all parts, in whichever files they are."""
    assert not any("more than once" in warning for warning in engine.verify(output.out, "footers").warnings)
    verdict = engine.verify(output.out, "full")
    assert verdict.ok
    told = [warning for warning in verdict.warnings if "more than once" in warning]
    assert len(told) == 1  # both files have the ids 0 to 49, and one of them is a reject
    assert told[0].startswith("49 ids occur more than once, in 98 rows, such as row ")
