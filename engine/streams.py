"""The streams of the process: what Ray's C++ core writes to stderr beside Python, and who gets to see it."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CORE_NOTICE = re.compile(rb"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [IWE] \d+ \d+\] ")
"""How the core begins a line. Every actor pool brings one of level E about its own arguments (ray issue 53727). Fatal ones (F) pass,
and all of them are in Ray's log files."""


@contextmanager
def without_core_notices(*, in_notebook: bool = False) -> Iterator[None]:
    """
    Keep the notices of Ray's C++ core off the screen.

    The core writes to descriptor 2 itself, past `sys.stderr`. So descriptor 2 becomes a pipe that is read line by line, and
    `sys.stderr` goes on as it was, on a copy of the original: a terminal stays a terminal.

    Args:
        in_notebook: A kernel has `sys.stderr` for itself, and shows what comes through the descriptor too: that alone is filtered.
    """
    before = sys.__stderr__
    plain = before if before is not None and sys.stderr is before and before.fileno() == 2 else None
    if plain is None and not in_notebook:  # somebody captures it: theirs to filter
        yield
        return
    sys.stderr.flush()
    screen = os.dup(2)
    readable, writable = os.pipe()
    os.dup2(writable, 2)
    os.close(writable)
    reader = threading.Thread(target=_pass_on, args=(readable, screen), daemon=True)
    reader.start()
    if plain is not None:
        # Never closed: what was imported meanwhile may keep it, and write to it as the process ends, as colorama does.
        sys.stderr = os.fdopen(os.dup(screen), "w", 1, plain.encoding, plain.errors)
    try:
        yield
    finally:
        if plain is not None:
            sys.stderr = plain
        os.dup2(screen, 2)
        reader.join(timeout=1)  # not for ever: a child process may hold the pipe open


def _pass_on(readable: int, screen: int) -> None:
    with os.fdopen(readable, "rb") as lines:
        for line in lines:
            if not CORE_NOTICE.match(line):
                os.write(screen, line)
    os.close(screen)
