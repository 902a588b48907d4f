"""A thread with an event loop: what is bound to a loop (a client's connections) stays on one, whoever calls from wherever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

CLOSE_S = 2.0
"""For what is closed at the end, if somebody waits for it."""

_T = TypeVar("_T")


class LoopThread:
    """
    One event loop that runs in a thread of its own, which does not keep the process alive.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._closing: list[Callable[[], Coroutine[Any, Any, object]]] = []
        self._is_ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run a coroutine there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine there, and wait for it here, on whatever loop this is."""
        return await asyncio.wrap_future(self.submit(coroutine))

    def at_end(self, close: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Have something closed there before the loop ends."""
        self._closing.append(close)

    async def ended(self) -> None:
        """Close what is to be closed, and end the loop and its thread; a second time it does nothing."""
        if (closed := self._ending()) is not None:
            await asyncio.wrap_future(closed)

    def stop(self) -> None:
        """Do the same from outside of a loop."""
        closed = self._ending()
        if closed is not None and threading.current_thread() is not self._thread:
            with suppress(TimeoutError):
                closed.result(CLOSE_S)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _ending(self) -> Future[None] | None:
        if self._is_ended or not self._thread.is_alive():  # a forked process has no such thread
            return None
        self._is_ended = True
        closed = self.submit(self._closed())
        closed.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        return closed

    async def _closed(self) -> None:
        await asyncio.gather(*(close() for close in self._closing), return_exceptions=True)
        with suppress(RuntimeError):  # a process that ends may start no thread any more, which this would do
            await self._loop.shutdown_default_executor()
