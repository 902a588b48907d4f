"""The history of an output: a summary of each run that had something to do, in `_engine/runs/`, created as the run ends."""

from __future__ import annotations

import heapq
import json
import logging
import os
import platform
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.holder import user_name
from engine.schema import canonical_json, utc_now
from engine.version import __version__

if TYPE_CHECKING:
    from engine.results import RunResult
    from engine.storage import Storage

logger = logging.getLogger(__name__)

RUNS = "_engine/runs"
MAX_RUNS = 1000
"""That are read, the last by name."""
PACKAGES = ("ray", "pyarrow", "torch", "sentence-transformers", "openvino", "openai", "cohere")
"""Whose versions may matter to who looks back."""


@dataclass(slots=True)
class Entry:
    """One run. A run that is killed leaves none: what it committed is in the ledger all the same."""

    started_at: str
    ended_at: str = ""
    outcome: str = "failed"
    """done, interrupted, stopped (by its budget) or failed."""
    error: str = ""
    """The class of the error that a failed run ended with: messages name paths, and belong on the screen."""
    host: str = ""
    user: str = ""
    pid: int = 0
    cluster: str = ""
    """Nodes and resources of the Ray that it ran on, such as `3 nodes, 24 CPU, 4 GPU`."""
    versions: dict[str, str] | None = None
    result: dict[str, Any] | None = None
    """Of a run that did not fail: what it printed."""

    def ended(self, result: RunResult) -> None:
        """Note how the run ended."""
        self.result = result.as_json()
        self.outcome = "interrupted" if result.interrupted else "stopped" if result.stopped else "done"


@contextmanager
def recorded(storage: Storage) -> Iterator[Entry]:
    """Write a summary of what happens inside, however it ends; what cannot be written is not worth failing a run for."""
    entry = Entry(
        started_at=utc_now(), host=platform.node(), user=user_name(), pid=os.getpid(), versions=dict(_versions())
    )
    try:
        yield entry
    except BaseException as error:
        entry.error = type(error).__name__
        raise
    finally:
        entry.ended_at = utc_now()
        stamp = entry.started_at.translate(str.maketrans("", "", "-:")).partition("+")[0]
        try:
            storage.create(
                f"{RUNS}/{stamp}-{uuid.uuid4().hex[:8]}.json", (canonical_json(asdict(entry)) + "\n").encode()
            )
        except EngineError as error:
            logger.warning("the summary of the run is not written: %s", error.message)


def last_runs(storage: Storage) -> tuple[list[dict[str, Any]], int]:
    """Return what the last runs left about themselves, the last first, and how many such files cannot be read."""
    found, num_unreadable = [], 0
    names = (name for name in storage.names(RUNS) if name.endswith(".json"))
    for name in heapq.nlargest(MAX_RUNS, names):
        try:
            run = json.loads(storage.read(f"{RUNS}/{name}"))
        except (OSError, ValueError):
            run = None
        if isinstance(run, dict) and isinstance(run.get("result") or {}, dict):
            found.append(run)
        else:
            num_unreadable += 1
    return sorted(found, key=lambda run: str(run.get("started_at")), reverse=True), num_unreadable


def _versions() -> Iterator[tuple[str, str]]:
    yield "engine", __version__
    yield "python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
