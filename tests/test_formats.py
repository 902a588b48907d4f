"""Formats: JSON lines, CSV, plain text and Arrow give what Parquet gives, and what is malformed is a reject with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.config import load_config
from engine.errors import FingerprintMismatch, Refused, SourceError
from engine.pipeline.datasource import passes
from engine.planning import cut
from engine.schema import SOURCE_ROW, START, TEXT, InputFile, Shard
from engine.sources import indexes, lines, records
from engine.sources.formats import FILES_AT_ONCE, read_shapes, read_shards, scan
from engine.sources.inventory import list_inputs
from engine.sources.records import Lines, Quoted, chunks
from engine.sources.rows import Selection
from engine.sources.shape import FileShape
from engine.sources.texts import SURROGATE, texts_in
from engine.storage import LocalStorage
from engine.survey import survey
from tests.builders import FINGERPRINT

ODD = [
    "plain",
    "two\nlines",
    'a "quote"',
    "comma, and\ttab",
    "\r\n",
    "a\rb",
    "nul \0 here",
    "\u2028 \u0085 \x1c sep",
    "😀 é",
    "\ufeffbom",
]
TEXTS = [f"{ODD[row % len(ODD)]} {row}" for row in range(200)]
IDS = [f"id-{row}" for row in range(200)]
WITH_COLUMNS = ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "A.JSONL"]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as the format that a file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bare, _, compression = path.name.lower().partition(".")[2].partition(".")
    if bare in ("parquet", "arrow", "ipc", "feather"):
        _write_table(path, bare, pa.Table.from_pylist(list(rows)))
        return path
    if bare in ("csv", "tsv"):
        sink = io.StringIO(newline="")
        writer = csv.DictWriter(sink, list(rows[0]), delimiter="," if bare == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        data = sink.getvalue().encode()
    elif bare == "txt":
        data = "".join(row["text"] + "\n" for row in rows).encode()
    else:
        data = "".join(json.dumps(row, ensure_ascii=bool(n % 2)) + "\n" for n, row in enumerate(rows)).encode()
    write_bytes(path, data, compression)
    return path


def _write_table(path: Path, kind: str, table: pa.Table) -> None:
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=64)
    elif kind == "feather":
        feather.write_feather(table, str(path), compression="lz4", chunksize=50)
    else:
        with (pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file)(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=30)


def write_bytes(path: Path, data: bytes, compression: str = "") -> InputFile:
    encode = {"gz": gzip.compress, "zst": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True), "": bytes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode[compression](data))
    return list_inputs([str(path)]).files[0]


def shards_of(shape: FileShape, shard_rows: int) -> list[Shard]:
    """Cut a file as planning does."""
    return [Shard.of(FINGERPRINT, shape.file, *bounds) for bounds in shape.placed(cut(shape.row_groups, shard_rows))]


Read = tuple[list[str | None], list[list[Any]], dict[int, str]]


def read(files: Path | InputFile, selection: Selection, shard_rows: int = 10**6, every: int = 1) -> Read:
    """Read a source through to texts: for each row its text or None, its kept values, and the reasons of what has no text."""
    inputs = [files] if isinstance(files, InputFile) else list_inputs([str(files)]).files
    shapes = read_shapes(inputs, selection)
    selection = replace(selection, kept_types=dict(shapes[0].kept_types))
    shards = [shard for shape in shapes for shard in shards_of(shape, shard_rows)][::every]
    texts: list[str | None] = []
    kept: list[list[Any]] = []
    reasons: dict[int, str] = {}
    for shard, rows in zip(shards, read_shards(shards, selection), strict=True):
        np.testing.assert_array_equal(rows.table[SOURCE_ROW], np.arange(shard.start, shard.stop))
        assert rows.table.column_names == [TEXT, *selection.kept, SOURCE_ROW]
        found, positions, why = texts_in(rows)
        assert sorted([*positions, *why]) == list(range(len(shard)))
        reasons |= {len(texts) + at: reason for at, reason in why.items()}
        by_position = dict(zip(positions, found, strict=True))
        texts += [by_position.get(at) for at in range(len(shard))]
        kept += [list(row) for row in zip(*(rows.table[name].to_pylist() for name in selection.kept), strict=True)]
    return texts, kept, reasons


@contextmanager
def small_pieces(read_bytes: int, block_bytes: int) -> Iterator[None]:
    """Let files of a few lines take several reads and blocks."""
    with patch.object(records, "READ_BYTES", read_bytes), patch.object(lines, "BLOCK_BYTES", block_bytes):
        yield


# The same as Parquet


@pytest.mark.parametrize(
    "name",
    [
        *(f"{name}{suffix}" for name in (*WITH_COLUMNS, "a.txt") for suffix in ("", ".gz", ".zst")),
        *("a.arrow", "a.ipc", "a.feather"),
    ],
)
def test_every_format_gives_the_texts_and_ids_that_parquet_gives(tmp_path, name):
    """Plain and compressed, cut into shards of any size, all of them or every second, as strings with newlines, quotes and NUL."""
    is_text = name.startswith("a.txt")
    texts = [text.replace("\n", " ").replace("\r", " ") for text in TEXTS] if is_text else TEXTS
    rows = [
        {"text": text} if is_text else {"id": key, "text": text, "n": 1} for key, text in zip(IDS, texts, strict=True)
    ]
    selection = Selection("text", () if is_text else ("id",))
    wanted = read(write(tmp_path / "p/a.parquet", rows), selection)
    assert wanted[0] == texts
    path = write(tmp_path / name, rows)
    for shard_rows, read_bytes, block_bytes in ((10**6, 1 << 20, 1 << 20), (7, 64, 100), (40, 1000, 333)):
        with small_pieces(read_bytes, block_bytes):
            assert read(path, selection, shard_rows) == wanted
            some = read(path, selection, shard_rows, every=2)
    assert set(some[0]) < set(wanted[0])


# All that can be in a file

NASTY = st.text(
    st.one_of(st.characters(exclude_categories=()), st.sampled_from("\",\t\n\r\0\ufeff\u2028\ud800\udfff\\{}[]' a😀")),
    max_size=12,
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    NASTY,
    st.lists(st.integers(), max_size=2),
)


@settings(max_examples=40)
@given(st.lists(st.tuples(NASTY, VALUES), min_size=1, max_size=12), st.sampled_from([7, 1 << 20]), st.integers(1, 40))
@example([("\ud800", 2**64), ("x", 1.5), ("\ufeff", True)], 7, 1)
@example([('"', '"'), ('a"b', ""), ("", None)], 7, 1)
def test_a_row_comes_back_as_it_was_or_is_a_reject_with_a_reason(rows, read_bytes, block_bytes):
    """Whatever the strings and the types beside them, as JSON lines, CSV, Parquet and Arrow: no row is lost, none is another."""
    with tempfile.TemporaryDirectory() as folder, small_pieces(read_bytes, block_bytes):
        data = "".join(json.dumps({"text": text, "x": value}) + "\n" for text, value in rows).encode()
        texts, kept, reasons = read(write_bytes(Path(folder, "a.jsonl"), data), Selection("text", ("x",)), 3)
        assert len(texts) == len(rows)
        for at, (text, value) in enumerate(rows):
            if at in reasons:
                assert not text.strip() or not encodable(text) or not encodable(value), reasons[at]
            else:
                assert texts[at] == text
                assert_same(kept[at][0], value)
        good = [(text, value) for text, value in rows if encodable(text)] or [("x", None)]
        strings = [(text, json.dumps(value)) for text, value in good]
        for name in ("a.csv", "a.tsv", "a.parquet", "a.arrow"):
            path = write(
                Path(folder, name.replace(".", "/f.")), [{"text": text, "x": value} for text, value in strings]
            )
            texts, kept, reasons = read(path, Selection("text", ("text", "x")), 3)
            assert kept == [[text, value] for text, value in strings], name
            assert texts == [text if text.strip() else None for text, _ in strings], name


def encodable(value: Any) -> bool:
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def assert_same(stored: Any, value: Any) -> None:
    """What was stored is the value, or its JSON text where the column holds several types."""
    if stored != value:
        assert json.loads(stored) == value


@settings(max_examples=200)
@given(
    st.binary(max_size=80) | st.text(st.sampled_from('",\n\ra'), max_size=60).map(str.encode),
    st.sampled_from([1, 2, 5, 16]),
)
@example(b'h\n"a\nb\nc\n', 1)
@example(b'h\n"a"\r"x\ny",1\n', 3)
@example(b'"a""\n",b\n"', 2)
@example(b"\xfe\xff", 1)
@example(records.BOM + b"a\n", 1)
def test_records_are_the_same_however_their_bytes_come(data, read_bytes):
    """Byte by byte or all at once, no byte is in two records, none but blank lines is in none; and from each place the rest follows. UTF-16 has no records."""
    for splitter in (Lines(blank_is_row=True), Lines(blank_is_row=False), Quoted(",")):
        with patch.object(records, "MAX_QUOTED_BYTES", 20), patch.object(records, "MAX_RECORD_BYTES", 40):
            whole = found(data, splitter, START)
            with patch.object(records, "READ_BYTES", read_bytes):
                assert found(data, splitter, START) == whole
                for at, (_, place, _) in enumerate(whole):
                    assert found(data, splitter, place) == whole[at:]
        body = data.removeprefix(records.BOM)
        if not any(reason for _, _, reason in whole) and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            kept = b"".join(record for record, _, _ in whole)
            assert kept.translate(None, b" \t\n\r\x0b\x0c") == body.translate(None, b" \t\n\r\x0b\x0c")


def found(data: bytes, splitter: Any, place: Any) -> list[tuple[bytes, Any, str | None]]:
    stream = pa.BufferReader(data)
    stream.seek(place.offset)
    try:
        return [
            (record, chunk.place(at), chunk.faults.get(at))
            for chunk in chunks(stream, splitter, place)
            for at, record in enumerate(chunk.records())
        ]
    except records.WrongEncoding:
        return []


@given(
    st.lists(
        st.lists(st.text(st.sampled_from('",\n\ra é'), max_size=8), min_size=2, max_size=2), min_size=1, max_size=20
    ),
    st.integers(1, 30),
)
def test_csv_is_divided_where_the_standard_library_divides_it(rows, read_bytes):
    """Quotes, newlines and commas inside of quotes, in pieces of any size."""
    sink = io.StringIO(newline="")
    csv.writer(sink).writerows(rows)
    with patch.object(records, "READ_BYTES", read_bytes):
        got = [
            next(csv.reader([record.decode()])) for record, _, _ in found(sink.getvalue().encode(), Quoted(","), START)
        ]
    assert got == rows


# Rejects


def test_what_is_malformed_in_json_lines_is_a_reject_with_its_line(tmp_path):
    """Each kind has its reason, which names the line where that is not the row's number, and its neighbours are read."""
    rows = [
        b'{"text": "first", "n": 1}', b"{oops", b"[1]", b"5", b'{"n": 1}', b'{"text": null}', b'{"text": 5}', b'{"text": {"a": 1}}',
        b'{"text": "half \\ud83d"}', b'{"text": "\xff"}', b'{"text": "NUL \\u0000 survives", "n": NaN}', b"", b"  \t", b'{"text": "", "n": 3}',
        b'{"text": "late", "n": "four"}', b'{"text": "last", "n": 5}',
    ]  # fmt: skip
    selection = Selection("text", ("n",), {"n": "int64"})
    file = write_bytes(tmp_path / "a.jsonl", records.BOM + b"\r\n".join(rows))
    shape = FileShape(file, (14,), 0, ())
    got = next(read_shards(shards_of(shape, 100), selection))
    texts, positions, reasons = texts_in(got)
    assert dict(zip(positions, texts, strict=True)) == {0: "first", 13: "last"}
    assert reasons == {
        1: "malformed JSON", 2: "not a JSON object", 3: "not a JSON object", 4: "no 'text' in it", 5: "null",
        6: "not a string: int", 7: "not a string: dict", 8: "lone surrogate, not valid Unicode", 9: "not valid UTF-8",
        10: "column 'n' is not int64", 11: "empty text", 12: "column 'n' is not int64 (line 15)",
    }  # fmt: skip
    assert got.table["n"].to_pylist() == [1, *[None] * 3, 1, *[None] * 6, 3, None, 5]


def test_what_is_malformed_in_csv_is_a_reject_with_its_line(tmp_path):
    """Too many or too few fields, bytes that are not UTF-8, a quote that is never closed: that row alone."""
    data = b'text,id\nfirst,1\n\none field\na,b,c\n"two\nlines",2\n\xff,3\n5" disk,4\n"abc"def,5\n"never closed,6\nlast,7\n'
    file = write_bytes(tmp_path / "a.csv", records.BOM + data)
    texts, kept, reasons = read(file, Selection("text", ("id",)))
    assert texts == ["first", None, None, "two\nlines", None, '5" disk', "abcdef", None, "last"]
    assert [key for (key,) in kept] == ["1", None, None, "2", None, "4", "5", None, "7"]
    assert reasons == {
        1: "1 fields where the header has 2 (line 4)",
        2: "3 fields where the header has 2 (line 5)",
        4: "not valid UTF-8 (line 8)",
        7: "a quote in it is not closed (line 11)",
    }


def test_a_record_that_is_too_long_is_a_reject_and_its_neighbours_are_not(tmp_path):
    """In every format of lines, wherever the buffers end; a row a file likewise."""
    giant = "x" * 500
    with patch.object(records, "MAX_RECORD_BYTES", 300), patch.object(records, "READ_BYTES", 64):
        for name, head, around in (("a.jsonl", "", '{"text": "%s"}'), ("a.csv", "text\n", '"%s"'), ("a.txt", "", "%s")):
            data = head + "".join(around % text + "\n" for text in ("before", giant, "after", giant))
            texts, _, reasons = read(write_bytes(tmp_path / name, data.encode()), Selection("text"), 2)
            assert (texts, set(reasons)) == (["before", None, "after", None], {1, 3})
            assert set(reasons.values()) == {records.TOO_LONG}


def test_plain_text_is_a_row_a_line_or_a_row_a_file(tmp_path):
    """Blank lines are rows too, so that a row's number is its line; only a newline ends a line, with or without a return."""
    folder = tmp_path / "in"
    write_bytes(folder / "a.txt", records.BOM + "one\r\n\n\u2028two\rthree\nlast".encode())
    write_bytes(folder / "b.txt.gz", b"\xff\n", "gz")
    texts, _, reasons = read(folder, Selection("text"))
    assert texts == ["one", None, "\u2028two\rthree", "last", None]
    assert reasons == {1: "empty text", 4: "not valid UTF-8"}
    texts, _, reasons = read(folder, Selection("text", text_rows="file"))
    assert (texts, reasons) == (["one\r\n\n\u2028two\rthree\nlast", None], {1: "not valid UTF-8"})
    with pytest.raises(SourceError, match=r"a\.txt is plain text and has no column 'id'"):
        read(folder, Selection("text", ("id",)))


# Many files


def test_while_one_file_takes_long_no_more_than_a_group_is_looked_at_ahead(tmp_path):
    """All shapes, in the order of the files; a million files that wait for a thread would take gigabytes on the driver."""
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    one = list_inputs([str(tmp_path)]).files[0]
    files = [replace(one, path=f"{number}.jsonl") for number in range(FILES_AT_ONCE + 50)]
    numbers = {indexes.key(file): number for number, file in enumerate(files)}
    is_group_begun, is_next_begun = threading.Event(), threading.Event()
    found: list[bool] = []

    class Known(dict[str, dict[str, Any]]):
        def get(self, key: str, default: Any = None) -> Any:
            if numbers[key] == FILES_AT_ONCE - 1:
                is_group_begun.set()
            elif numbers[key] == FILES_AT_ONCE:
                is_next_begun.set()
            elif numbers[key] == 0:
                found.extend((is_group_begun.wait(60), is_next_begun.wait(0.5)))
            return default

    assert [shape.file for shape in scan(files, Selection("text"), Known())] == files
    assert found == [True, False]


# Types


def test_types_are_told_from_the_first_rows_of_all_files_together(tmp_path):
    """Integers beside floats are floats, nested and mixed values are JSON, what has no value is a string; nothing is rounded."""
    one = [{"text": "a", "i": 1, "f": 1, "s": "x", "b": True, "n": None, "j": {"k": [1]}, "big": 2**64, "m": 1}]
    two = [{"text": "b", "i": None, "f": 2.5, "s": None, "j": 2**80, "m": "x"}]
    write(tmp_path / "1.jsonl", [*one, {"text": "c", "m": "y"}])
    write(tmp_path / "2.jsonl.zst", two)
    columns = ("i", "f", "s", "b", "n", "j", "big")
    files = list_inputs([str(tmp_path)]).files
    shapes = read_shapes(files, Selection("text", columns))
    kinds = dict(shapes[0].kept_types)
    assert kinds == dict(shapes[1].kept_types)
    assert list(kinds.values()) == ["int64", "double", "string", "bool", "string", "json", "json"]
    _, kept, reasons = read(tmp_path, Selection("text", columns))
    assert kept == [
        [1, 1.0, "x", True, None, '{"k":[1]}', str(2**64)],
        [None] * 7,
        [None, 2.5, None, None, None, str(2**80), None],
    ]
    assert not reasons


def test_files_whose_types_differ_are_named(tmp_path):
    """Both, as for Parquet; and the one that does not fit what the output was begun with."""
    write(tmp_path / "1.jsonl", [{"text": "a", "x": 1}])
    write(tmp_path / "2.jsonl", [{"text": "a", "x": "one"}])
    files = list_inputs([str(tmp_path)]).files
    with pytest.raises(SourceError, match=r"2\.jsonl than in .*1\.jsonl: x string against x int64"):
        read_shapes(files, Selection("text", ("x",)))
    assert len(read_shapes(files, Selection("text"))) == 2
    with pytest.raises(SourceError, match=r"2\.jsonl than the output was begun with: x string against x double"):
        read_shapes(files, Selection("text", ("x",), {"x": "double"}))
    with pytest.raises(SourceError, match="has no column 'y'"):
        read_shapes(files, Selection("text", ("y",)))


# What is refused


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16, not UTF-8"),
        ("a.csv", "text\na".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("a.txt", "secret".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("a.json", b'[{"text": "secret"},\n{"text": "b"}]', "not JSON lines"),
        ("a.json", b'{\n  "text": "secret"\n}', "not JSON lines"),
        ("a.jsonl", b'{"body": "secret"}', r"has no column 'text'; it has: body"),
        ("a.csv", b"secret words of a text,body\n", r"has no column 'text'; it has: …, body \(its first line has to be a header\)"),
        ("a.csv", b"text,text\na,b\n", "2 columns named 'text'"),
        ("a.csv", b"\xff,text\na,b\n", "is no header of CSV in UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "secret"}\n' * 99, mtime=0)[:-9], "cannot be read as JSON lines"),
        ("a.csv.zst", b"secret", "cannot be read as CSV"),
        ("a.txt.gz", b"", None),
        ("a.jsonl", b"", None),
        ("a.csv", b"", None),
        ("a.csv", b"text\n", None),
        ("a.arrow", b"", "cannot be read as Arrow"),
        ("a.arrow", b"secret" * 99, "cannot be read as Arrow"),
        ("a.feather", b"FEA1" + b"secret" * 9, "first version of Feather"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_as_a_whole_is_named_and_not_quoted(tmp_path, name, data, message):
    """One message that names the file and says what to do; a file without rows is none."""
    file = write_bytes(tmp_path / name, data)
    if message is None:
        assert read_shapes([file], Selection("text"))[0].num_rows == 0
        return
    with pytest.raises(SourceError, match=message) as caught:
        read_shapes([file], Selection("text"))
    assert str(tmp_path / name) in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("name", ["a.arrow", "a.ipc"])
def test_arrow_that_is_cut_or_damaged_is_a_message(tmp_path, name):
    """Wherever it is cut, and whatever byte of it is another: an error that names the file, or rows; never a crash."""
    path = write(tmp_path / name, [{"text": text} for text in TEXTS[:50]])
    data = path.read_bytes()
    damaged = [data[:size] for size in range(0, len(data), 97)]
    damaged += [data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :] for at in range(0, len(data), 61)]
    num_refused = 0
    for number, content in enumerate(damaged):
        try:
            read(write_bytes(tmp_path / f"{number}.{name}", content), Selection("text"))
        except SourceError as error:
            num_refused += f"{number}.{name}" in error.message
    assert num_refused > len(damaged) / 3


def test_a_folder_is_of_one_format(tmp_path):
    """Compressed or not; two files of two formats are named. What Hugging Face puts beside its Arrow files is not data."""
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    write(tmp_path / "b.jsonl.gz", [{"text": "b"}])
    write(tmp_path / "c.md", [{"text": "c"}])
    assert read(tmp_path, Selection("text"))[0] == ["a", "b"]
    write(tmp_path / "d.csv", [{"text": "d"}])
    with pytest.raises(SourceError, match=r"two formats, .*a\.jsonl \(JSON lines\) and .*d\.csv \(CSV\)"):
        read(tmp_path, Selection("text"))
    write(tmp_path / "saved/data-0.arrow", [{"text": "e"}])
    write_bytes(tmp_path / "saved/dataset_info.json", b"{}")
    write_bytes(tmp_path / "saved/state.json", b"{}")
    assert read(tmp_path / "saved", Selection("text"))[0] == ["e"]
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match=r"\.parquet, \.pq, \.jsonl, \.ndjson, \.json, \.csv"):
        list_inputs([str(tmp_path / "none")])


def test_a_template_gives_the_same_texts_from_every_format(tmp_path):
    """Numbers and truth values as Python writes them, nothing for null or what is not there; what is nested is a reject."""
    rows = [
        {"id": "0", "title": "t", "year": 1999, "good": True},
        {"id": "1", "title": None, "year": 2000, "good": False},
        {"id": "2", "title": "ü", "year": None, "good": None},
    ]
    selection = Selection("text", ("id",), text_template="{title} ({year}) {good}")
    expected = ["t (1999) True", " (2000) False", "ü () "]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    feather.write_feather(pa.Table.from_pylist(rows), tmp_path / "a.arrow")
    write_bytes(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_bytes(tmp_path / "a.csv", b"id,title,year,good\n0,t,1999,True\n1,,2000,False\n2,\xc3\xbc,,\n")
    for name in ("a.parquet", "a.arrow", "a.jsonl", "a.csv"):
        file = list_inputs([str(tmp_path / name)]).files[0]
        assert read(file, selection, 2) == (expected, [[row["id"]] for row in rows], {})
    odd = [{"id": "0", "year": 0.5}, {"id": "1", "title": ["x"]}, {"id": "2", "title": "\ud800"}]
    file = write_bytes(tmp_path / "b.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, *odd]).encode())
    texts, _, reasons = read(file, selection)
    assert texts == [*expected, " (0.5) ", None, None]
    assert reasons == {4: "column 'title' is no text or number: list", 5: f"column 'title': {SURROGATE}"}
    with pytest.raises(SourceError, match="has no column 'body'"):
        read(file, replace(selection, text_template="{title}{body}"))
    plain = write_bytes(tmp_path / "c.txt", b"a\nb\n")
    assert read(plain, Selection("text", text_template="passage: {text}"))[0] == ["passage: a", "passage: b"]


# Planning and reading in parts


def test_a_file_of_lines_is_read_from_the_middle_and_a_compressed_one_by_one_reader(tmp_path):
    """A shard at the end of a plain file does not take what is before it; the parcels of a compressed one stay together."""
    rows = [{"text": "x" * 1000, "id": row} for row in range(500)]
    with small_pieces(4096, 20_000):
        for name in ("a.jsonl", "a.csv"):
            path = write(tmp_path / name, rows)
            shards = shards_of(read_shapes(list_inputs([str(path)]).files, Selection("text"))[0], 20)
            assert shards[-1].place.offset > path.stat().st_size * 0.9
            text = path.read_bytes()
            stat = path.stat()
            path.write_bytes(text[:2000] + b"\xff\n\0" * 30_000 + text[92_000:])  # nothing of it is looked at
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            assert path.stat().st_size == stat.st_size
            got = next(read_shards(shards[-1:], Selection("text")))
            assert got.table[TEXT].to_pylist() == ["x" * 1000] * len(shards[-1])
    parcels = {}
    for name in ("b.jsonl", "b.jsonl.gz", "c.jsonl.gz"):
        shape = read_shapes(list_inputs([str(write(tmp_path / name, rows))]).files, Selection("text"))[0]
        parcels[name] = [(shard,) for shard in shards_of(shape, 10)]
    assert len(list(passes(parcels["b.jsonl"], 8))) == 8
    both = list(passes(parcels["b.jsonl.gz"] + parcels["c.jsonl.gz"], 8))
    assert [{shard.file.path for parcel in one for shard in parcel} for one in both] == [{"b.jsonl.gz"}, {"c.jsonl.gz"}]


def test_what_a_scan_found_is_kept_in_the_output_and_no_file_is_scanned_again(tmp_path, monkeypatch):
    """A second survey opens no input; a new file is scanned alone; a bundle that is damaged is as good as none."""
    source, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.jsonl", "b.jsonl.gz"):
        write(source / name, [{"text": text, "n": n} for n, text in enumerate(TEXTS)])
    config = load_config(
        source=str(source), output=str(out), keep=("n",), shard_rows=20, model="custom:tests.models.HashModel"
    )
    with small_pieces(256, 500):
        first = survey(config)
        assert not out.exists()
        storage = LocalStorage(str(out))
        first.ledger.claim(first.job)
        indexes.save(storage, first.found)
        opened: list[str] = []
        from engine.sources import compression

        real = compression.open_input
        monkeypatch.setattr(compression, "open_input", lambda file: opened.append(file.path) or real(file))
        second = survey(config)
        assert (opened, second.found) == ([], ())
        assert second.standing == first.standing
        places = [shard.place for shard in second.standing.plan.pending]
        assert places == [shard.place for shard in first.standing.plan.pending]
        assert len(set(places)) > 2
        write(source / "c.jsonl", [{"text": "new", "n": 1}])
        third = survey(config)
        assert (set(opened), [shape.file.path for shape in third.found]) == ({"c.jsonl"}, ["c.jsonl"])
        bundle = next((out / indexes.FOLDER).iterdir())
        bundle.write_bytes(bundle.read_bytes()[:-1])
        assert len(survey(config).found) == 3
        write(source / "d.jsonl", [{"text": "new", "n": "another type"}])
        with pytest.raises(SourceError, match=r"d\.jsonl than the output was begun with"):
            survey(config)
        (source / "d.jsonl").unlink()
        with pytest.raises(FingerprintMismatch, match="text_rows"):
            survey(config.model_copy(update={"text_rows": "file"}))
        with pytest.raises(Refused, match="keep"):
            survey(config.model_copy(update={"keep": ()}))
