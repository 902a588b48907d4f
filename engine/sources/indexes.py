"""Indexes: the shapes of files that only a scan can tell, kept in the output, so that a resume need not scan them again."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

from engine.schema import InputFile, canonical_json, content_hash
from engine.sources.shape import FileShape

FOLDER = "_engine/index"
FORMAT_VERSION = 1
"""Of what is kept, and of how a scan divides a file."""

Known = Mapping[str, dict[str, Any]]


class Store(Protocol):
    """What is needed of an output's storage."""

    def create(self, name: str, data: bytes) -> bool:
        """Create `name` with `data`, or return False if it is there already."""

    def read(self, name: str) -> bytes:
        """Return the bytes of `name`; raise FileNotFoundError if it is not there."""

    def names(self, folder: str) -> Iterator[str]:
        """Yield the name below `folder` of each file in it."""


def load(store: Store) -> Known:
    """
    Return all that is kept, by file. What cannot be read is as good as not there.

    The name of each bundle is a hash of its bytes, so that a damaged one is never believed.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(store.names(FOLDER)):
        try:
            data = store.read(f"{FOLDER}/{name}")
            if name == _name(data):
                found |= json.loads(gzip.decompress(data))
        except (FileNotFoundError, ValueError):
            continue
    return found


def save(store: Store, shapes: Sequence[FileShape]) -> None:
    """Keep the shapes of files, all in one object."""
    if shapes:
        entries = {key(shape.file): _entry(shape) for shape in shapes}
        data = gzip.compress(canonical_json(entries).encode("utf-8", "surrogatepass"), 6, mtime=0)
        store.create(f"{FOLDER}/{_name(data)}", data)


def find(known: Known, file: InputFile, columns: Iterable[str]) -> FileShape | None:
    """Return the shape of a file with the types of `columns`, if that is known."""
    entry = known.get(key(file))
    if entry is None or not entry["types"].keys() >= {*columns}:
        return None
    return FileShape(
        file=file,
        row_groups=tuple(entry["rows"]),
        text_bytes=entry["text_bytes"],
        kept_types=tuple((name, entry["types"][name]) for name in columns),
        offsets=tuple(accumulate(entry["offsets"])),
        lines=tuple(accumulate(entry["lines"])),
    )


def _entry(shape: FileShape) -> dict[str, Any]:
    return {
        "rows": shape.row_groups,
        "text_bytes": shape.text_bytes,
        "types": dict(shape.kept_types),
        "offsets": _steps(shape.offsets),
        "lines": _steps(shape.lines),
    }


def _steps(numbers: Sequence[int]) -> list[int]:
    """Return the first number, and by how much each of the others is more: smaller ones, which are stored in less."""
    return [*numbers[:1], *(after - before for before, after in pairwise(numbers))]


def key(file: InputFile) -> str:
    """Return what an index calls a file."""
    return content_hash(canonical_json([FORMAT_VERSION, file.path, file.size, file.version]))


def _name(data: bytes) -> str:
    return f"{content_hash(data)}.json.gz"
