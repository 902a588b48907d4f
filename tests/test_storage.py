"""The store: one winner, whole names, and what a bad disk does."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from engine.errors import ConfigError, EngineError
from engine.object_storage import ObjectStorage
from engine.storage import STAGING, STAGING_MAX_AGE_S, LocalStorage, Storage, open_storage
from tests.builders import (
    PROCESSES,
    SMALL_FILES,
    Started,
    at_call,
    fail_below,
    files,
    mount_small_disk,
    publish,
    raise_os_error,
    staged,
)
from tests.object_stores import BUCKET, serving

NUM_NAMES = 40
SIZE = 100_000


@pytest.fixture
def store(tmp_path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "out"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with serving():
        yield f"s3://{BUCKET}"


@pytest.fixture(params=["disk", "bucket"])
def any_store(request, tmp_path) -> Storage:
    """What holds of every store is tested on both."""
    if request.param == "disk":
        return LocalStorage(str(tmp_path / "out"))
    return ObjectStorage(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """All files of one published shard."""
    out = tmp_path_factory.mktemp("undisturbed")
    publish(out)
    return files(out)


def create_all(root: str, writer: int, barrier) -> list[bool]:
    store = open_storage(root)
    won = []
    for number in range(NUM_NAMES):
        barrier.wait()
        won.append(store.create(f"data/{number}", bytes([writer]) * SIZE))
    return won


def check_winners(store: Storage, won: list[list[bool]]) -> None:
    for number in range(NUM_NAMES):
        winners = [writer for writer, wins in enumerate(won) if wins[number]]
        assert len(winners) == 1
        assert store.read(f"data/{number}") == bytes(winners) * SIZE
    assert list(store.names(STAGING)) == []


# Create if absent


def test_of_threads_that_create_one_name_one_wins(any_store):
    """Eight threads, forty names: each name has one winner and its bytes."""
    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda writer: create_all(any_store.root, writer, barrier), range(8)))
    check_winners(any_store, won)


def test_of_processes_that_create_one_name_one_wins(store):
    """Four processes, forty names: each name has one winner and its bytes."""
    with PROCESSES.Manager() as manager:
        barrier = manager.Barrier(4)
        started = [Started(create_all, store.root, writer, barrier) for writer in range(4)]
        won = [process.result() for process in started]
    check_winners(store, won)


def test_a_name_is_whole_from_the_moment_it_exists(store):
    """A reader that looks all the time sees no name, or all of its bytes."""
    done, has_looked = threading.Event(), threading.Event()

    def look() -> set[int]:
        lengths: set[int] = set()
        try:
            while not done.is_set():
                lengths.update(size for _, size in store.sizes("data"))
                if lengths:
                    has_looked.set()
        finally:
            has_looked.set()
        return lengths

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(look)
        try:
            for number in range(50):
                assert store.create(f"data/{number}", b"x" * SIZE)
            has_looked.wait(60)
        finally:
            done.set()
        assert reader.result() == {SIZE}


def test_a_second_create_changes_nothing(any_store):
    """The first bytes stay, and the answer says so."""
    assert any_store.create("data/a", b"first")
    assert not any_store.create("data/a", b"second")
    assert any_store.read("data/a") == b"first"


def test_no_staged_file_looks_like_a_part(store, monkeypatch):
    """While a part is written, only names in _engine/tmp exist for it, and none ends in .parquet."""
    seen: list[str] = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        seen.extend(str(path.relative_to(store.root)) for path in Path(store.root).rglob("*") if path.is_file())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    store.create("data/part-a.parquet", b"part")
    staging = {name for name in seen if name != "data/part-a.parquet"}
    assert staging
    assert all(name.startswith(STAGING) and not name.endswith(".parquet") for name in staging)


# Read, list, move, clean


def test_what_is_not_there_is_not_found_and_not_listed(any_store):
    """Reading and opening raise FileNotFoundError; a listing is empty; deleting and moving do nothing."""
    for read in (any_store.read, any_store.open):
        with pytest.raises(FileNotFoundError):
            read("data/a")
    any_store.delete("data/a")
    assert not any_store.rename("data/a", "aside/a")
    assert list(any_store.names("data")) == list(any_store.sizes("data")) == []


def test_names_and_sizes_list_files_only(any_store):
    """A folder's files with their sizes, and neither its folders nor those whose names begin as its does."""
    any_store.create("data/a", b"123")
    any_store.create("data/empty", b"")
    any_store.create("data/below/b", b"1")
    any_store.create("database/c", b"1")
    assert sorted(any_store.names("data")) == ["a", "empty"]
    assert sorted(any_store.sizes("data")) == [("a", 3), ("empty", 0)]


def test_what_is_opened_is_read_in_pieces(any_store):
    """From anywhere, as Arrow reads a footer."""
    any_store.create("data/a", bytes(range(256)) * 1000)
    with any_store.open("data/a") as file:
        assert file.seek(-3, os.SEEK_END) == 255_997
        assert file.read() == bytes([253, 254, 255])
        file.seek(300)
        assert file.read(3) == bytes([44, 45, 46])
        assert file.tell() == 303


def test_what_is_replaced_and_deleted_is_gone(any_store):
    """The last bytes count."""
    for data in (b"1", b"22"):
        any_store.replace("beat", data)
        assert any_store.read("beat") == data
    any_store.delete("beat")
    with pytest.raises(FileNotFoundError):
        any_store.read("beat")


def test_rename_moves_and_a_lost_name_is_no_error(any_store):
    """The bytes lie under the new name; doing it again does nothing."""
    any_store.create("data/a", b"a")
    assert any_store.rename("data/a", "aside/a.bad")
    assert not any_store.rename("data/a", "aside/a.bad")
    assert list(any_store.names("data")) == []
    assert any_store.read("aside/a.bad") == b"a"


def test_rename_replaces_no_other_file_and_leaves_one_name_of_the_same(any_store):
    """What a dead process had copied or linked already is moved; another file stays, and so does the one that was to be moved."""
    any_store.create("data/a", b"a")
    any_store.create("aside/a", b"a")
    assert any_store.rename("data/a", "aside/a")
    assert not list(any_store.names("data"))
    any_store.create("data/a", b"b")
    with pytest.raises(EngineError, match="is another file: nothing was moved"):
        any_store.rename("data/a", "aside/a")
    assert (any_store.read("data/a"), any_store.read("aside/a")) == (b"b", b"a")


def test_a_second_link_to_a_file_is_no_obstacle_to_its_move(store):
    """rename(2) does nothing then, and leaves both names."""
    store.create("data/a", b"a")
    Path(store.root, "aside").mkdir()
    Path(store.root, "aside/a").hardlink_to(Path(store.root, "data/a"))
    assert store.rename("data/a", "aside/a")
    assert not list(store.names("data"))
    assert store.read("aside/a") == b"a"


def test_collect_staging_deletes_only_what_is_older_than_a_day(store):
    """A live writer's file stays; what a dead one left a day ago goes; nothing else is looked at."""
    folder = Path(store.root, STAGING)
    folder.mkdir(parents=True)
    now = time.time()
    for name, age in (("old", STAGING_MAX_AGE_S + 60), ("young", STAGING_MAX_AGE_S - 60), ("new", 0)):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (now - age, now - age))
    store.create("data/a", b"a")
    os.utime(Path(store.root, "data/a"), (1, 1))
    assert store.collect_staging() == 1
    assert sorted(staged(store.root)) == ["new", "young"]
    assert store.read("data/a") == b"a"


def test_a_store_is_a_folder_or_a_place_in_a_bucket(tmp_path):
    """Other schemes and files are refused; file:// is a path."""
    (tmp_path / "file").touch()
    for location in ("ftp://host/out", "hf://datasets/a/b", str(tmp_path / "file")):
        with pytest.raises(ConfigError, match="output"):
            open_storage(location)
    for location in ("s3:/bucket/out", "gs:bucket/out", "memory:", "file:/out"):
        with pytest.raises(ConfigError, match=f"^{location} is no address, which begins with [a-z0-9]+://"):
            open_storage(location)
    assert open_storage("./s3:/out").root.endswith("/s3:/out")
    assert open_storage(f"file://{tmp_path}").root == str(tmp_path)


def test_a_folder_that_may_not_be_looked_at_is_a_message(tmp_path, monkeypatch):
    """Below one of another user there may be an output, or none."""
    fail_below(tmp_path / "locked", monkeypatch)
    with pytest.raises(ConfigError, match=r"locked/out cannot be looked at \(Permission denied\)"):
        open_storage(str(tmp_path / "locked/out"))


def test_what_may_not_be_read_is_to_be_made_readable(store, monkeypatch):
    """No folder has to be writable for that."""
    store.create("data/a", b"a")
    fail_below(Path(store.root), monkeypatch)
    for look in (store.read, store.open, lambda folder: list(store.names(folder))):
        with pytest.raises(EngineError, match=r"\(Permission denied\): permission denied: make all .* readable"):
            look("data")


# Bad disks: a clear error, no name that is not whole, and a later attempt that works


def check_whole(out: Path, undisturbed: dict[str, bytes], num_staged: int = 0) -> None:
    assert files(out).items() <= undisturbed.items()
    assert len(staged(out)) == num_staged


def check_later_attempt(out: Path, undisturbed: dict[str, bytes]) -> None:
    publish(out)
    assert files(out) == undisturbed


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "input/output error"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "hard links"),
    ],
)
def test_an_error_of_any_call_is_explained_and_leaves_no_half_name(tmp_path, undisturbed, number, message):
    """Every call that writes fails in turn, until a publish has no such call left."""
    failed: list[str] = []
    messages: list[str] = []
    for call in count():
        out = tmp_path / str(call)
        with at_call(call, raise_os_error(number), writing_only=True) as seen:
            try:
                publish(out)
            except EngineError as error:
                failed.append(seen[call])
                messages.append(error.message)
            else:  # no call was left, or it was to make a folder that is there
                assert files(out) == undisturbed
        check_whole(out, undisturbed, num_staged=int(seen[call : call + 1] == ["unlink"]))
        check_later_attempt(out, undisturbed)
        if len(seen) <= call:
            break
    assert set(failed) >= {"mkdir", "open", "fsync", "link", "unlink"}
    assert failed.count("link") == 4
    assert all(message in said and "all that was committed is kept" in said for said in messages)


def test_fsync_is_called_before_a_name_exists(store, monkeypatch):
    """With a disk that fails at the first fsync, no name appears."""
    monkeypatch.setattr(os, "fsync", lambda _: raise_os_error(errno.EIO)())
    with pytest.raises(EngineError, match="input/output error"):
        store.create("data/a", b"a")
    assert files(store.root) == {}


def fill_up(folder: str, free: int | None, out: str) -> str:
    """Publish with room for `free` more bytes; return the message of the error, if there was one."""
    filler = Path(folder, "filler")
    filler.unlink(missing_ok=True)
    if free is not None:
        room = os.statvfs(folder)
        filler.write_bytes(b"\0" * max(room.f_bavail * room.f_frsize - free, 0))
    try:
        publish(out, dimension=2000)
    except EngineError as error:
        return error.message
    return ""


def fill_small_disk(folder: str) -> list[tuple[str, bool, bool]] | None:
    """For each number of free blocks: the error's message, whether all names were whole, whether it worked; None without a right to mount."""
    if not mount_small_disk(folder, 64 * SMALL_FILES * 8):
        return None
    Path(folder, "expected").mkdir()
    fill_up(folder, None, f"{folder}/expected")
    expected = files(f"{folder}/expected")
    outcomes = []
    for blocks in range(64):
        out = f"{folder}/out"
        message = fill_up(folder, blocks * SMALL_FILES, out)
        whole = files(out).items() <= expected.items() and not staged(out)
        fill_up(folder, None, out)
        outcomes.append((message, whole, files(out) == expected))
        shutil.rmtree(out)
        if not message:
            break
    return outcomes


def limit_file_size(root: str, num_bytes: int) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    try:
        publish(root)
    except EngineError as error:
        return error.message
    return ""


def test_a_full_disk_is_explained_at_every_write(tmp_path):
    """A real disk with room for 0, 1, 2… blocks: each time an error, no half name, and success once there is room."""
    outcomes = Started(fill_small_disk, str(tmp_path)).result()
    if outcomes is None:  # no right to mount: every write fails with the error of a full disk instead
        undisturbed_out = tmp_path / "undisturbed"
        publish(undisturbed_out)
        test_an_error_of_any_call_is_explained_and_leaves_no_half_name(
            tmp_path, files(undisturbed_out), errno.ENOSPC, "the disk is full"
        )
        return
    assert len(outcomes) > 10
    for message, whole, worked in outcomes[:-1]:
        assert "the disk is full: free some space and run the same command again" in message
        assert (whole, worked) == (True, True)
    assert outcomes[-1] == ("", True, True)


def test_a_file_that_may_not_grow_is_explained(tmp_path, undisturbed):
    """Under a limit of the process's file size the write stops half way, and the half is no part."""
    sizes = sorted({len(data) for data in undisturbed.values()})
    for limit in (0, 1, *(size - 1 for size in sizes)):
        out = tmp_path / str(limit)
        assert "may not grow" in Started(limit_file_size, str(out), limit).result()
        check_whole(out, undisturbed)
        check_later_attempt(out, undisturbed)
    assert Started(limit_file_size, str(tmp_path / "enough"), sizes[-1]).result() == ""


def publish_as_nobody(out: str, elsewhere: str) -> None:
    publish(elsewhere)  # imports what it needs while it may
    if os.getuid() == 0:
        os.setuid(65534)
    publish(out)


def test_permission_denied_is_explained(tmp_path, undisturbed):
    """A user who may not write is told so; nothing appears; with the right to write it works."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        out.mkdir()
        Path(folder).chmod(0o755)
        out.chmod(0o555)
        with pytest.raises(EngineError, match="permission denied: make the folder writable"):
            Started(publish_as_nobody, str(out), str(tmp_path)).result()
        assert files(out) == {}
        out.chmod(0o777)
        Started(publish_as_nobody, str(out), str(tmp_path)).result()
        assert files(out) == undisturbed


def test_a_file_where_a_folder_must_be_is_a_message(tmp_path):
    """`create` says False, as if the name were there."""
    (tmp_path / "data").write_text("")
    with pytest.raises(EngineError, match="in the way"):
        LocalStorage(str(tmp_path)).create("data/a", b"a")
