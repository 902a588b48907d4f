"""The ledger: a commit that ends anywhere ends well, and no two answers stand side by side."""

from __future__ import annotations

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.commits import Receipt, Usage
from engine.errors import CommitConflict, CorruptOutput, EngineError, FingerprintMismatch, Refused
from engine.ledger import (
    COMMITS,
    DATA,
    JOB,
    REJECTS,
    SET_ASIDE,
    VECTORS,
    Job,
    Ledger,
    part_name,
    record_name,
    rejects_name,
)
from engine.part import encode
from engine.storage import LocalStorage
from tests.builders import (
    FINGERPRINT,
    USAGE,
    Started,
    files,
    killed_at_each_call,
    make_job,
    make_rejects,
    make_shard,
    make_table,
    publish,
    staged,
)

SHARD = make_shard()
PART, RECORD, REJECTED = part_name(SHARD.id), record_name(SHARD.id), rejects_name(SHARD.id)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def ledger(out) -> Ledger:
    return Ledger(LocalStorage(str(out)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """All files of one published shard."""
    folder = tmp_path_factory.mktemp("undisturbed")
    publish(folder)
    return files(folder)


def without_set_aside(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(out).items() if not name.startswith(SET_ASIDE)}


def write(out: Path, name: str, data: bytes) -> None:
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << position % 8
    return bytes(changed)


# Publishing


def test_a_published_shard_is_committed(out, ledger, undisturbed):
    """A part, its rejects and its record, and the dimension of all; the receipt says what the record says."""
    receipt = publish(out)
    assert files(out).keys() == {PART, RECORD, REJECTED, "_engine/vectors.json"}
    assert (receipt.outcome, receipt.num_rows, receipt.num_rejects, receipt.num_tokens) == ("committed", 8, 2, 40)
    assert ledger.committed() == ledger.part_ids() == {SHARD.id}
    assert ledger.parts() == {SHARD.id: len(undisturbed[PART])}
    assert [record.shard_id for record in ledger.records()] == [SHARD.id]
    assert ledger.part(SHARD.id).table.equals(make_table(SHARD))
    lines = [json.loads(line) for line in (out / REJECTED).read_text().splitlines()]
    assert lines == [{"source_row": row, "id": f"id-{row}", "reason": "null"} for row in (3, 7)]


def test_equal_work_is_equal_bytes(out, undisturbed):
    """Nothing in an output depends on when or where it was written."""
    publish(out)
    assert files(out) == undisturbed


def test_a_shard_without_rejects_has_no_rejects_file(out, ledger):
    """Nothing is written to say that there is nothing."""
    ledger.publish(make_table(SHARD, without=()), shard=SHARD, fingerprint=FINGERPRINT, rejects=[], usage=USAGE)
    assert not (out / REJECTS).exists()


def test_publishing_again_changes_nothing(out, undisturbed):
    """A replay that took another time to compute gets the receipt of the first."""
    first = publish(out)
    again = publish(out, usage=Usage(num_tokens=40, embed_s=99.0, device="cuda"))
    assert (again.outcome, again.embed_s, again.device) == ("present", first.embed_s, first.device)
    assert files(out) == undisturbed


def publish_timed(out: str, writer: int):
    return publish(out, usage=Usage(embed_s=float(writer)))


def check_one_won(out: Path, receipts: list) -> None:
    assert sorted(receipt.outcome for receipt in receipts) == ["committed"] + ["present"] * (len(receipts) - 1)
    winner = next(receipt for receipt in receipts if receipt.outcome == "committed")
    assert {receipt.embed_s for receipt in receipts} == {winner.embed_s}
    assert Ledger(LocalStorage(str(out))).record(SHARD.id).usage.embed_s == winner.embed_s
    assert files(out).keys() == {PART, RECORD, REJECTED, "_engine/vectors.json"}


def test_threads_that_publish_at_once_agree(out):
    """One commits, and all report its record."""
    with ThreadPoolExecutor(8) as pool:
        check_one_won(out, list(pool.map(lambda writer: publish_timed(str(out), writer), range(8))))


def test_processes_that_publish_at_once_agree(out):
    """One commits, and all report its record."""
    started = [Started(publish_timed, str(out), writer) for writer in range(4)]
    check_one_won(out, [process.result() for process in started])


@pytest.mark.parametrize("problem", ["order", "missing row", "zero", "dimensionless"])
def test_a_table_that_no_part_may_have_is_refused_before_anything_is_written(out, ledger, problem):
    """The checks of a part come first: not even a folder is made."""
    table = make_table(SHARD)
    table = {
        "order": table.take([*range(4, 8), *range(4)]),
        "missing row": table.slice(1),
        "zero": make_table(SHARD).drop_columns("embedding"),
        "dimensionless": table.drop_columns("_source_row"),
    }[problem]
    with pytest.raises(CorruptOutput):
        ledger.publish(table, shard=SHARD, fingerprint=FINGERPRINT, rejects=make_rejects(SHARD), usage=USAGE)
    assert not out.exists()


def test_the_first_commit_decides_the_dimension_of_all(out):
    """Vectors of another dimension are refused, and the message says which is which."""
    publish(out)
    before = files(out)
    with pytest.raises(FingerprintMismatch, match="dimension: 4 in the output, 8 asked for"):
        publish(out, make_shard(path="b.parquet"), dimension=8)
    assert files(out) == before


# Death at every step


@pytest.mark.parametrize(
    ("found", "when", "num_steps"),
    [("nothing", "before", 40), ("nothing", "after", 40), ("part", "before", 30), ("damaged part", "before", 50)],
)
def test_a_publisher_killed_at_any_step_leaves_what_the_next_one_finishes(
    tmp_path, undisturbed, found, when, num_steps
):
    """SIGKILL at every call to the system: no name is half, and publishing again gives the undisturbed bytes."""
    damaged = {PART: undisturbed[PART][:-9]} if found == "damaged part" else {}
    (tmp_path / "start").mkdir()
    if found != "nothing":
        write(tmp_path / "start", PART, damaged.get(PART, undisturbed[PART]))
    outs = killed_at_each_call(tmp_path / "outs", publish, start=tmp_path / "start", when=when)
    assert len(outs) > num_steps
    for out in outs:
        left = without_set_aside(out)
        assert left.items() <= undisturbed.items() | damaged.items()
        assert RECORD not in left or left[PART] == undisturbed[PART]
        publish(out)
        assert without_set_aside(out) == undisturbed
    assert staged(outs[-1]) == []


def adopt(out: str) -> Receipt:
    return Ledger(LocalStorage(out)).adopt(SHARD, FINGERPRINT)


def test_an_adoption_killed_at_any_step_is_finished_by_the_next(tmp_path, undisturbed):
    """A part without a record, and a resuming driver that dies too."""
    write(tmp_path / "start", PART, undisturbed[PART])
    outs = killed_at_each_call(tmp_path / "outs", adopt, start=tmp_path / "start")
    assert len(outs) > 20
    for out in outs:
        assert files(out).items() <= undisturbed.items()
        assert adopt(str(out)).outcome == "adopted"
        assert files(out) == undisturbed


def set_aside(out: str) -> None:
    Ledger(LocalStorage(out)).set_aside(SHARD.id)


def test_a_setting_aside_killed_at_any_step_leaves_a_shard_that_can_be_published(tmp_path, undisturbed):
    """The record goes first, so that a shard is never committed without its part."""
    publish(tmp_path / "start")
    outs = killed_at_each_call(tmp_path / "outs", set_aside, start=tmp_path / "start")
    assert len(outs) > 5
    for out in outs:
        left = without_set_aside(out)
        assert RECORD not in left or PART in left
        publish(out)
        assert without_set_aside(out) == undisturbed


# Damage


@pytest.mark.parametrize("length", [0, 1, 100, -1, -8, -100])
def test_a_truncated_part_without_a_record_is_set_aside_and_made_again(out, ledger, undisturbed, length):
    """Zero bytes included: what is there is refused for adoption, and kept beside the new part."""
    damaged = undisturbed[PART][:length]
    write(out, PART, damaged)
    with pytest.raises(CorruptOutput, match="cannot be read back"):
        ledger.adopt(SHARD, FINGERPRINT)
    assert publish(out).outcome == "committed"
    assert without_set_aside(out) == undisturbed
    assert damaged in [data for name, data in files(out).items() if name.startswith(SET_ASIDE)]


def test_a_damaged_part_with_a_record_is_an_error_wherever_the_bit_is(out, ledger, undisturbed):
    """Publishing over it says so, and changes nothing: to set aside what was committed is for a person to ask."""
    publish(out)
    for position in range(0, len(undisturbed[PART]), 43):
        (out / PART).write_bytes(flipped(undisturbed[PART], position))
        before = files(out)
        for attempt in (lambda: publish(out), lambda: ledger.adopt(SHARD, FINGERPRINT)):
            with pytest.raises(CorruptOutput, match=SHARD.id):
                attempt()
        assert files(out) == before


def test_a_part_without_a_record_is_adopted(out, ledger, undisturbed):
    """The record and the rejects are made from the part's own bytes."""
    write(out, PART, undisturbed[PART])
    receipt = ledger.adopt(SHARD, FINGERPRINT)
    assert (receipt.outcome, receipt.num_rows, receipt.num_rejects) == ("adopted", 8, 2)
    assert files(out) == undisturbed


@pytest.mark.parametrize("lost", [RECORD, REJECTED, PART])
def test_a_lost_file_is_made_again_by_publishing(out, undisturbed, lost):
    """The others stay as they are."""
    publish(out)
    (out / lost).unlink()
    publish(out)
    assert files(out) == undisturbed


def test_a_missing_part_or_record_is_said_to_be_missing(out, ledger):
    """Asking for what is not there is an error of the output, not of Python."""
    for ask in (ledger.part, ledger.record, lambda _: ledger.adopt(SHARD, FINGERPRINT)):
        with pytest.raises(CorruptOutput, match="is missing"):
            ask(SHARD.id)
    assert not ledger.is_committed(SHARD.id)


@pytest.mark.parametrize("name", [RECORD, REJECTED])
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b'"', b' "', 1),
        lambda data: data.rstrip(b"\n"),
        lambda data: data.replace(b"null", b"nil"),
        lambda data: flipped(data, 20),
        lambda data: b"",
    ],
)
def test_a_record_that_differs_in_a_byte_is_a_conflict(out, ledger, name, change):
    """Other content or the same in another form: both files are named, and neither is touched."""
    publish(out)
    write(out, name, change((out / name).read_bytes()))
    before = files(out)
    for attempt in (lambda: publish(out), lambda: ledger.adopt(SHARD, FINGERPRINT)):
        with pytest.raises(CommitConflict) as caught:
            attempt()
        assert name in caught.value.message
        assert PART in caught.value.message
    assert files(out) == before


@pytest.mark.parametrize(
    ("shard", "fingerprint"),
    [
        (make_shard(path="b.parquet"), FINGERPRINT),
        (make_shard(start=10), FINGERPRINT),
        (SHARD, "e" * 32),
    ],
)
def test_a_part_of_another_shard_or_job_is_not_adopted(out, ledger, undisturbed, shard, fingerprint):
    """A file under the wrong name is damage like any other: refused, and set aside by the publisher."""
    rejects = make_rejects(shard, (shard.start + 3, shard.start + 7))
    table = make_table(shard, without=[reject.source_row for reject in rejects])
    foreign = encode(table, shard=shard, fingerprint=fingerprint, rejects=rejects, usage=USAGE)
    write(out, PART, foreign)
    with pytest.raises(CorruptOutput, match="of another shard or job"):
        ledger.adopt(SHARD, FINGERPRINT)
    assert RECORD not in files(out)
    publish(out)
    assert without_set_aside(out) == undisturbed


def test_what_is_set_aside_is_kept_and_pending(out, ledger, undisturbed):
    """All three files lie under names that no reader takes for a part, and the shard can be made again."""
    publish(out)
    ledger.set_aside(SHARD.id)
    aside = {name: data for name, data in files(out).items() if name.startswith(SET_ASIDE)}
    assert sorted(aside.values()) == sorted(undisturbed[name] for name in (PART, RECORD, REJECTED))
    assert all(name.endswith(".bad") for name in aside)
    assert ledger.committed() == ledger.part_ids() == set()
    publish(out)
    assert without_set_aside(out) == undisturbed


def test_a_thousand_records_are_listed_and_read(out, ledger):
    """Listing opens no file; reading yields each record once, in order of id, or those that were asked for."""
    publish(out)
    template = (out / RECORD).read_text()
    ids = {f"{number:032x}" for number in range(1500)}
    for shard_id in ids:
        write(out, record_name(shard_id), template.replace(SHARD.id, shard_id).encode())
    assert ledger.committed() == ids | {SHARD.id}
    assert [record.shard_id for record in ledger.records()] == sorted(ids | {SHARD.id})
    assert [record.shard_id for record in ledger.records(["0" * 32])] == ["0" * 32]


# Claims


def test_the_first_claim_makes_the_job_and_later_ones_get_it(ledger):
    """What a second driver brings of its own, such as the time, gives way to what is stored."""
    first = ledger.claim(make_job("first"))
    assert ledger.claim(make_job("second")) == first == ledger.job()


def claim(out: str, created_at: str) -> Job:
    return Ledger(LocalStorage(out)).claim(make_job(created_at))


def test_drivers_that_claim_at_once_agree(tmp_path):
    """Processes with one job each: all get the same, which is stored."""
    for number in range(5):
        out = str(tmp_path / str(number))
        started = [Started(claim, out, str(driver)) for driver in range(4)]
        jobs = [process.result() for process in started]
        assert jobs == [Ledger(LocalStorage(out)).job()] * 4


def claim_first(out: str) -> Job:
    return claim(out, "first")


def test_a_claim_killed_at_any_step_can_be_made_again(tmp_path):
    """job.json is whole or not there."""
    outs = killed_at_each_call(tmp_path / "outs", claim_first)
    assert len(outs) > 5
    for out in outs:
        stored = Ledger(LocalStorage(str(out))).job()
        assert claim(str(out), "second").created_at == ("first" if stored else "second")


def test_a_claim_of_another_job_names_each_field_that_differs(out, ledger):
    """Model, prompt and normalisation, with both values; what is equal is not named, and nothing is touched."""
    ledger.claim(make_job())
    before = files(out)
    with pytest.raises(FingerprintMismatch) as caught:
        ledger.claim(make_job(prompt="query: ", normalize=True, model="custom:a.B"))
    assert 'prompt: null in the output, "query: " asked for' in caught.value.message
    assert "normalize: false in the output, true asked for" in caught.value.message
    assert '"custom:a.B" asked for' in caught.value.message
    assert "dtype" not in caught.value.message
    assert files(out) == before


def test_a_field_that_one_job_lacks_is_named_too(ledger):
    """A newer engine may decide by more."""
    job = make_job()
    ledger.claim(job)
    more = {"fingerprint": "0" * 32, "decided_by": job.decided_by | {"pooling": "mean"}}
    with pytest.raises(FingerprintMismatch, match='pooling: null in the output, "mean" asked for'):
        ledger.check(job, **more)


def test_a_folder_with_files_of_others_is_not_claimed(out, ledger):
    """Parts that no engine recorded would be read together with ours."""
    write(out, f"{DATA}/theirs.parquet", b"x")
    with pytest.raises(Refused, match=r"job\.json is missing"):
        ledger.claim(make_job())
    assert files(out) == {f"{DATA}/theirs.parquet": b"x"}


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff", b'{"fingerprint":1}'])
def test_a_job_that_cannot_be_read_is_corrupt(out, ledger, data):
    """It is not taken for a new output, and not overwritten."""
    write(out, JOB, data)
    with pytest.raises(CorruptOutput, match=r"job\.json cannot be read"):
        ledger.claim(make_job())
    assert files(out) == {JOB: data}


def test_records_and_parts_of_other_names_are_not_counted(out, ledger):
    """What a person puts beside them is not the ledger's."""
    write(out, f"{COMMITS}/notes.txt", b"")
    write(out, f"{DATA}/README", b"")
    assert ledger.committed() == ledger.part_ids() == set()
    assert ledger.parts() == {}


@pytest.mark.parametrize("data", [b"", b"{}", b"[]"])
def test_a_damaged_dimension_is_a_message(tmp_path, data):
    """It says which file, and what to do with it."""
    publish(tmp_path)
    (tmp_path / VECTORS).write_bytes(data)
    with pytest.raises(Refused, match=r"vectors\.json"):
        publish(tmp_path)


def look_as_nobody(out: str, elsewhere: str) -> list[str]:
    publish(elsewhere)
    ledger = Ledger(LocalStorage(elsewhere))
    list(ledger.records())
    os.setuid(65534)
    said = []
    for ask in (
        lambda: LocalStorage(out).create("data/a", b""),
        lambda: LocalStorage(out).read("data/a"),
        lambda: list(LocalStorage(out).names("data")),
        lambda: Ledger(LocalStorage(out)).job(),
    ):
        try:
            ask()
        except EngineError as error:
            said.append(error.message)
    return said


def test_a_folder_that_may_not_be_looked_into_is_a_message(tmp_path):
    """Reading, listing and writing all say that permission is denied."""
    with tempfile.TemporaryDirectory() as folder:  # 0700, and of root
        said = Started(look_as_nobody, f"{folder}/out", str(tmp_path)).result()
    assert ["permission denied" in message for message in said] == [True] * 4


def test_a_custom_model_with_another_slug_is_refused(tmp_path):
    """Its class and arguments are the same, and it says itself that it is another."""
    publish(tmp_path, usage=Usage(slug="mine-1", created_at="now"))
    with pytest.raises(FingerprintMismatch, match='slug: "mine-1" in the output, "mine-2" asked for'):
        publish(tmp_path, make_shard(path="b.parquet"), usage=Usage(slug="mine-2", created_at="now"))


def test_a_part_that_is_there_after_all_is_not_forgotten(tmp_path):
    """Another driver has made it again since it was missed: its record and its rejects stay."""
    publish(tmp_path)
    before = files(tmp_path)
    ledger, shard_id = Ledger(LocalStorage(str(tmp_path))), make_shard().id
    ledger.forget(shard_id)
    assert files(tmp_path) == before
    (tmp_path / part_name(shard_id)).unlink()
    ledger.forget(shard_id)
    assert not (tmp_path / record_name(shard_id)).exists()
    assert not (tmp_path / rejects_name(shard_id)).exists()


def forget(out: str) -> None:
    Ledger(LocalStorage(out)).forget(SHARD.id)


@pytest.mark.parametrize("function", [forget, set_aside])
def test_rejects_of_a_lost_part_are_never_left_without_its_record(tmp_path, function):
    """Whoever dies at any call: the shard may have other rejects when it is made again, and those would be in their way."""
    start, shard = tmp_path / "start", make_shard()
    publish(start)
    (start / part_name(shard.id)).unlink()
    outs = killed_at_each_call(tmp_path / "outs", function, start=start)
    left = [((out / rejects_name(shard.id)).exists(), (out / record_name(shard.id)).exists()) for out in outs]
    assert set(left) == {(True, True), (False, True), (False, False)}
    for out in outs:
        function(str(out))
        publish(out, usage=Usage(slug=USAGE.slug, created_at="later"))
