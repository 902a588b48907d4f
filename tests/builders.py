"""Builders for tests: shards, tables and source files as the engine sees them, and processes that die or fail on time."""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd  # noqa: F401 - Arrow imports it with its first array, and would do so in every forked process
import pyarrow as pa
import pyarrow.parquet as pq

from engine import exchange
from engine.commits import Receipt, Usage
from engine.config import load_config
from engine.ledger import Ledger
from engine.models.sentence_transformer import SentenceTransformerEmbeddingModel
from engine.schema import (
    EMBEDDING,
    FORMAT_VERSION,
    SOURCE_ROW,
    TEXT_HASH,
    InputFile,
    Job,
    Reject,
    Shard,
    fingerprint_of,
    vectors_type,
)
from engine.sources.inventory import list_inputs
from engine.sources.rows import Selection
from engine.storage import STAGING, LocalStorage
from engine.survey import Survey
from engine.text_hashes import text_hashes

if TYPE_CHECKING:
    import pytest

    from engine.pipeline.worker import Work

PROCESSES = multiprocessing.get_context("forkserver")
"""Forks from a process that has imported the engine and done nothing else: quick to start, and no thread is lost in it."""
PROCESSES.set_forkserver_preload(["tests.builders"])

FINGERPRINT = "f" * 32
USAGE = Usage(num_tokens=40, embed_s=0.5, device="cpu", created_at="2026-11-24T12:00:00+00:00")
SMALL_FILES = 4096
"""Bytes: the block size of a tmpfs."""


def work_for(asked: Survey, **options: Any) -> Work:
    """Return what an actor has to know of a job, as a run tells it."""
    from engine.pipeline.worker import Work  # not in the process that others are forked from: it brings Ray

    config = asked.config
    return Work(
        model=config.of_model(),
        identity=asked.identity,
        selection=Selection.of(config, asked.job.kept_types),
        id_column=config.id_column,
        num_threads=0,
        log_level=logging.WARNING,
        output_dtype=config.output_dtype,
        **options,
    )


# Shards and their tables


def make_shard(num_rows: int = 10, *, path: str = "a.parquet", start: int = 0, fingerprint: str = FINGERPRINT) -> Shard:
    return Shard.of(fingerprint, InputFile(path, f"/source/{path}", 1000, "12345"), start, start + num_rows)


def make_rejects(shard: Shard, rows: Sequence[int] = (3, 7)) -> list[Reject]:
    return [Reject(row, f"id-{row}", "null") for row in rows]


def hashes_of(rows: Iterable[Any]) -> pa.Array:
    """Return a column of hashes, as of texts that the rows stand for."""
    return text_hashes([f"text {row}" for row in rows])


def make_table(shard: Shard, *, without: Sequence[int] = (3, 7), dimension: int = 4) -> pa.Table:
    """Make a part's table, with vectors that the row numbers decide."""
    rows = [row for row in range(shard.start, shard.stop) if row not in without]
    vectors = np.stack([1 - np.random.default_rng(row).random(dimension, dtype=np.float32) for row in rows])
    return pa.table(
        {
            "id": [f"id-{row}" for row in rows],
            EMBEDDING: pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=vectors_type(dimension)),
            TEXT_HASH: hashes_of(rows),
            SOURCE_ROW: pa.array(rows, pa.int64()),
        }
    )


def publish(out: str | Path, shard: Shard | None = None, *, usage: Usage = USAGE, dimension: int = 4) -> Receipt:
    """Publish a shard of ten rows, two of them rejects, as a publish task does."""
    shard = shard or make_shard()
    table = make_table(shard, dimension=dimension)
    ledger = Ledger(LocalStorage(str(out)))
    return ledger.publish(table, shard=shard, fingerprint=FINGERPRINT, rejects=make_rejects(shard), usage=usage)


def make_job(created_at: str = "now", **settings: Any) -> Job:
    config = load_config(source="in", output="out", **settings)
    decided_by = {
        **config.settings(SentenceTransformerEmbeddingModel.options),
        "model": config.model,
        "format_version": FORMAT_VERSION,
    }
    return Job(
        fingerprint=fingerprint_of(decided_by),
        decided_by=decided_by,
        shard_rows=100,
        base="/source",
        kept_types={},
        config=config.model_dump(mode="json"),
        created_at=created_at,
        engine_version="0",
        format_version=FORMAT_VERSION,
    )


def files(out: str | Path) -> dict[str, bytes]:
    """Return all files of an output but those in staging."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(STAGING)}


def staged(out: str | Path) -> list[str]:
    return [path.name for path in Path(out, STAGING).glob("*")]


# Source files


def write_source(path: Path, columns: dict[str, Any] | pa.Table, **options: Any) -> InputFile:
    """Write a Parquet file, and list it as a source does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, **options)
    return list_inputs([str(path)]).files[0]


# Processes, and calls to the system that fail


def _answer(connection: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        connection.send((function(*args), None))
    except Exception as error:
        connection.send((None, error))


class Started:
    """A function in a process of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._answers, theirs = PROCESSES.Pipe(duplex=False)
        self._process = PROCESSES.Process(target=_answer, args=(theirs, function, args))
        self._process.start()
        theirs.close()

    def result(self) -> Any:
        """Return what the function returned, or raise what it raised."""
        value, error = self._answers.recv()
        self._process.join()
        if error is not None:
            raise error
        return value


CALLS = (
    *((os, name) for name in ("mkdir", "open", "fsync", "link", "unlink", "rename", "rmdir")),
    (io, "open"),
    (exchange, "_trade_names"),
)
"""All that storage does to a disk, but for writing into an open staging file."""


@contextmanager
def at_call(
    number: int, act: Callable[[], None], *, when: str = "before", writing_only: bool = False
) -> Iterator[list[str]]:
    """
    Do `act` before or after the `number`-th call to the system, counted from 0; give the names of the calls seen so far.

    Args:
        number: Of the call.
        act: What happens then: it kills, or raises.
        when: `before` or `after`.
        writing_only: Do not count opening a file to read it.
    """
    seen: list[str] = []
    originals = [(module, name, getattr(module, name)) for module, name in CALLS]

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if writing_only and original is io_open and "r" in (args[1] if len(args) > 1 else kwargs.get("mode", "r")):
                return original(*args, **kwargs)
            is_now = len(seen) == number
            seen.append(original.__name__)
            if is_now and when == "before":
                act()
            try:
                return original(*args, **kwargs)
            finally:
                if is_now and when == "after":
                    act()

        return call

    io_open = io.open
    for module, name, original in originals:
        setattr(module, name, wrapped(original))
    try:
        yield seen
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


LOOKS = ((os, "stat"), (os, "scandir"), (os, "open"), (io, "open"))
"""All that looks at a path, but for what Arrow does by itself."""


def fail_below(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int = errno.EACCES, calls: Sequence[tuple[Any, str]] = LOOKS
) -> None:
    """Let calls fail for all that is in a folder, as in one of another user: root may look into them all."""

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            if not isinstance(path, int):
                where = Path(os.fsdecode(path))
                if folder in where.parents or (folder == where and original.__name__ == "scandir"):
                    raise OSError(number, os.strerror(number), str(path))
            return original(path, *args, **kwargs)

        return call

    for module, name in calls:
        monkeypatch.setattr(module, name, failing(getattr(module, name)))


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_at_each_call(folder: str, start: str | None, when: str, function: Callable[[str], Any]) -> int:
    for call in count():
        out = f"{folder}/{call}"
        if start:
            shutil.copytree(start, out)
        if not (pid := os.fork()):
            code = 1
            try:
                with at_call(call, kill_self, when=when):
                    function(out)
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            return call
        assert code == -signal.SIGKILL
    raise AssertionError


def killed_at_each_call(
    folder: Path, function: Callable[[str], Any], *, start: Path | None = None, when: str = "before"
) -> list[Path]:
    """
    Run `function` again and again, each time in a process of its own that SIGKILL ends one call to the system later.

    Args:
        folder: Each process works on a new folder in it, which is the function's argument.
        function: Of a module, since it travels to another process.
        start: What is in the folders at first.
        when: Whether death comes `before` or `after` the call.

    Returns:
        The folders, in the order of the calls; the function came to its end in the last.
    """
    folder.mkdir()
    num_killed = Started(_killed_at_each_call, str(folder), start and str(start), when, function).result()
    return [folder / str(call) for call in range(num_killed + 1)]


def raise_os_error(number: int) -> Callable[[], None]:
    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def mount_small_disk(folder: str, num_bytes: int) -> bool:
    """Mount a tmpfs that only this process sees, and that goes with it; False where that is not permitted."""
    new_mounts, private = 0x00020000, (1 << 14) | (1 << 18)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private, None):
        return False
    return not libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={num_bytes}".encode())
