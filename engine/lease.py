"""
The lease: which run owns an output now. A courtesy between runs; what keeps the output right is the ledger.

    OUT/_engine/lease/<epoch>.json    who took the output, created once: of many that try, one wins
    OUT/_engine/lease/<epoch>.beat    replaced every few seconds by its holder, with a number that grows
    OUT/_engine/lease/<epoch>.end     the holder has left

The highest epoch without an end is the holder's. On its own machine it is looked up among the processes; elsewhere it counts as dead
when its beat has stood still for a while by the clock of whoever watches: clocks of two machines are never compared. A run that
finds a higher epoch than its own has been taken over, and leaves. One that is wrongly taken for dead costs shards made twice, and
nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from engine.errors import EngineError, OutputInUse
from engine.holder import Holder
from engine.schema import canonical_json

if TYPE_CHECKING:
    from types import FrameType

    from engine.storage import Storage

logger = logging.getLogger(__name__)

LEASE = "_engine/lease"
BEAT_S = 5.0
LOST_S = 20.0
"""Without a beat, after which a holder elsewhere counts as dead: four beats, so that a slow store or a busy core does not."""
POLL_S = 0.5
LEAVING_S = 30.0
"""For which one that takes over waits for the other to leave: it finds out at its next beat, and commits what it has."""

_held_here: set[tuple[str, int]] = set()
"""Roots and epochs that this process holds: an interrupt may have ended a run of it before it could say that it has left."""

IfInUse = Literal["refuse", "wait", "take-over"]


class Lease:
    """An output, held by this run until the end of `held`."""

    def __init__(self, storage: Storage, epoch: int) -> None:
        self.epoch = epoch
        self.is_lost = False
        self._storage = storage
        self._done = threading.Event()
        self._interrupts = False
        self._interrupting = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        _held_here.add((self._storage.root, self.epoch))
        self._thread.start()

    def release(self) -> None:
        """Stop beating, and say that this run has left."""
        _held_here.discard((self._storage.root, self.epoch))
        self._done.set()
        self._thread.join(BEAT_S)
        with suppress(EngineError):  # a full disk; the next run finds out by itself
            self._storage.create(_name(self.epoch, "end"), b"")

    def follows(self, epoch: int | None) -> bool:
        """Say whether nobody has held the output since `settled` returned that: what was seen of it after that holds."""
        return self.epoch - 1 == epoch

    def check(self) -> None:
        """
        Find out whether this run still owns the output.

        Raises:
            OutputInUse: If another one has taken over.
        """
        if self.is_lost:
            raise OutputInUse(
                f"{self._storage.root} was taken over by another run; what was committed is kept, and this run has ended"
            )

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise KeyboardInterrupt inside, as on Ctrl-C, when another run takes over; in other threads than the main one only `check` tells."""
        self.check()
        self._interrupts = threading.current_thread() is threading.main_thread()
        is_ignored = self._interrupts and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if is_ignored:  # as scripts have it for what they run in the background
            signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            with self._interrupting:
                self._interrupts = False
            if is_ignored:
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Go on ignoring Ctrl-C, but not what `_lose` sends."""
        if self.is_lost:
            raise KeyboardInterrupt

    def _lose(self) -> None:
        self.is_lost = True
        with self._interrupting:  # so that the signal never comes after the block that expects it
            if self._interrupts:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _beat(self) -> None:
        number = 0
        while not self._done.wait(BEAT_S if number else 0.0):
            number += 1
            try:
                self._storage.replace(_name(self.epoch, "beat"), str(number).encode())
                if last_epoch(self._storage) > self.epoch:
                    self._lose()
                    return
            except (EngineError, OSError, ValueError) as error:  # of a disk that may be well again at the next beat
                logger.warning("cannot renew the lease of %s (%s)", self._storage.root, type(error).__name__)


@contextmanager
def held(storage: Storage, if_in_use: IfInUse) -> Iterator[Lease]:
    """
    Own an output for a while.

    Args:
        storage: Of the output.
        if_in_use: What to do if a live run owns it: refuse, wait until it has left, or take over.

    Raises:
        OutputInUse: If a live run owns it, and the choice is to refuse.
    """
    lease = _take(storage, if_in_use)
    try:
        lease.start()
        yield lease
    finally:
        lease.release()


def last_epoch(storage: Storage) -> int:
    """Return the highest epoch, 0 if there is none: one listing."""
    return max(_epochs(storage), default=0)


def settled(storage: Storage) -> int | None:
    """
    Return the highest epoch if its holder cannot change the output any more, 0 if there is none; None if it may.

    To be asked before an output is looked at that is held only later; `Lease.follows` says then whether to look again.
    """
    last = last_epoch(storage)
    if not last or _read(storage, _name(last, "end")) is not None:
        return last
    holder = _holder(storage, last)
    return last if holder is not None and holder.is_gone() else None


def _take(storage: Storage, if_in_use: IfInUse) -> Lease:
    """Take the next epoch, as soon as nobody holds the last one or it may be taken over."""
    me = (canonical_json(asdict(Holder.me())) + "\n").encode()
    is_told = False
    while True:
        last = last_epoch(storage)
        holder = _holder(storage, last)
        is_live = holder is not None and _is_live(storage, last, holder)
        if holder is not None and is_live and if_in_use != "take-over":
            who = f"{storage.root} is in use by a run on {holder.host} (process {holder.pid}, since {holder.since})"
            if if_in_use == "refuse":
                raise OutputInUse(
                    f"{who}: let it finish, or run this with --if-in-use wait, or take-over, which ends it cleanly"
                )
            if not is_told:
                logger.warning("%s: waiting until it has left", who)
            is_told = True
            time.sleep(POLL_S)
            continue
        if not storage.create(_name(last + 1, "json"), me):
            continue  # another one was quicker
        if holder is not None and is_live:
            _await_leaving(storage, last, holder)
        for epoch in (epoch for epoch in _epochs(storage) if epoch < last):
            for kind in ("beat", "end", "json"):
                storage.delete(_name(epoch, kind))
        return Lease(storage, last + 1)


def _is_live(storage: Storage, epoch: int, holder: Holder) -> bool:
    """Say whether a holder lives: at once on its machine, elsewhere by its beat, for which it has to be watched."""
    is_running = holder.is_running()
    if is_running is not None:
        return is_running and (holder.pid != os.getpid() or (storage.root, epoch) in _held_here)
    first = _read(storage, _name(epoch, "beat"))
    ends = time.monotonic() + LOST_S
    while time.monotonic() < ends:
        time.sleep(POLL_S)
        if _read(storage, _name(epoch, "end")) is not None:
            return False
        if _read(storage, _name(epoch, "beat")) != first:
            return True
    return False


def _await_leaving(storage: Storage, epoch: int, holder: Holder) -> None:
    logger.warning("taking over from a run on %s (process %d): waiting for it to leave", holder.host, holder.pid)
    ends = time.monotonic() + LEAVING_S
    while time.monotonic() < ends:
        if _read(storage, _name(epoch, "end")) is not None or holder.is_running() is False:
            return
        time.sleep(POLL_S)


def _holder(storage: Storage, epoch: int) -> Holder | None:
    """Return who holds an epoch; None if nobody does, or nothing is told: a file of a newer engine."""
    data = _read(storage, _name(epoch, "json"))
    if data is None or _read(storage, _name(epoch, "end")) is not None:
        return None
    try:
        return Holder(**json.loads(data))
    except (ValueError, TypeError):
        return None


def _epochs(storage: Storage) -> list[int]:
    names = (name.removesuffix(".json") for name in storage.names(LEASE) if name.endswith(".json"))
    return [int(name) for name in names if name.isdecimal()]


def _name(epoch: int, kind: str) -> str:
    return f"{LEASE}/{epoch:08}.{kind}"


def _read(storage: Storage, name: str) -> bytes | None:
    try:
        return storage.read(name)
    except FileNotFoundError:
        return None
