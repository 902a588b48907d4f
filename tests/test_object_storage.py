"""An output in an object store: one winner whatever the answers, bad hours of a store, and what a commit leaves behind."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from engine import lease
from engine.buckets import bucket
from engine.buckets.place import place_of
from engine.errors import ConfigError, EngineError, OutputInUse, Refused
from engine.lease import held
from engine.ledger import Ledger
from engine.object_storage import PROBES, ObjectStorage
from engine.reporting import story
from engine.storage import open_storage
from tests.builders import FINGERPRINT, USAGE, make_rejects, make_shard, make_table
from tests.object_stores import BUCKET, KEYS, keys

NUM_WRITERS = 16


@pytest.fixture
def storage(s3, tmp_path) -> ObjectStorage:
    return ObjectStorage(f"s3://{BUCKET}/{tmp_path.name}/out")


def objects(storage: ObjectStorage) -> dict[str, bytes]:
    """Return all that is stored, by name."""
    prefix = storage.root.partition(f"{BUCKET}/")[2] + "/"
    return {key.removeprefix(prefix): value.value for key, value in keys().items() if key.startswith(prefix)}


def publish(storage: ObjectStorage) -> str:
    shard = make_shard()
    ledger = Ledger(storage)
    receipt = ledger.publish(
        make_table(shard), shard=shard, fingerprint=FINGERPRINT, rejects=make_rejects(shard), usage=USAGE
    )
    return receipt.outcome


# Locations


def test_a_place_has_one_spelling():
    """Other names of a scheme, and slashes at the end, are the same place; Azure's long form keeps its account."""
    assert open_storage("s3a://b/out/").root == open_storage("S3://b/out").root == "s3://b/out"
    assert open_storage("s3://b").root == "s3://b"
    assert open_storage("gcs://b/a b/ü%20").root == "gs://b/a b/ü%20"
    abfs = "abfss://c@acct.dfs.core.windows.net/out"
    assert open_storage(abfs).root == abfs
    assert open_storage("azure://c/out").root == "az://c/out"


@pytest.mark.parametrize("location", ["s3://KEY:SECRET@b/out", "s3://KEY@b/out", "az://c/out?sv=1&sig=SECRET"])
def test_a_location_with_keys_in_it_is_refused_and_not_quoted(location):
    """It would go into records."""
    with pytest.raises(ConfigError, match="has keys in it") as caught:
        open_storage(location)
    assert not {"KEY", "SECRET"} & set(caught.value.message.replace(":", " ").replace("@", " ").split())
    assert "SECRET" not in caught.value.message


@pytest.mark.parametrize("location", ["s3://", "s3:///out", "s3://b/a//out", "s3://b/../out", "s3://b/./out"])
def test_what_is_no_place_in_a_bucket_is_refused(location):
    """Names that a store would take otherwise than it looks."""
    with pytest.raises(ConfigError, match="is not a place in a bucket"):
        place_of(location)


def test_it_pickles_as_a_location_without_keys(storage):
    """What travels to tasks has none of the environment."""
    storage.create("a", b"a")
    data = pickle.dumps(storage)
    assert not any(key.encode() in data for key in KEYS.values())
    assert pickle.loads(data).read("a") == b"a"


# One winner


@pytest.mark.parametrize("lost", [0, 20])
def test_of_writers_that_race_one_wins_whatever_answers_are_lost(storage, s3, lost):
    """Sixteen writers of the same bytes, ten names: one of them has won each, also where the store's yes was lost."""
    barrier = threading.Barrier(NUM_WRITERS)
    for number in range(lost):
        s3.fail("lost", "PUT", after=5 * number)

    def create(number: int) -> list[bool]:
        own = pickle.loads(pickle.dumps(storage))
        return [(barrier.wait(), own.create(f"data/{name}", b"same"))[1] for name in range(10)]

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        won = list(pool.map(create, range(NUM_WRITERS)))
    assert [sum(wins) for wins in zip(*won, strict=True)] == [1] * 10


def test_what_two_writers_of_one_name_are_told_when_both_are_turned_away(storage, s3):
    """409 says that others are at it, not that the name exists: it is asked again, and the answer is what is there."""
    s3.fail((409, "ConditionalRequestConflict"), "PUT", times=3)
    assert storage.create("a", b"first")
    s3.fail((409, "ConditionalRequestConflict"), "PUT", times=1)
    assert not storage.create("a", b"second")
    assert storage.read("a") == b"first"


# A store's bad hours


@pytest.mark.parametrize(
    "fault", ["lost", "unsent", (503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests")]
)
def test_everything_is_tried_again_while_a_store_fails(storage, s3, fault):
    """Each operation meets two failures, and comes out as without them."""
    for act, expected in (
        (lambda: storage.create("a", b"1"), True),
        (lambda: storage.create("a", b"2"), False),
        (lambda: storage.read("a"), b"1"),
        (lambda: storage.replace("a", b"3"), None),
        (lambda: list(storage.sizes("data")), []),
        (lambda: storage.open("a").read(), b"3"),
        (lambda: storage.rename("a", "b"), True),
        (lambda: storage.delete("b"), None),
    ):
        s3.heal()
        s3.fail(fault, times=2)
        assert act() == expected
    assert objects(storage) == {}


def test_a_body_that_breaks_off_is_read_on(storage, s3):
    """Half an answer is no answer."""
    data = os.urandom(300_000)
    storage.create("a", data)
    s3.fail("cut", "GET", times=2)
    assert storage.read("a") == data
    s3.fail("cut", "GET", times=2)
    with storage.open("a") as file:
        assert file.read() == data


def test_a_store_that_stays_away_ends_in_one_error(storage, s3, monkeypatch):
    """After a bounded time, with what to do and that nothing is lost."""
    storage.create("a", b"1")
    monkeypatch.setattr(bucket, "PATIENCE_S", 0.3)
    storage = ObjectStorage(storage.root)
    s3.fail((503, "SlowDown"), times=10**6)
    message = "did not answer, or asked to slow down, for 0.3 s: let it recover, then run the same command again; all that was"
    for act in (
        lambda: storage.create("b", b""),
        lambda: storage.read("a"),
        lambda: storage.replace("a", b""),
        lambda: storage.delete("a"),
        lambda: list(storage.names("data")),
    ):
        with pytest.raises(EngineError, match=message):
            act()


@pytest.mark.parametrize(
    ("status", "code", "kind", "message"),
    [
        (400, "ExpiredToken", EngineError, "credentials have expired: renew them"),
        (403, "ExpiredToken", EngineError, "credentials have expired: renew them"),
        (403, "AccessDenied", EngineError, "permission denied: the credentials need the right to"),
        (403, "InvalidAccessKeyId", EngineError, "does not accept the credentials"),
        (403, "RequestTimeTooSkewed", EngineError, "the clock of this machine is wrong"),
        (404, "NoSuchBucket", ConfigError, "there is no such bucket"),
        (301, "PermanentRedirect", ConfigError, "in another region"),
        (507, "XMinioStorageFull", EngineError, "the store is full"),
        (400, "Nonsense", EngineError, "the store refuses the request"),
    ],
)
def test_what_waiting_does_not_help_is_said_at_once_and_loses_nothing(storage, s3, status, code, kind, message):
    """In the middle of a commit, in one message without a key; when it is put right, the same call finishes the commit."""
    s3.fail((status, code), "PUT", part="commits", times=10**6)
    with pytest.raises(kind, match=message) as caught:
        publish(storage)
    assert type(caught.value) is kind
    assert not any(key in caught.value.message for key in KEYS.values())
    s3.heal()
    assert publish(storage) == "present"
    assert Ledger(storage).committed() == {make_shard().id}


def test_without_credentials_one_is_told_where_to_put_them(storage, monkeypatch):
    """The last place that is asked is the machine's role."""
    monkeypatch.setattr(bucket, "PATIENCE_S", 0.1)
    for name in KEYS:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="no credentials were found: set them in the environment"):
        ObjectStorage(storage.root).read("a")


def test_credentials_that_are_renewed_in_the_environment_are_taken(storage, s3, monkeypatch):
    """A notebook goes on with the new ones."""
    storage.create("a", b"a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(bucket, "PATIENCE_S", 0.1)
    with pytest.raises(EngineError, match="did not answer"):
        ObjectStorage(storage.root).read("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    assert ObjectStorage(storage.root).read("a") == b"a"


# Stores that cannot


def test_a_store_that_overwrites_is_found_out_before_anything_is_written(storage, s3):
    """It is refused, unless one says that nobody else writes; a good one is left as it was."""
    storage.probe()
    assert objects(storage) == {}
    s3.is_conditional = False
    with pytest.raises(Refused, match="--unsafe-single-writer"):
        storage.probe()
    assert objects(storage) == {}
    single = open_storage(storage.root, is_single_writer=True)
    single.probe()
    assert single.create("a", b"1")
    assert not pickle.loads(pickle.dumps(single)).create("a", b"2")
    assert publish(single) == "committed"
    assert single.read("a") == b"1"


def test_a_store_that_knows_no_conditions_is_refused(storage, s3):
    """501 is its answer to If-None-Match."""
    s3.fail((501, "NotImplemented"), "PUT")
    with pytest.raises(Refused, match="--unsafe-single-writer"):
        storage.probe()


# What is left behind


@pytest.mark.parametrize("fault", ["lost", "unsent"])
def test_a_commit_that_ends_at_any_request_is_finished_by_the_next(s3, tmp_path, monkeypatch, fault):
    """Done or not done: the same names with the same bytes come out, and no multipart upload is ever begun."""
    undisturbed = ObjectStorage(f"s3://{BUCKET}/{tmp_path.name}/undisturbed")
    publish(undisturbed)
    expected = objects(undisturbed)
    assert len(expected) == 4
    monkeypatch.setattr(bucket, "PATIENCE_S", 0.0)
    num_failed = 0
    for number in itertools.count():
        storage = ObjectStorage(f"s3://{BUCKET}/{tmp_path.name}/{number}")
        s3.heal()
        s3.fail(fault, part=f"/{number}/", times=1, after=number)
        try:
            publish(storage)
        except EngineError:
            num_failed += 1
        assert objects(storage).items() <= expected.items()
        if s3.faults[0].times:
            break
        publish(storage)
        assert objects(storage) == expected
    assert num_failed == 6  # vectors.json, the part, its rejects and its record; the first two are read back
    assert not any("upload" in request for request in s3.seen)


def test_a_move_that_ends_between_copy_and_delete_is_finished(storage, s3, monkeypatch):
    """Both names are there meanwhile: nothing is lost; another file under the new name is not touched."""
    storage.create("data/a", b"a")
    monkeypatch.setattr(bucket, "PATIENCE_S", 0.0)
    s3.fail((503, "SlowDown"), "DELETE")
    with pytest.raises(EngineError):
        storage.rename("data/a", "aside/a")
    assert objects(storage) == {"data/a": b"a", "aside/a": b"a"}
    assert storage.rename("data/a", "aside/a")
    assert objects(storage) == {"aside/a": b"a"}
    storage.create("data/a", b"b")
    with pytest.raises(EngineError, match="is another file: nothing was moved"):
        storage.rename("data/a", "aside/a")
    assert objects(storage) == {"aside/a": b"a", "data/a": b"b"}


def test_a_listing_is_taken_page_by_page(storage, s3):
    """2,500 objects in three requests, in no more memory than a page; the first name costs one request."""
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["global"]
    prefix = storage.root.partition(f"{BUCKET}/")[2]
    for number in range(2500):
        backend.put_object(BUCKET, f"{prefix}/data/{number:05}", b"x")
    s3.seen.clear()
    assert next(storage.names("data")) == "00000"
    assert len(s3.seen) <= 2  # the next page is asked for ahead
    s3.seen.clear()
    assert sorted(storage.names("data")) == [f"{number:05}" for number in range(2500)]
    assert len(s3.seen) == 3


def test_old_probes_are_collected(storage):
    """Those of a day ago; younger ones may be somebody's."""
    storage.create(f"{PROBES}/young", b"")
    storage.create(f"{PROBES}/old", b"")
    prefix = storage.root.partition(f"{BUCKET}/")[2]
    keys()[f"{prefix}/{PROBES}/old"].last_modified = datetime.fromtimestamp(time.time() - 25 * 3600)
    assert storage.collect_staging() == 1
    assert set(objects(storage)) == {f"{PROBES}/young"}


def test_a_report_goes_beside_its_output(storage):
    """Into the bucket; a page elsewhere is a file on this machine."""
    where, num_bytes = story._put(Ledger(storage), None, "<p>ü</p>")
    assert where == f"{storage.root}/{story.REPORT}"
    assert num_bytes == len(storage.read(story.REPORT)) == 9
    with pytest.raises(ConfigError, match="--to names a file on this machine"):
        story.report(storage.root, "s3://b/page.html")


def test_a_lease_holds_in_a_bucket(storage, s3, monkeypatch):
    """A second run is refused, or waits; a beat costs two requests; nothing is left but the last lease's files."""
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    other = pickle.loads(pickle.dumps(storage))
    has_entered = threading.Event()

    def wait_for_it() -> None:
        with held(other, "wait"):
            has_entered.set()

    with held(storage, "refuse"):
        with pytest.raises(OutputInUse), held(other, "refuse"):
            pass
        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        s3.seen.clear()
        time.sleep(0.5)
        beats = sum(".beat" in request for request in s3.seen)
        assert beats >= 2
        assert not has_entered.is_set()
    waiting.join(60)
    assert has_entered.is_set()
    assert {name.partition(".")[0] for name in storage.names(lease.LEASE)} == {"00000001", "00000002"}
