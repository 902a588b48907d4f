"""Opening an input: one place knows where bytes come from, and whether they still are what was listed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from engine.disk import is_trouble
from engine.errors import SourceError
from engine.schema import InputFile
from engine.sources import remote

MEMORY = "memory:"
"""What a source in memory is called, before the hash of its content: it lies in the output, block by block."""
INPUTS = "_engine/inputs"
"""Where in the output."""
_ADVICE = "it is empty, truncated or damaged. Restore it or take it out of the source, then run again"


def open_input(file: InputFile) -> pa.NativeFile:
    """Open an input for reading, with seek: as Arrow's readers take it, and io.BufferedReader too."""
    if remote.is_remote(file.location):
        return pa.PythonFile(remote.open_remote(file, is_pinned=is_staged(file)), mode="r")
    return pa.OSFile(file.location)


def is_staged_source(sources: Sequence[str]) -> bool:
    """Say whether a job's source is one that was in memory."""
    return any(source.startswith(MEMORY) for source in sources)


def is_staged(file: InputFile) -> bool:
    """Say whether an input is a block of a source that was in memory: named by the hash of its content, so never another."""
    return file.location.endswith(f"/{INPUTS}/{file.version}.parquet")


def local_version(mtime_ns: int) -> str:
    """Return what changes when a file on a disk does."""
    return str(mtime_ns)


def check_unchanged(file: InputFile) -> None:
    """
    Make sure that an input still is what was listed.

    Raises:
        SourceError: If it is gone.
        SourceChanged: If its size or its version is another.
    """
    if remote.is_remote(file.location):
        if not is_staged(file):
            remote.check_remote(file)
        return
    try:
        status = Path(file.location).stat()
    except OSError as error:
        raise SourceError(f"the input {file.location} cannot be read: {error.strerror}") from None
    if is_staged(file):
        return
    if (status.st_size, local_version(status.st_mtime_ns)) != (file.size, file.version):
        raise remote.changed(file)


@contextmanager
def readable(file: InputFile, kind: str) -> Iterator[None]:
    """Turn what a library says of a bad file of some `kind` into a message that names the file and quotes nothing of it."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno and is_trouble(error):
            raise SourceError(
                f"the input {file.location} cannot be read ({os.strerror(error.errno)}): make it readable, or take it out of the source"
            ) from None
        raise SourceError(
            f"the input {file.location} cannot be read as {kind} ({type(error).__name__}): {_ADVICE}"
        ) from None
