"""Formats: which reader a file goes to, by the end of its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

from engine.errors import SourceError
from engine.schema import InputFile, Shard
from engine.sources import arrow_ipc, delimited, indexes, jsonl, lines, parquet, plain_text
from engine.sources.columns import MISSING, NULL, STRING, wider
from engine.sources.compression import CODECS, bare_name
from engine.sources.rows import Rows, Selection
from engine.sources.shape import FileShape

THREADS = 16
FILES_AT_ONCE = 1024
"""Handed to the threads together: a pool keeps 2 kB of each until it is looked at, and a source may have a million."""


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of file, and how it is read."""

    name: str
    suffixes: tuple[str, ...]
    shape: Callable[[InputFile, Selection], FileShape]
    read: Callable[[Sequence[Shard], Selection], Iterator[Rows]]
    """Reads shards of one file in one pass: for each, all its rows, with the selection's columns."""
    has_types: bool = True
    """Its columns have types of their own; otherwise they are told from the first rows, and those of all files are joined."""
    is_compressible: bool = False
    is_indexed: bool = True
    """Its shape takes more than a footer, and is kept in the output."""


def _of_lines(name: str, suffixes: tuple[str, ...], kind: lines.LineFormat) -> Format:
    return Format(
        name, suffixes, partial(lines.shape, kind), partial(lines.read, kind), has_types=False, is_compressible=True
    )


FORMATS = (
    Format("Parquet", (".parquet", ".pq"), parquet.shape, parquet.read, is_indexed=False),
    _of_lines("JSON lines", (".jsonl", ".ndjson", ".json"), jsonl.JSONL),
    _of_lines("CSV", (".csv",), delimited.CSV),
    _of_lines("TSV", (".tsv",), delimited.TSV),
    Format("plain text", (".txt",), plain_text.shape, plain_text.read, has_types=False, is_compressible=True),
    Format("Arrow IPC", (".arrow", ".feather", ".ipc"), arrow_ipc.shape, arrow_ipc.read),
)
SUFFIXES = tuple(suffix for known in FORMATS for suffix in known.suffixes)
SIDECARS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What Hugging Face datasets puts beside its Arrow files."""


def is_input(name: str) -> bool:
    """Say whether a file of a folder is data, by its name."""
    return name not in SIDECARS and _known(name) is not None


def format_of(path: str) -> Format:
    """Return the format of a file, by the end of its name, compressed or not; Parquet if that says nothing."""
    return _known(path) or FORMATS[0]


def is_splittable(path: str) -> bool:
    """Say whether a file can be read from its middle: otherwise one reader reads all of it."""
    return not (format_of(path).is_compressible and path.lower().endswith(tuple(CODECS)))


def read_shapes(
    files: Sequence[InputFile], selection: Selection, known: indexes.Known | None = None
) -> list[FileShape]:
    """
    Look at `files`, several at a time, and check that all are of one format and have the columns of the job.

    Args:
        files: Of the source.
        selection: Which columns there have to be; its types, if it has any, are those of the job.
        known: Shapes that an output keeps: their files are not opened.

    Raises:
        SourceError: Names the file that is unreadable, lacks a column, or has one of another type than the first.
    """
    return joined(scan(files, selection, known or {}), selection)


def scan(files: Sequence[InputFile], selection: Selection, known: indexes.Known) -> list[FileShape]:
    """Look at each file by itself, as `read_shapes` does: types that only its first rows tell are not joined with those of others."""
    _check_one_format(files)

    def look(file: InputFile) -> FileShape:
        kind = format_of(file.path)
        found = indexes.find(known, file, selection.kept) if kind.is_indexed else None
        return found or kind.shape(file, selection)

    with ThreadPoolExecutor(THREADS) as pool:
        return [
            shape
            for start in range(0, len(files), FILES_AT_ONCE)
            for shape in pool.map(look, files[start : start + FILES_AT_ONCE])
        ]


def new_shapes(shapes: Iterable[FileShape], known: indexes.Known) -> tuple[FileShape, ...]:
    """Return the shapes that `scan` made and an output should keep."""
    return tuple(
        shape
        for shape in shapes
        if format_of(shape.file.path).is_indexed
        and indexes.find(known, shape.file, [name for name, _ in shape.kept_types]) is None
    )


def joined(shapes: Sequence[FileShape], selection: Selection) -> list[FileShape]:
    """Give the columns of all files the types that hold the values of all; raise SourceError if there is none."""
    if not shapes or format_of(shapes[0].file.path).has_types:
        for shape in shapes:
            if shape.kept_types != shapes[0].kept_types:
                raise SourceError(_drift(shape, shapes[0]))
        return list(shapes)
    types = {name: (selection.kept_types.get(name, MISSING), shapes[0]) for name in selection.kept}
    fixed = {name for name in types if name in selection.kept_types}
    for shape in shapes:
        for name, kind in shape.kept_types:
            so_far, origin = types[name]
            found = wider(so_far, kind)
            if found is None or (name in fixed and found != so_far):
                raise SourceError(_drift(shape, None if name in fixed else origin, selection))
            types[name] = found, (origin if found == so_far else shape)
    for name, (kind, _) in types.items():
        if kind == MISSING and any(shape.num_rows for shape in shapes):
            raise SourceError(
                f"{shapes[0].file.location} has no column {name!r} in its first rows, nor has any other file of the source. "
                f"{selection.advice_on(name)}"
            )
    kept = tuple((name, STRING if kind in (MISSING, NULL) else kind) for name, (kind, _) in types.items())
    return [replace(shape, kept_types=kept) for shape in shapes]


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


def _known(path: str) -> Format | None:
    bare, codec = bare_name(path)
    return next(
        (known for known in FORMATS if bare.endswith(known.suffixes) and (known.is_compressible or codec is None)), None
    )


def _check_one_format(files: Sequence[InputFile]) -> None:
    first = format_of(files[0].path) if files else None
    for file in files:
        other = format_of(file.path)
        if first is not None and other is not first:
            raise SourceError(
                f"the source has files of two formats, {files[0].location} ({first.name}) and {file.location} ({other.name}): "
                f"name those of one, such as with '**/*{first.suffixes[0]}', and embed the others into another output"
            )


def _drift(shape: FileShape, other: FileShape | None, selection: Selection | None = None) -> str:
    than = "the output was begun with" if other is None else f"in {other.file.location}"
    wanted = ", ".join(f"{name} {kind}" for name, kind in selection.kept_types.items()) if selection else ""
    return (
        f"columns have other types in {shape.file.location} than {than}: "
        f"{_types(shape)} against {_types(other) if other else wanted}; make them equal, or do not keep these columns"
    )


def _types(shape: FileShape) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in shape.kept_types)
