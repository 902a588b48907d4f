"""Interrupts: what ends a run from outside ends it as on its last receipt."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.lease import Lease
    from engine.tally import Tally


@contextmanager
def interruptible(tally: Tally, owned: Lease) -> Iterator[None]:
    """End a run on Ctrl-C, a notebook's stop button or SIGTERM as on its last receipt: what is committed is committed."""
    try:
        with owned.interrupting():
            yield
    except KeyboardInterrupt:
        owned.check()
        tally.interrupted = True


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Take SIGTERM, which ends jobs on clusters, for Ctrl-C. To be entered after Ray, which has a handler of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
