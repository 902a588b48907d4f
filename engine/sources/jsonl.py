"""JSON lines: a row a line that is not blank, an object each."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import orjson
import pyarrow as pa

from engine.errors import SourceError
from engine.schema import InputFile
from engine.sources.columns import ARROW_TYPES, JSON, MISSING, STRING, check_column, column_of, pieces_of, type_of
from engine.sources.lines import LineFormat, Look, head
from engine.sources.records import Chunk, Lines
from engine.sources.rows import Selection
from engine.sources.texts import INVALID_UTF8, SURROGATE, is_encodable

MALFORMED = "malformed JSON"
NO_OBJECT = "not a JSON object"
SHOWN_COLUMNS = 50
_LONG_NUMBER = re.compile(rb"\d{19}")
"""orjson makes a float of an integer that is longer than 64 bits."""
_NOT_LINES = re.compile(rb"\s*(\[\s*\{|[\[{]\s*$)")
"""How the first line of a file begins that is one JSON array, or an object over several lines."""
_ABSENT = object()


class Parser:
    """
    Makes a table of lines.

    Args:
        selection: What to keep of them.
        types: Of all columns but the text.
    """

    def __init__(self, selection: Selection, types: dict[str, str]) -> None:
        self._text = selection.text_column if selection.text_template is None else None
        self._pieces = [name for name in selection.text_columns if name not in (self._text, *selection.kept)]
        self._types = {name: types[name] for name in selection.kept if name != self._text}
        self._names = selection.columns
        self._is_exact = not {"int64", "double", JSON}.isdisjoint(self._types.values())

    def __call__(self, chunk: Chunk) -> tuple[pa.RecordBatch, dict[int, str]]:
        """Return the columns of the selection, and why each malformed line is null in them, by position."""
        faults = dict(chunk.faults)
        records = _records(chunk, faults, is_exact=self._is_exact)
        columns = {} if self._text is None else {self._text: _texts(records, self._text, faults)}
        for name in self._pieces:
            columns[name], found = pieces_of(name, [record.get(name) for record in records])
            faults = found | faults
        for name, kind in self._types.items():
            values = [record.get(name) for record in records]
            columns[name], found = column_of(name, kind, values)
            faults = found | faults
        return pa.record_batch([columns[name] for name in self._names], names=self._names), faults


def look(file: InputFile, first: Sequence[Chunk], selection: Selection) -> Look:
    """Tell the types of columns from the first lines."""
    if first and _NOT_LINES.match(first[0].part(0, 1).records()[0]):
        raise SourceError(
            f"the input {file.location} is one JSON value over several lines, or an array, not JSON lines: "
            "convert it, such as with `jq -c '.[]'`, or take it out of the source"
        )
    values: dict[str, list[Any]] = {name: [] for name in selection.columns}
    names: dict[str, None] = {}
    text_bytes = all_bytes = 0
    for chunk in first:
        faults = dict(chunk.faults)
        for at, record in enumerate(_records(chunk, faults, is_exact=True)):
            if at in faults:
                continue
            names |= dict.fromkeys(record)
            for name, found in values.items():
                if name in record:
                    found.append(record[name])
        all_bytes += int((chunk.ends - chunk.starts).sum())
    if names:
        shown = ", ".join(list(names)[:SHOWN_COLUMNS])
        for name in selection.text_columns:
            check_column(file, list(names), name, selection.advice_on(name), shown=shown)
    texts = (text for name in selection.text_columns for text in values[name])
    text_bytes = sum(len(text.encode(errors="replace")) for text in texts if type(text) is str)
    types = {name: type_of(found) if found else MISSING for name, found in values.items()}
    if selection.text_template is None:
        types[selection.text_column] = STRING
    return Look(types, text_bytes / all_bytes if all_bytes else 1.0)


def parser(file: InputFile, selection: Selection) -> Parser:
    """Make the parser of a file; its columns have the types of the job, or else those that its first lines tell."""
    types = {name: kind for name, kind in selection.kept_types.items() if name in selection.kept}
    typed = {*selection.kept} - ({selection.text_column} if selection.text_template is None else set())
    if not types.keys() >= typed:
        types = look(file, head(JSONL, file), selection).types | types
    return Parser(selection, {name: kind if kind in ARROW_TYPES else STRING for name, kind in types.items()})


JSONL = LineFormat("JSON lines", Lines(blank_is_row=False), look, parser)


def _records(chunk: Chunk, faults: dict[int, str], *, is_exact: bool) -> list[dict[str, Any]]:
    """
    Return the object of each line, an empty one for each that is malformed, whose reason goes to `faults`.

    Integers of more than 64 bits are floats, unless they have to be exact.
    """
    records: list[dict[str, Any]] = []
    for at, line in enumerate(chunk.records()):
        if at in faults:
            records.append({})
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            record = _carefully(line)
        if type(record) is not dict:
            faults[at] = record.reason if isinstance(record, _Malformed) else NO_OBJECT
            record = {}
        elif is_exact and _LONG_NUMBER.search(line):
            record = json.loads(line)
        records.append(record)
    return records


class _Malformed:
    """Stands for a line that is not JSON."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _carefully(line: bytes) -> Any:
    """Read what orjson refuses: half a character, NaN, or what no reader takes."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        return _Malformed(INVALID_UTF8)
    except (ValueError, RecursionError):
        return _Malformed(MALFORMED)


def _texts(records: Sequence[dict[str, Any]], name: str, faults: dict[int, str]) -> pa.Array:
    texts: list[str | None] = []
    for at, record in enumerate(records):
        text = record.get(name, _ABSENT)
        if text is not None and type(text) is not str:
            if at not in faults:
                faults[at] = f"no {name!r} in it" if text is _ABSENT else f"not a string: {type(text).__name__}"
            text = None
        texts.append(text)
    return _strings(texts, faults)


def _strings(texts: list[str | None], faults: dict[int, str]) -> pa.Array:
    try:
        return pa.array(texts, pa.string())
    except (UnicodeEncodeError, pa.ArrowException):
        for at, text in enumerate(texts):
            if text is not None and not is_encodable(text):
                faults[at] = SURROGATE
                texts[at] = None
        return pa.array(texts, pa.string())
