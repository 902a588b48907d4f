"""A thread with an event loop: what is bound to a loop (a client's connections) stays on one, whoever calls from wherever."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

CLOSE_S = 2.0
"""For what is closed at the end, if somebody waits for it."""

Closing = Callable[[], Coroutine[Any, Any, object]]
_T = TypeVar("_T")


class LoopThread:
    """
    One event loop that runs in a thread of its own, which does not keep the process alive.

    It ends when nobody holds it any more, or the process ends, if nobody has ended it before: Kura closes no model, nor does `engine.embed`.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._closing: list[Closing] = []
        thread = threading.Thread(target=_run, args=(self._loop,), name=name, daemon=True)  # which does not hold `self`
        thread.start()
        self._thread = thread
        self._end = weakref.finalize(self, _end, self._loop, thread, self._closing)

    @property
    def is_current(self) -> bool:
        """Say whether the caller is on this very thread, which would wait for itself for ever."""
        return threading.current_thread() is self._thread

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run a coroutine there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine there, and wait for it here, on whatever loop this is."""
        return await asyncio.wrap_future(self.submit(coroutine))

    def at_end(self, close: Closing) -> None:
        """Have something closed there before the loop ends; it must not hold what holds this thread."""
        self._closing.append(close)

    async def ended(self) -> None:
        """Close what is to be closed, and end the loop and its thread; a second time it does nothing."""
        if (end := self._end.detach()) and (closed := _ending(*end[2])):
            await asyncio.wrap_future(closed)

    def stop(self) -> None:
        """Do the same from outside of a loop."""
        self._end()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, closing: Sequence[Closing]) -> None:
    closed = _ending(loop, thread, closing)
    if closed is not None and threading.current_thread() is not thread:
        with suppress(TimeoutError):
            closed.result(CLOSE_S)


def _ending(
    loop: asyncio.AbstractEventLoop, thread: threading.Thread, closing: Sequence[Closing]
) -> Future[None] | None:
    if not thread.is_alive():  # a forked process has no such thread
        return None
    closed = asyncio.run_coroutine_threadsafe(_closed(loop, closing), loop)
    closed.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    return closed


async def _closed(loop: asyncio.AbstractEventLoop, closing: Sequence[Closing]) -> None:
    for close in closing:
        with suppress(Exception):  # a model may be anybody's, and its `close` no coroutine
            await close()
    with suppress(RuntimeError):  # a process that ends may start no thread any more, which this would do
        await loop.shutdown_default_executor()
