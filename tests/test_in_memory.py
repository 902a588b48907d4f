"""Sources in memory: what is a table, what is staged of it, and that it is the same again however it comes."""

from __future__ import annotations

import datetime as dt
import decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import engine
from engine.errors import ConfigError, SourceError
from engine.schema import FAULT, Shard
from engine.sources import in_memory, texts
from engine.sources.formats import read_shapes, read_shards
from engine.sources.opening import INPUTS
from engine.sources.rows import Selection
from engine.sources.table_kinds import is_in_memory
from engine.sources.tables import tables_of
from engine.storage import LocalStorage

HASH = "custom:tests.models.HashModel"
TEXTS = Selection("text", has_faults=True)
KEPT = Selection("text", ("id", "n"), has_faults=True)
VALUES = (
    st.none() | st.text(st.characters(codec="utf-8"), max_size=5) | st.sampled_from(["", " ", "\0", "a\0b", "é", "𝄞"])
)


class Kept:
    """A store that keeps what it is given: staging without a disk."""

    root = "/out"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create(self, name: str, data: bytes) -> bool:
        return self.files.setdefault(name, data) is data

    def replace(self, name: str, data: bytes) -> None:
        self.files[name] = data

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]

    def names(self, folder: str):
        yield from [name.rpartition("/")[2] for name in self.files]


def staged(source: Any, selection: Selection = KEPT, store: Any = None, **options: Any) -> str:
    return in_memory.stage(tables_of(source, selection), store or Kept(), selection, **options)


def files_of(source: Any, selection: Selection = KEPT) -> dict[str, str]:
    """Return the path and the version of each block."""
    store = Kept()
    return {file.path: file.version for file in in_memory.listed((staged(source, selection, store),), store).files}


def read_back(source: Any, tmp_path: Path, selection: Selection = KEPT) -> tuple[pa.Table, dict[int, str]]:
    """Return the first block as readers give it to actors, and what is wrong with its rows."""
    store = LocalStorage(str(tmp_path / "out"))
    file = in_memory.listed((staged(source, selection, store),), store).files[0]
    shape = read_shapes([file], selection)[0]
    rows = next(read_shards([Shard.of("f", file, 0, shape.num_rows)], selection))
    return rows.table, texts.texts_in(rows)[2]


# The same again


def in_every_library(rows: dict[str, list]) -> dict[str, Any]:
    table = pa.table(rows)
    frame = pd.DataFrame(rows)
    return {
        "a dict": rows,
        "dicts": [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)],
        "pandas": frame,
        "pandas, with an index": frame.set_index(pd.Index(range(100, 100 + len(frame)))),
        "pandas, objects": frame.astype(object),
        "pandas, categories": frame.astype({"id": "category"}),
        "polars": pl.DataFrame(rows),
        "Arrow": table,
        "Arrow, in pieces": pa.concat_tables([table.slice(row, 1) for row in range(table.num_rows)]),
        "Arrow, a slice": pa.concat_tables([table, table]).combine_chunks().slice(table.num_rows),
        "Arrow, large and views": table.cast(
            pa.schema([("id", pa.large_string()), ("text", pa.string_view()), ("n", pa.int64())])
        ),
        "Arrow, dictionaries": table.set_column(0, "id", table["id"].dictionary_encode()),
        "a reader": table.to_reader(max_chunksize=2),
        "a record batch": table.combine_chunks().to_batches()[0],
        "Hugging Face": datasets.Dataset.from_dict(rows),
        "Hugging Face, chosen rows": datasets.Dataset.from_dict({k: v[::-1] for k, v in rows.items()}).select(
            range(len(frame) - 1, -1, -1)
        ),
    }


def test_the_same_rows_have_the_same_names_from_every_library():
    """Whatever their index, chunks, slices, dictionaries, and layouts of strings; columns that are not read do not count."""
    rows = {"id": ["a", "b", "b", None], "text": ["one", "zwei", None, ""], "n": [1, 2, 3, 4]}
    found = {name: staged(source) for name, source in in_every_library(rows).items()}
    assert len(set(found.values())) == 1, found
    assert staged(pa.table(rows | {"more": [0.5] * 4})) in found.values()
    assert staged(rows | {"n": [1, 2, 3, 5]}) not in found.values()
    assert staged(rows | {"text": ["one", "zwei", "", None]}) not in found.values()
    one = {
        staged(source, TEXTS)
        for source in (["a b", "c", None], pd.Series(["a b", "c", None]), pl.Series(["a b", "c", None]))
    }
    assert one == {staged(pa.array(["a b", "c", None]), TEXTS)}


NESTED = pa.table(
    {
        "text": ["a", "b", None, "d"],
        "id": pa.array([["x"], None, [], ["y", None]], pa.list_(pa.string())),
        "n": pa.array([{"a": 1, "b": [True]}, None, {"a": None, "b": None}, {"a": 4, "b": []}]),
    }
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 4), max_size=4), st.integers(0, 3), st.data())
def test_nested_values_are_the_same_however_they_are_cut(cuts, start, data):
    """Lists, structs and what is below a null: hashed as values, not as buffers."""
    rows = NESTED.slice(start)
    ends = sorted({0, *(min(cut, len(rows)) for cut in cuts), len(rows)})
    pieces = pa.concat_tables([rows.slice(one, other - one) for one, other in pairwise(ends)])
    assert staged(pieces) == staged(pa.Table.from_pylist(rows.to_pylist(), rows.schema))


@settings(deadline=None, max_examples=60)
@given(st.lists(VALUES, min_size=1, max_size=8))
@example(["a\0", None, "\0"])
@example(["ab", "c"])
@example(["a", "bc"])
def test_only_equal_texts_have_equal_names(values):
    """Of nasty strings too; where one ends and the next begins counts."""
    name = staged({"text": values}, TEXTS)
    assert staged(pa.chunked_array([pa.array([value], pa.string()) for value in values]), TEXTS) == name
    assert staged(pl.Series(values, dtype=pl.String), TEXTS) == name
    others = ["".join(value or "" for value in values), *[None] * (len(values) - 1)]
    assert (staged({"text": others}, TEXTS) == name) == (others == values)
    assert staged({"text": [*values, None]}, TEXTS) != name


def test_what_lies_below_a_null_does_not_count():
    """Two arrays with the same values, one with remains of others in its buffers."""
    dirty = pa.Array.from_buffers(pa.int64(), 3, [pa.py_buffer(b"\x05"), pa.array([1, 99, 3]).buffers()[1]])
    clean = pa.array([1, None, 3])
    assert dirty.equals(clean)
    make = lambda ids: pa.table({"text": ["a"] * 3, "id": ids, "n": [1, 2, 3]})  # noqa: E731
    assert staged(make(dirty)) == staged(make(clean))


# Blocks


def test_a_block_that_changes_changes_no_other(monkeypatch):
    """Rows are cut at fixed positions, large ones earlier: an edit, or rows behind the last, leave the blocks before as they were."""
    monkeypatch.setattr(in_memory, "BLOCK_ROWS", 64)
    monkeypatch.setattr(in_memory, "PIECE_ROWS", 8)
    monkeypatch.setattr(in_memory, "BLOCK_BYTES", 4000)
    rows = [f"text {row}" for row in range(200)]
    rows[70:74] = ["long " * 300] * 4
    before = files_of(rows, TEXTS)
    assert len(before) > 4
    starts = [int(path.removeprefix("rows-")) for path in before]
    assert {0, 64, 128, 192} <= set(starts)
    edited = files_of([*rows[:80], "another text", *rows[81:]], TEXTS)
    assert {path for path in edited if edited[path] != before.get(path)} == {
        f"rows-{max(s for s in starts if s <= 80):012}"
    }
    longer = files_of([*rows, "one more"], TEXTS)
    assert {path for path in longer if longer[path] != before.get(path)} == {f"rows-{192:012}"}
    assert files_of([*rows[:192]], TEXTS) == {path: v for path, v in before.items() if path != f"rows-{192:012}"}


def test_blocks_without_an_order_are_named_by_content():
    """As Ray brings them: the same set is the same source; a block that is there twice counts twice."""
    tables = [pa.table({"text": [text], FAULT: pa.nulls(1, pa.string())}) for text in ("a", "b", "a")]
    names = {
        in_memory.stage([tables[i] for i in order], Kept(), TEXTS, is_ordered=False)
        for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2))
    }
    assert len(names) == 1
    store = Kept()
    source = in_memory.stage(tables, store, TEXTS, is_ordered=False)
    assert len({file.path for file in in_memory.listed((source,), store).files}) == 3
    assert len([name for name in store.files if name.endswith(".parquet")]) == 2
    assert names != {in_memory.stage(tables[:2], Kept(), TEXTS, is_ordered=False)}


def test_a_source_is_read_as_it_comes():
    """No more of it is asked for than the blocks before needed."""
    asked: list[int] = []

    def batches():
        for number in range(40):
            asked.append(number)
            yield pa.table({"text": ["x" * 10] * 8192, FAULT: pa.nulls(8192, pa.string())})

    cut = in_memory.blocks(batches(), TEXTS)
    assert next(cut).num_rows == in_memory.BLOCK_ROWS
    assert len(asked) <= 10


# Values


def test_what_is_no_text_is_a_reject_with_its_reason(tmp_path):
    """Of lists, of objects in pandas and of rows as dicts; lone surrogates, which Arrow does not take, among them."""
    rows = ["a text", None, 5, "", " ", "\ud800x", b"bytes", b"\xff", float("nan"), pd.NA, ["list"], "end\0"]
    reasons = {
        1: texts.NULL, 2: "not a string: int", 3: texts.EMPTY, 4: texts.BLANK, 5: texts.SURROGATE,
        7: texts.INVALID_UTF8, 8: texts.NULL, 9: texts.NULL, 10: "not a string: list",
    }  # fmt: skip
    for number, source in enumerate(
        (rows, {"text": rows}, pd.Series(rows, dtype=object), [{"text": row} for row in rows])
    ):
        table, found = read_back(source, tmp_path / str(number), TEXTS)
        assert found == reasons
        assert [table["_text"][row].as_py() for row in (0, 6, 11)] == ["a text", "bytes", "end\0"]


def test_a_template_takes_objects_that_are_numbers(tmp_path):
    """Beside strings, in one column."""
    selection = Selection("text", text_template="{a}/{b}", has_faults=True)
    table, found = read_back(
        {"a": ["x", 1, None, [2]], "b": [True, decimal.Decimal("1.5"), None, "y"]}, tmp_path, selection
    )
    assert table["_text"].to_pylist()[:3] == ["x/True", "1/1.5", None]
    assert found == {2: texts.NULL, 3: "not a string: list"}


def test_columns_of_every_type_are_kept(tmp_path):
    """Through the copy, as they were; what is not Unicode in one makes its row a reject."""
    day = dt.datetime(2026, 11, 25, 1, 2, 3, tzinfo=dt.UTC)
    kinds = {
        "timestamp": pa.array([day, None], pa.timestamp("us", "UTC")),
        "date": pa.array([day.date(), None]),
        "decimal": pa.array([decimal.Decimal("1.5"), None]),
        "bool": pa.array([True, None]),
        "half": pa.array([np.float16(0.5), None]),
        "duration": pa.array([dt.timedelta(1), None]),
        "binary": pa.array([b"\xff", None]),
        "fixed": pa.array([b"ab", None], pa.binary(2)),
        "list": pa.array([[1, None], None]),
        "fixed list": pa.array([[1.5, 2.5], None], pa.list_(pa.float32(), 2)),
        "struct": pa.array([{"a": {"b": ["c"]}}, None]),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int8())),
        "null": pa.nulls(2),
        "dictionary": pa.array(["x", None]).dictionary_encode(),
    }
    selection = Selection("text", tuple(kinds), has_faults=True)
    table, found = read_back(pa.table({"text": ["a", "b"]} | kinds), tmp_path, selection)
    assert not found
    for name, array in kinds.items():
        assert table[name].to_pylist() == array.to_pylist(), name
        assert table[name].type == (pa.string() if name == "dictionary" else array.type)
    table, found = read_back({"text": ["a", "b"], "id": ["x", "\udfff"], "n": [{"k": "\ud800"}, None]}, tmp_path, KEPT)
    assert found == {0: texts.SURROGATE, 1: texts.SURROGATE}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"text": ["a"], "id": [1], "n": [1, 2]}, "different numbers of rows: text 1, id 1, n 2"),
        ({"text": ["a", "b"], "id": [1, "x"], "n": [1, 2]}, "column 'id' has values of several types"),
        ({"text": ["a"], "id": [2**70], "n": [1]}, "column 'id' has values of several types, or"),
        ({"text": "abc", "id": [1], "n": [1]}, "column 'text' is a str: give a list"),
        ({"text": [1], "n": [1]}, "no column 'id'; it has: text, n"),
        (pd.DataFrame({"text": [1], "id": [1], "n": [1]}), "column 'text' of the table is int64, not text"),
        (pd.DataFrame([["a", "b", 1, 2]], columns=["text", "text", "id", "n"]), "2 columns named 'text'"),
        (["a text"], "no column 'id'; it has: text"),
        ([{"text": "a"}, "b"], "dicts and others"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})), r"source\['train'\]"),
        (datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), "IterableDataset"),
        (pl.LazyFrame({"text": ["a"]}), "collect"),
        ((text for text in "ab"), "generator"),
        (object(), "no table that is known"),
        (np.array([["a"], ["b"]]), "several dimensions|no column"),
    ],
)
def test_what_cannot_be_a_source_is_refused_with_what_to_do(source, message, tmp_path):
    """As a SourceError that quotes no value; nothing is written."""
    with pytest.raises(SourceError, match=message):
        engine.run(source=source, output=tmp_path / "out", model=HASH, id_column="id", keep=["n"])
    assert not list(tmp_path.rglob("*.json"))


def test_a_list_of_strings_is_never_guessed_at(tmp_path, monkeypatch):
    """Paths as before, texts where that is plain, and otherwise a question."""
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    for paths in (
        "in",
        Path("in"),
        ["a.parquet", "there"],
        ("a text", "another"),
        [Path("a b")],
        ["s3://a/b"],
        ["*.parquet"],
        [],
    ):
        assert not is_in_memory(paths)
    for rows in (
        ["a text", "another one"],
        ["a text", None],
        [1, 2],
        [{"text": "a"}],
        {"text": ["there"]},
        ["one", "two words"],
    ):
        assert is_in_memory(rows)
    for either in (["one", "two"], ["there", "a text"], ["a.parquet", "a text"]):
        with pytest.raises(SourceError, match=r"give texts as .* and paths as a tuple"):
            is_in_memory(either)


def test_a_folder_of_several_splits_is_refused_by_name(tmp_path):
    """What a DatasetDict saves holds several sources."""
    split = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "both")
    with pytest.raises(SourceError, match=r"several splits \(test, train\): name one, such as .*/both/test"):
        engine.plan(source=tmp_path / "both", output=tmp_path / "out", model=HASH)


def test_a_run_that_cannot_start_leaves_nothing_that_another_one_minds(tmp_path):
    """Its copy lies in the output, which is nobody's yet: another model and another source may have it."""
    with pytest.raises(ConfigError, match="no module"):
        engine.run(source=["a text", "b"], output=tmp_path / "out", model="custom:no.Such")
    assert len(list((tmp_path / "out" / INPUTS).iterdir())) == 2
    assert not (tmp_path / "out/_engine/job.json").exists()
    assert engine.plan(source=["another text"], output=tmp_path / "out", model=HASH).pending_rows == 1
    with pytest.raises(ConfigError, match="not an output"):
        engine.status(tmp_path / "out")
    for source in ("memory:", "memory:123", "memory:../../x"):
        with pytest.raises(SourceError, match="give the table again"):
            engine.plan(source=source, output=tmp_path / "out", model=HASH)


def test_a_plan_writes_nothing(tmp_path):
    """Not even of a source in memory, whose texts it counts for a provider."""
    options = {
        "source": ["a text", "a text", "b b"],
        "output": tmp_path / "out",
        "model": "openai:text-embedding-3-small",
    }
    found = engine.plan(**options)
    assert (found.pending_rows, found.forecast.num_duplicates) == (3, 1)
    assert not list(tmp_path.iterdir())
