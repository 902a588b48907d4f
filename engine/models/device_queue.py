"""The device queue: batches of several callers through one backend, so that its device never waits."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.models.backends.base import Backend, Batch, is_out_of_memory

if TYPE_CHECKING:
    from engine.models.base import Vectors

READY_BATCHES = 2
"""Filled and waiting for a stream: one that is taken, and one in its place."""


@dataclass(slots=True)
class Done:
    """What became of a batch."""

    batch: Batch
    vectors: Vectors | None
    error: Exception | None
    seconds: float
    """In its stream."""
    is_first: bool = False
    """Of its budget in its stream: memory is taken for it, and libraries are loaded."""


class DeviceClock:
    """Tells the callers of a device for how long it was each one's: from the end of the one before, so that waits count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_since: float | None = None

    def held_s(self, began: float) -> float:
        """Return the seconds of the caller that is done now; of the first one, since it `began`."""
        with self._lock:
            now = time.perf_counter()
            free_since = began if self._free_since is None else self._free_since
            self._free_since = now
            return now - free_since


@dataclass(slots=True)
class DeviceTime:
    """How the time of a device was spent."""

    held_s: float = 0.0
    """Since the caller before was done, or else since the first batch began."""
    busy_s: float = 0.0
    """Of these, with a batch: the mean over the device's streams."""


class DeviceQueue:
    """
    Runs the batches of one caller after those of another, in the threads of a backend's streams.

    The next caller's turn comes as the last batch of the one before is handed over, not as it is done: while one caller's
    last batches are computed, and its vectors collected, the device has the first of the next.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._turn = threading.Lock()
        self._places = backend.num_streams + READY_BATCHES
        self._room = threading.Semaphore(self._places)
        self._streams = ThreadPoolExecutor(backend.num_streams, thread_name_prefix="stream")
        self._clock = DeviceClock()
        self._own = threading.local()

    def run(self, batches: Iterable[Batch], take: Callable[[Done], None], *, alone: bool = False) -> DeviceTime:
        """
        Compute batches; they are asked for one by one, as there is room, and taken in order, as they are done.

        So there are never more of them than the device has work with, and few that wait for one before them.

        Args:
            batches: What raises in them raises here.
            take: Called in the caller's thread with what became of each.
            alone: Let nothing else be on the device meanwhile.
        """
        futures: deque[Future[Done]] = deque()
        stream_s = 0.0

        def take_next() -> None:
            nonlocal stream_s
            one = futures.popleft().result()
            stream_s += one.seconds * one.batch.num_shares
            take(one)

        with self._turn:
            began = time.perf_counter()
            for batch in batches:
                self._enter(alone)
                futures.append(self._streams.submit(self._compute, batch, alone))
                while futures and futures[0].done():
                    take_next()
        while futures:
            take_next()
        return DeviceTime(self._clock.held_s(began), stream_s / self.backend.num_streams)

    def close(self) -> None:
        """End the threads; what runs is finished."""
        self._streams.shutdown()

    def _enter(self, alone: bool) -> None:
        for _ in range(self._places if alone else 1):
            self._room.acquire()

    def _compute(self, batch: Batch, alone: bool) -> Done:
        began = time.perf_counter()
        vectors, problem = None, None
        try:
            try:
                vectors = self.backend(batch)
            except Exception as error:  # judged by the caller, batch by batch
                problem = error.with_traceback(None)  # whose frames hold the batch's tensors
            if problem is not None and is_out_of_memory(problem):
                self.backend.relieve()
        finally:
            self._room.release(self._places if alone else 1)
        return Done(batch, vectors, problem, time.perf_counter() - began, self._is_first(batch.budget))

    def _is_first(self, budget: int) -> bool:
        """Say whether this thread has had no batch of a budget yet."""
        seen: set[int] = self._own.__dict__.setdefault("budgets", set())
        is_first = budget not in seen
        seen.add(budget)
        return is_first
