"""
The words of the engine as data: shards, rejects, receipts and commit records, and the columns of a part.

Everything that is stored is JSON with sorted keys and no spaces, so that equal things are equal bytes and every hash is one
of a canonical form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash

FORMAT_VERSION = 4
"""Of the output folder as a whole. It is in the fingerprint: parts of two formats never share an output."""

EMBEDDING = "embedding"
TEXT = "_text"
"""Between a reader and an actor: never in a part."""
FAULT = "_fault"
"""Of a table that was in memory: why a row of it is malformed. Never in a part."""
TEXT_HASH = "_text_hash"
"""Of the text as it goes to the model: 16 bytes, see `engine.text_hashes`."""
SOURCE_ROW = "_source_row"
CHUNK_INDEX, CHUNK_START, CHUNK_END = CHUNK_COLUMNS = ("chunk_index", "chunk_start", "chunk_end")
"""Of outputs with a row for each chunk of a text (`--long-texts chunk-rows`): int32, and character offsets into the text, int64."""
PART_METADATA = b"embedding_engine"
"""Key of a part's own metadata: all that its commit record says, so that the record can be made again from the part alone."""


def canonical_json(value: Any) -> str:
    """Return JSON in its one canonical form: sorted keys, no spaces, UTF-8 kept as it is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def utc_now() -> str:
    """Return the time as records have it: ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def content_hash(*data: bytes | memoryview | str) -> str:
    """Return the 128-bit XXH3 of `data`, one after the other, as 32 hexadecimal digits. Against accidents, not against attackers."""
    hashed = xxhash.xxh3_128()
    for one in data:
        raw = one.encode("utf-8", "surrogatepass") if isinstance(one, str) else one  # file names may be any bytes
        hashed.update(raw)
    return str(hashed.hexdigest())


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of a source, as it was when it was listed: the identity that its shards carry."""

    path: str
    """Relative to the source's base, with forward slashes: what shard ids are made from."""
    location: str
    """Where to open it."""
    size: int
    version: str
    """What changes when its content does: the time of change in nanoseconds on a disk, an ETag in an object store."""


class Place(NamedTuple):
    """Where reading of a file without row groups of its own may begin."""

    row: int
    offset: int
    """Bytes from the start of the file."""
    line: int
    """Newlines before it."""


START = Place(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Shard:
    """A contiguous range of rows of one input file: the unit of work, of commit, and of loss."""

    id: str
    file: InputFile
    start: int
    stop: int
    place: Place = field(default=START, compare=False)
    """At or before `start`: what a reader of lines need not look for. It travels no further than to the reader."""

    def __len__(self) -> int:
        return self.stop - self.start

    @classmethod
    def of(cls, fingerprint: str, file: InputFile, start: int, stop: int, place: Place = START) -> Shard:
        """Name the rows `start` to `stop` of `file`, embedded under `fingerprint`: another input or model, another id."""
        key = canonical_json([fingerprint, file.path, file.size, file.version, start, stop])
        return cls(content_hash(key), file, start, stop, place)


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be embedded, with its reason. It never holds the text."""

    source_row: int
    id: Any
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Return the line of `_engine/rejects/<shard_id>.jsonl`; an id that JSON does not know is written as its text."""
        known = isinstance(self.id, (str, int, float, bool)) or self.id is None
        return {"source_row": self.source_row, "id": self.id if known else str(self.id), "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Job:
    """What an output is of: written once, by the first run, and what every later run must match."""

    fingerprint: str
    decided_by: dict[str, Any]
    """All that the fingerprint was made from."""
    shard_rows: int
    base: str
    """The folder that the paths of the inputs are relative to."""
    kept_types: dict[str, str]
    config: dict[str, Any]
    """The first run's config, which `status` and `verify` go by. Later runs may change what only decides the speed."""
    created_at: str
    engine_version: str
    format_version: int


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """Hash all that decides the vectors; `parts` is kept beside it in job.json, so that a difference can be named."""
    return content_hash(canonical_json(dict(parts)))


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Name the fields in which two fingerprints differ, one line each: `field: stored -> asked`."""
    names = sorted(stored.keys() | asked.keys())
    return [
        f"{name}: {canonical_json(stored.get(name))} in the output, {canonical_json(asked.get(name))} asked for"
        for name in names
        if stored.get(name) != asked.get(name)
    ]


def vectors_type(width: int, of: pa.DataType | None = None) -> pa.DataType:
    """Return the type of the `embedding` column: a fixed-size list of numbers, by default float32, zero-copy to numpy and back."""
    return pa.list_(pa.field("item", of or pa.float32(), nullable=False), width)
