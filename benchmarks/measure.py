"""
Measuring: call a function in a fresh process, and watch from outside what time and memory it takes.

Memory of one process is its own peak (`VmHWM`). `getrusage` would not do: on Linux its maximum survives `exec`, so a child
reports at least what its parent had when it was started. Memory of all is what its whole tree holds: anonymous memory of every
process, and what the object store has on /dev/shm, counted once.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
MIB = 1024**2
SAID = 3000
"""Characters of the end of what a process wrote, that are told if it fails."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ADDRESS": "local",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "PYTHONPATH": str(ROOT),
}
"""
Models come from packages. Ray on one machine needs no token, since it listens on loopback alone, and is always started anew, so that no
cluster is measured that happens to run here; its workers import the benchmarks from the root.
"""


class OutOfMemory(RuntimeError):
    """The machine ran low, and the measured process was ended before it could take others with it."""


@dataclass(slots=True)
class Measured:
    """What a function returned, and what it cost."""

    result: Any = None
    seconds: float = 0.0
    """Of the call alone: neither the interpreter's start nor the imports of the function's module."""
    peak_mib: float = 0.0
    """Of the process that called it."""
    tree_mib: float = 0.0
    """Of that process, all below it and the object store together; 0 if it was not asked for."""
    samples: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the process started, and its resident MiB then."""


def fresh(
    target: str, *, watch_tree: bool = False, interval_s: float = 0.25, min_free_gib: float = 2.0, **arguments: Any
) -> Measured:
    """
    Call `target` (`package.module:function`) with `arguments` in a new interpreter.

    Args:
        target: The function; what it takes and returns is JSON.
        watch_tree: Add up the memory of all its processes too.
        interval_s: Between looks at its memory.
        min_free_gib: End it if the machine has less than this left.
        arguments: Of the function.

    Raises:
        OutOfMemory: It was ended for want of memory; a RuntimeError too.
        RuntimeError: It failed; with the end of what it wrote.
    """
    measured = Measured()
    with tempfile.TemporaryDirectory(prefix="engine-measure-") as folder:
        answer, log = Path(folder, "answer"), Path(folder, "log")
        command = [sys.executable, "-m", "benchmarks.measure", target, json.dumps(arguments), str(answer)]
        with log.open("wb") as output, started(command, stdout=output, stderr=output) as child:
            _watch(child, measured, watch_tree, interval_s, min_free_gib)
        if not answer.exists():
            raise RuntimeError(f"{target} failed with {child.returncode}:\n{log.read_text(errors='replace')[-SAID:]}")
        for name, value in json.loads(answer.read_text()).items():
            setattr(measured, name, value)
    return measured


def seconds_of(*arguments: str) -> float:
    """
    Return the seconds of a Python with these arguments, from its start to its end.

    Raises:
        RuntimeError: It failed; with the end of what it wrote to stderr.
    """
    with tempfile.TemporaryFile() as said:  # no pipe: what the process leaves behind could hold it open
        began = time.perf_counter()
        with started([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=said) as child:
            code = child.wait()
            seconds = time.perf_counter() - began
        if code:
            said.seek(0)
            end_of_it = said.read().decode(errors="replace")[-SAID:]
            raise RuntimeError(f"python {arguments[0]} failed with {code}:\n{end_of_it}")
    return seconds


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a session of its own, with these options of `Popen`; whatever happens, nothing of it is left at the end."""
    child = subprocess.Popen(command, **{"cwd": ROOT, "env": environment(), "start_new_session": True} | options)
    try:
        yield child
    finally:
        end(child)


def environment() -> dict[str, str]:
    """Return the environment of a measured process."""
    return os.environ | ENVIRONMENT


def num_cores() -> int:
    """Return how many cores this process may use: containers and affinities may leave it fewer than the machine has."""
    import joblib

    return max(int(joblib.cpu_count()), 1)


def exit_on_sigterm() -> None:
    """Have SIGTERM end this process as `sys.exit` does: what it has started ends with it."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _watch(
    child: subprocess.Popen[bytes], measured: Measured, tree: bool, interval_s: float, min_free_gib: float
) -> None:
    started = time.perf_counter()
    process = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            measured.samples.append((time.perf_counter() - started, process.memory_info().rss / MIB))
            if tree:
                measured.tree_mib = max(measured.tree_mib, tree_memory(process) / MIB)
        except psutil.NoSuchProcess:
            pass
        free_gib = psutil.virtual_memory().available / 1024**3
        if free_gib < min_free_gib:
            end(child)
            raise OutOfMemory(f"{free_gib:.1f} GiB were left on this machine")
        try:
            child.wait(interval_s)
        except subprocess.TimeoutExpired:
            continue


def tree_memory(process: psutil.Process) -> int:
    """Return the bytes that a process, its descendants and their object store hold."""
    total = 0
    store: dict[int, int] = {}
    for one in [process, *process.children(recursive=True)]:
        try:
            total += status_bytes(one.pid, "RssAnon")
            for descriptor in Path(f"/proc/{one.pid}/fd").iterdir():
                if descriptor.readlink().as_posix().startswith("/dev/shm/"):
                    found = descriptor.stat()
                    store[found.st_ino] = found.st_blocks * 512
        except OSError:  # it ended meanwhile
            continue
    return total + sum(store.values())


def status_bytes(pid: int, name: str) -> int:
    """Return a size from /proc/PID/status; 0 if it is not there."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = next((line for line in lines if line.startswith(f"{name}:")), f"{name}: 0 kB")
    return int(found.split()[1]) * 1024


def end(child: subprocess.Popen[bytes]) -> None:
    """End what was started by `started` and all below it, each by its own id; if it ended by itself, what it has left in its session."""
    family = []
    if child.poll() is None:
        with suppress(psutil.NoSuchProcess):
            family = [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]
    for process in (*family, *_session(child.pid)):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()


def _session(leader: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == leader:
                yield process


def main() -> None:
    """Be the fresh process."""
    target, arguments, answer = sys.argv[1:]
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    started = time.perf_counter()
    result = function(**json.loads(arguments))
    seconds = time.perf_counter() - started
    peak = status_bytes(os.getpid(), "VmHWM") / MIB
    Path(answer).write_text(json.dumps({"result": result, "seconds": seconds, "peak_mib": peak}))


if __name__ == "__main__":
    main()
