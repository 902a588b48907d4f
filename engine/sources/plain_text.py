"""Plain text: a row a line, or a row a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from engine.errors import SourceError
from engine.schema import InputFile, Shard
from engine.sources import lines
from engine.sources.columns import STRING
from engine.sources.compression import open_decoded
from engine.sources.lines import LineFormat, Look
from engine.sources.opening import check_unchanged
from engine.sources.records import MAX_RECORD_BYTES, READ_BYTES, TOO_LONG, Chunk, Lines, without_bom
from engine.sources.rows import Rows, Selection
from engine.sources.shape import FileShape
from engine.sources.texts import INVALID_UTF8

KIND = "plain text"


class Parser:
    """Makes a table of lines, whose one column is the text."""

    def __init__(self, _: InputFile, selection: Selection) -> None:
        self._name = selection.text_column

    def __call__(self, chunk: Chunk) -> tuple[pa.RecordBatch, dict[int, str]]:
        """Return the lines without their ends, and why each that is at fault is null, by position."""
        faults = dict(chunk.faults)
        texts = self._all_at_once(chunk) if not faults else None
        if texts is None:
            texts = [None if at in faults else _text(line, at, faults) for at, line in enumerate(chunk.records())]
        return pa.record_batch([pa.array(texts, pa.string())], names=[self._name]), faults

    @staticmethod
    def _all_at_once(chunk: Chunk) -> list[str | None] | None:
        try:
            text = chunk.data[int(chunk.starts[0]) : int(chunk.ends[-1])].decode()
        except UnicodeDecodeError:
            return None
        found: list[str | None] = list(text.removesuffix("\n").split("\n"))
        return [line.removesuffix("\r") for line in found if line is not None] if "\r" in text else found


def look(file: InputFile, _: Sequence[Chunk], selection: Selection) -> Look:
    """Make sure that nothing but the text is asked for."""
    for column in selection.columns:
        if column != selection.text_column:
            raise SourceError(
                f"{file.location} is plain text and has no column {column!r}: leave it out, or convert the file to JSON lines"
            )
    return Look({selection.text_column: STRING})


LINES = LineFormat(KIND, Lines(blank_is_row=True), look, Parser)


def shape(file: InputFile, selection: Selection) -> FileShape:
    """Return the shape of a file: its lines, or one row."""
    if selection.text_rows == "line":
        return lines.shape(LINES, file, selection)
    kept = tuple((name, look(file, (), selection).types[name]) for name in selection.kept)
    lines.check_encoding(LINES, file)
    return FileShape(file=file, row_groups=(1,), text_bytes=file.size, kept_types=kept)


def read(shards: Sequence[Shard], selection: Selection) -> Iterator[Rows]:
    """Read shards of one file in one pass, as `lines.read` does; a file that is one row is one shard."""
    if selection.text_rows == "line":
        yield from lines.read(LINES, shards, selection)
        return
    file = shards[0].file
    check_unchanged(file)
    faults: dict[int, str] = {}
    with lines.readable_lines(file, KIND), open_decoded(file) as stream:
        pieces: list[bytes] = []
        size = 0
        while size <= MAX_RECORD_BYTES and (piece := stream.read(READ_BYTES)):
            pieces.append(piece)
            size += len(piece)
        text = None
        if size > MAX_RECORD_BYTES:
            faults[0] = TOO_LONG
        else:
            text = _text(without_bom(b"".join(pieces))[0], 0, faults, whole=True)
    check_unchanged(file)
    yield Rows(pa.table({selection.text_column: pa.array([text], pa.string())}), faults)


def _text(line: bytes, at: int, faults: dict[int, str], *, whole: bool = False) -> str | None:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        faults[at] = INVALID_UTF8
        return None
    return text if whole else text.removesuffix("\n").removesuffix("\r")
