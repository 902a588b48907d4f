"""Formats: which reader a file goes to, by the end of its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from engine.errors import SourceError
from engine.schema import InputFile, Shard
from engine.sources import parquet
from engine.sources.rows import Rows, Selection
from engine.sources.shape import FileShape

THREADS = 16


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of file, and how it is read."""

    name: str
    suffixes: tuple[str, ...]
    shape: Callable[[InputFile, Selection], FileShape]
    read: Callable[[Sequence[Shard], Selection], Iterator[Rows]]
    """Reads shards of one file in one pass: for each, all its rows, with the selection's columns."""


FORMATS = (Format("Parquet", (".parquet", ".pq"), parquet.shape, parquet.read),)
SUFFIXES = tuple(suffix for known in FORMATS for suffix in known.suffixes)


def format_of(path: str) -> Format:
    """Return the format of a file, by the end of its name; Parquet if that says nothing."""
    return next((known for known in FORMATS if path.endswith(known.suffixes)), FORMATS[0])


def read_shapes(files: Sequence[InputFile], selection: Selection) -> list[FileShape]:
    """
    Look at `files`, several at a time, and check that all have the columns of the job.

    Raises:
        SourceError: Names the file that is unreadable, lacks a column, or has one of another type than the first.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        shapes = list(pool.map(lambda file: format_of(file.path).shape(file, selection), files))
    for shape in shapes:
        if shape.kept_types != shapes[0].kept_types:
            raise SourceError(
                f"columns have other types in {shape.file.location} than in {shapes[0].file.location}: "
                f"{_types(shape)} against {_types(shapes[0])}; make them equal, or do not keep these columns"
            )
    return shapes


def read_shards(shards: Iterable[Shard], selection: Selection) -> Iterator[Rows]:
    """
    Read shards of any files, each file once, from its first shard here to its last.

    Args:
        shards: In the order of files and rows.
        selection: What to read.

    Returns:
        For each shard its rows, in a table of `_text`, the kept columns, and `_source_row`.

    Raises:
        SourceChanged: If a file is not what was planned, before or after its rows were read.
        SourceError: If it cannot be read.
    """
    for file, of_file in groupby(shards, lambda shard: shard.file):
        group = list(of_file)
        for shard, rows in zip(group, format_of(file.path).read(group, selection), strict=True):
            yield selection.finished(rows, shard)


def _types(shape: FileShape) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in shape.kept_types)
