"""The streams of the process: what Ray's C++ core writes to stderr beside Python, and who gets to see it; and results on stdout."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


def escape_on_stdout() -> None:
    """Have stdout take names that its encoding does not have, with backslashes, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def on_stdout() -> Iterator[None]:
    """
    Write a result.

    Raises:
        Unwritten: If stdout does not take it; Python will not try again as it ends.
    """
    try:
        yield
        sys.stdout.flush()
    except (OSError, SystemExit) as error:  # rich ends the process where nobody reads any more
        with suppress(OSError, ValueError):  # not of this process, or none
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        raise Unwritten(error) from None


class Unwritten(Exception):
    """
    Stdout does not take a result.

    Args:
        error: What it was.
    """

    def __init__(self, error: BaseException) -> None:
        self.is_unread = not isinstance(error, OSError) or error.errno == errno.EPIPE
        """Whether who was to read it has left, as `head` does."""
        super().__init__(getattr(error, "strerror", None) or type(error).__name__)


def _pass_on(readable: int, screen: int) -> None:
    with os.fdopen(readable, "rb") as lines:
        for line in lines:
            if not CORE_NOTICE.match(line):
                os.write(screen, line)
    os.close(screen)
