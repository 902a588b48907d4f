"""Which run owns an output: who is refused, who waits, who takes over, and what a dead holder costs."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import count, pairwise
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import psutil
import pytest

from engine import lease
from engine.errors import OutputInUse
from engine.holder import Holder
from engine.lease import LEASE, Lease, held, settled
from engine.storage import LocalStorage, Storage
from tests.builders import PROCESSES, Started
from tests.kills import wait_until


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


@pytest.fixture
def elsewhere(storage):
    """A holder on another machine, with epoch 1."""
    holder = replace(Holder.me(), host="far-away", place="another boot of another machine")
    storage.create(f"{LEASE}/00000001.json", json.dumps(asdict(holder)).encode())
    storage.replace(f"{LEASE}/00000001.beat", b"1")
    return holder


def hold(root: str, line: Connection) -> None:
    with held(LocalStorage(root), "refuse"):
        line.send("taken")
        line.poll(60)


def hold_once(root: str, all_have_looked: Barrier) -> tuple[float, float] | None:
    """Return from when to when it held the output, by the clock that all processes share; it goes on when all see that nobody does."""
    epochs, looks = lease._epochs, count()

    def looked(storage: Storage) -> list[int]:
        found = epochs(storage)
        if not next(looks):
            all_have_looked.wait(60)
        return found

    try:
        with patch.object(lease, "_epochs", looked), held(LocalStorage(root), "refuse"):
            began = time.monotonic()
            time.sleep(0.3)
            return began, time.monotonic()
    except OutputInUse:
        return None


def while_it_waits(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something when a run waits for the first time, which has looked before; and have it wait for moments."""
    acts = [act]

    def sleep(_seconds: float) -> None:
        if acts:
            acts.pop()()
        time.sleep(0.01)

    monkeypatch.setattr(lease, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))


@pytest.fixture
def other(storage):
    """A live process that holds the output, and the line to end it by."""
    line, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=hold, args=(storage.root, theirs))
    process.start()
    assert line.poll(60)
    yield process, line
    process.kill()
    process.join(60)


def test_beside_a_live_run_another_one_is_refused_and_told_who_it_is(storage, other):
    """Host, process and since when, and what can be done."""
    process, _ = other
    with pytest.raises(OutputInUse, match=rf"process {process.pid}, since 20.*--if-in-use wait, or take-over"):  # noqa: SIM117
        with held(storage, "refuse"):
            pass


def test_a_run_that_waits_begins_when_the_other_has_left(storage, other, monkeypatch):
    """And knows that the output has changed meanwhile."""
    process, line = other
    before = settled(storage)
    while_it_waits(monkeypatch, lambda: line.send("leave"))
    with held(storage, "wait") as mine:
        assert not mine.follows(before)
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_suspended_holder_on_this_machine_costs_no_wait(storage, other, monkeypatch, number):
    """It is looked up among the processes: no beat is waited for."""
    process, _ = other
    monkeypatch.setattr(lease, "LOST_S", 1e9)
    os.kill(process.pid, number)
    wait_until(lambda: number == signal.SIGKILL or psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    if number == signal.SIGKILL:
        process.join(60)
    with held(storage, "refuse") as mine:
        assert mine.epoch == 2


@pytest.mark.parametrize("other", [{"started_s": -9.0}, {"started_s": None, "process_started": 1.0}])
def test_a_pid_that_is_used_again_is_not_the_holder(storage, other):
    """A live process of that number that started at another time is somebody else; in leases of former engines too."""
    holder = replace(Holder.me(), **other)
    storage.create(f"{LEASE}/00000001.json", json.dumps(asdict(holder)).encode())
    with held(storage, "refuse") as mine:
        assert mine.epoch == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system notes when a process started, once")
@pytest.mark.parametrize("step_s", [-3600.0, 10.0])
def test_a_live_run_stays_one_when_the_clock_of_its_machine_is_set(storage, other, step_s, monkeypatch):
    """A machine that was suspended, or asks a time server for the first time."""
    boot_time = psutil._pslinux.boot_time
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time() + step_s)
    with pytest.raises(OutputInUse), held(storage, "refuse"):
        pass


def test_a_live_run_of_a_former_engine_is_one(storage, other):
    """Its lease says when its process started by the clock alone."""
    path = Path(storage.root, LEASE, "00000001.json")
    fields = json.loads(path.read_text())
    del fields["started_s"]
    path.write_text(json.dumps(fields))
    with pytest.raises(OutputInUse), held(storage, "refuse"):
        pass


@pytest.mark.parametrize(
    ("end", "is_settled"),
    [
        (lambda process, line: line.send("leave"), True),
        (lambda process, line: process.kill(), True),
        (lambda process, line: os.kill(process.pid, signal.SIGSTOP), False),
        (lambda process, line: None, False),
    ],
    ids=["left", "killed", "suspended", "live"],
)
def test_what_is_seen_of_an_output_holds_if_its_last_run_was_over_and_none_came_since(storage, other, end, is_settled):
    """One that is only held up may go on; of one elsewhere nobody knows."""
    process, line = other
    end(process, line)
    if is_settled:
        process.join(60)
    before = settled(storage)
    assert before == (1 if is_settled else None)
    process.kill()
    process.join(60)
    with held(storage, "refuse") as mine:
        assert mine.follows(before) == is_settled
    with held(storage, "refuse") as mine:
        assert not mine.follows(before)


def test_of_a_holder_elsewhere_that_has_not_left_nobody_knows_whether_it_is_over(storage, elsewhere):
    """And nothing is waited for to find out."""
    assert settled(storage) is None


def test_a_run_of_this_process_that_was_cut_off_holds_nothing(storage):
    """A second Ctrl-C in a notebook, as the first one lets go: the cell can be run again, and not beside itself."""
    storage.create(f"{LEASE}/00000001.json", json.dumps(asdict(Holder.me())).encode())
    with held(storage, "refuse") as mine:
        assert mine.epoch == 2
        with pytest.raises(OutputInUse), held(storage, "refuse"):
            pass


def test_a_holder_elsewhere_is_dead_when_its_beat_stands_still(storage, elsewhere, monkeypatch):
    """By the clock of who watches: what the holder's clock said is never looked at."""
    monkeypatch.setattr(lease, "LOST_S", 0.3)
    monkeypatch.setattr(lease, "POLL_S", 0.05)
    with held(storage, "refuse") as mine:
        assert mine.epoch == 2


def test_a_holder_elsewhere_that_beats_is_live(storage, elsewhere, monkeypatch):
    """One beat that is seen is enough."""
    while_it_waits(monkeypatch, lambda: storage.replace(f"{LEASE}/00000001.beat", b"2"))
    with pytest.raises(OutputInUse, match="far-away"), held(storage, "refuse"):
        pass


def test_a_holder_elsewhere_that_leaves_while_it_is_watched_is_gone(storage, elsewhere, monkeypatch):
    """A new run begins at once."""
    while_it_waits(monkeypatch, lambda: storage.create(f"{LEASE}/00000001.end", b""))
    with held(storage, "refuse") as mine:
        assert mine.epoch == 2


def start_inside(mine: Lease, other: threading.Thread) -> None:
    with mine.interrupting():
        other.start()
        threading.Event().wait(60)


def test_a_run_that_is_taken_over_is_interrupted_and_told(storage, monkeypatch):
    """In the middle of whatever it waits for; the other one begins once it has left."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "POLL_S", 0.05)
    done = threading.Event()

    def take_over() -> None:
        before = settled(storage)
        with held(LocalStorage(storage.root), "take-over") as mine:
            assert not mine.follows(before)
            done.set()

    with held(storage, "refuse") as mine:
        other = threading.Thread(target=take_over)
        with pytest.raises(KeyboardInterrupt):
            start_inside(mine, other)
        assert not done.is_set()
        with pytest.raises(OutputInUse, match="was taken over by another run"):
            mine.check()
    other.join(60)
    assert done.is_set()


def test_a_run_in_the_background_of_a_script_is_interrupted_by_nothing_else(storage, monkeypatch):
    """There Ctrl-C is ignored, and stays so; the signal by which another run takes over is not."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "POLL_S", 0.05)

    def take_over() -> None:
        with held(LocalStorage(storage.root), "take-over"):
            pass

    other = threading.Thread(target=take_over)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held(storage, "refuse") as mine:
            with mine.interrupting():
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                start_inside(mine, other)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    other.join(60)


def test_of_many_that_try_at_once_one_holds_the_output(storage):
    """Whoever loses the race for an epoch looks again, and finds the winner."""
    all_have_looked = PROCESSES.Barrier(6)
    held_by = [started.result() for started in [Started(hold_once, storage.root, all_have_looked) for _ in range(6)]]
    turns = sorted(filter(None, held_by))
    assert turns
    assert all(one[1] <= other[0] for one, other in pairwise(turns)), "two held it at once"
    epochs = {path.name.partition(".")[0] for path in Path(storage.root, LEASE).iterdir()}
    assert len(epochs) <= 2


def test_what_former_runs_left_is_cleaned_up(storage):
    """Ten runs leave the files of two."""
    for number in range(10):
        before = settled(storage)
        with held(storage, "refuse") as mine:
            assert mine.epoch == number + 1
            assert mine.follows(before)
    assert {path.name.partition(".")[0] for path in Path(storage.root, LEASE).iterdir()} == {"00000009", "00000010"}


def test_a_lease_that_cannot_be_read_is_nobodys(storage):
    """A torn or strange file does not lock an output for ever."""
    storage.create(f"{LEASE}/00000001.json", b"{")
    with held(storage, "refuse") as mine:
        assert mine.epoch == 2
