"""Who holds an output: a process, and whether it still runs, where that can be seen."""

from __future__ import annotations

import getpass
import os
import platform
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine.schema import utc_now

SAME_START_S = 2.0
"""Two looks at when a process started may differ by this much: the boot is known to a second."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who took an epoch."""

    host: str
    user: str
    pid: int
    process_started: float
    """By the clock of its machine, which may be set meanwhile."""
    place: str
    """Of its pid: the boot of a machine, and the container in it."""
    since: str
    started_s: float | None = None
    """Seconds after the boot of its machine, whatever its clock says: a pid is used again after a while. None in former engines' leases."""

    @classmethod
    def me(cls) -> Holder:
        """Describe this process."""
        pid = os.getpid()
        return cls(
            host=platform.node(),
            user=user_name(),
            pid=pid,
            process_started=psutil.Process().create_time(),
            place=_place(),
            since=utc_now(),
            started_s=_started_s(pid),
        )

    def is_running(self) -> bool | None:
        """Say whether its process is, and is not held up (Ctrl-Z); None if it cannot be seen from here."""
        if self.place != _place():
            return None
        try:
            process = psutil.Process(self.pid)
            if self.started_s is None:
                apart_s = process.create_time() - self.process_started
            else:
                apart_s = _started_s(self.pid) - self.started_s
            return abs(apart_s) < SAME_START_S and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
        except psutil.Error:
            return False

    def is_gone(self) -> bool:
        """Say whether it is sure that its process has ended: one that is held up may go on."""
        return self.place == _place() and not psutil.pid_exists(self.pid)


def user_name() -> str:
    """Return who runs this process; empty if the system has no name for it, as in some containers."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _started_s(pid: int) -> float:
    """
    Return how long after the boot a process started.

    The system knows that. psutil adds the time of the boot, which the system tells by its clock as it is now: a step of it shifts both.
    """
    boot = psutil.boot_time()
    return float(psutil.Process(pid).create_time() - boot)


def _place() -> str:
    """Name what a pid is one of: this boot of this machine, and the container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return f"{platform.node()}:{uuid.getnode():x}"
