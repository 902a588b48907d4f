"""Text templates: a text made of several columns."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.config import JobConfig, load_config, validated
from engine.errors import ConfigError, SourceError
from engine.schema import TEXT, Shard
from engine.sources import texts
from engine.sources.formats import read_shapes, read_shards
from engine.sources.rows import Rows, Selection
from tests.builders import make_shard, write_source

VALUES = (
    st.none()
    | st.text(st.characters(codec="utf-8"), max_size=4)
    | st.sampled_from([" ", "\t\x1c", "\x85\u3000", "\0", "{a}"])
)


def texts_of(template: str, columns: dict) -> tuple[dict[int, str], dict[int, str]]:
    """Return the texts and the reasons, by position, that an actor would see."""
    table = pa.table(columns)
    rows = Selection("text", text_template=template).finished(Rows(table), make_shard(table.num_rows))
    found, positions, reasons = texts.texts_in(rows)
    return dict(zip(positions, found, strict=True)), reasons


@settings(deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6))
@example([(" ", None), (None, None), ("", ""), ("\x1f", "\u2003")])
def test_a_text_is_what_python_would_make_of_the_row(rows):
    """Nulls are empty; a row whose columns are all null or blank is a reject, though the template's own words are not blank."""
    found, reasons = texts_of(
        "title: {a}\n{b}{{}}",
        {"a": pa.array([a for a, _ in rows], pa.string()), "b": pa.array([b for _, b in rows], pa.string())},
    )
    for position, (a, b) in enumerate(rows):
        if a is None and b is None:
            assert reasons[position] == texts.NULL
        elif not (a or "").strip() and not (b or "").strip():
            assert reasons[position] == texts.BLANK
        else:
            assert found[position] == f"title: {a or ''}\n{b or ''}{{}}"
    assert len(found) + len(reasons) == len(rows)


@pytest.mark.parametrize(
    ("array", "written"),
    [
        (pa.array([7, None, -1], pa.int8()), ["7", "", "-1"]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([1.0, 0.1, 1e20, None]), ["1.0", "0.1", "1e+20", ""]),
        (pa.array([0.1], pa.float32()), ["0.1"]),
        (pa.array([True, False, None]), ["True", "False", ""]),
        (pa.array(["1.50"]).cast(pa.decimal128(5, 2)), ["1.50"]),
        (pa.array([0]).cast(pa.int32()).cast(pa.date32()), ["1970-01-01"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"caf\xc3\xa9"]), ["café"]),
        (pa.array(["x"], pa.string_view()), ["x"]),
        (pa.nulls(1), [""]),
    ],
)
def test_numbers_are_written_as_python_writes_them(array, written):
    """Dates as ISO 8601, dictionaries and bytes as the strings that they hold."""
    found, _ = texts_of("{a} {b}", {"a": array, "b": ["."] * len(array)})
    assert list(found.values()) == [f"{text} ." for text in written]


def test_a_value_that_is_not_utf8_rejects_its_row_alone(tmp_path):
    """Declared as bytes, or as strings that nobody checked."""
    raw = pa.array([b"ok", b"\xff", None])
    for column in (raw, pa.Array.from_buffers(pa.string(), 3, raw.buffers())):
        found, reasons = texts_of("{a}{b}", {"a": column, "b": ["1", "2", "3"]})
        assert (found, reasons) == ({0: "ok1", 2: "3"}, {1: texts.INVALID_UTF8})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no column", "names no column"),
        ("{}", "names no column"),
        ("{a", "braces themselves"),
        ("a}", "braces themselves"),
        ("{a.b}", "more in it than the name"),
        ("{a[0]}", "more in it than the name"),
        ("{a!r}", "more in it than the name"),
        ("{a:>10}", "more in it than the name"),
    ],
)
def test_a_template_takes_plain_names_of_columns(template, message):
    """What else Python's formats can do is refused, with what to do."""
    with pytest.raises(ConfigError, match=message):
        load_config(source="in", output="out", text_template=template)


def test_a_template_is_what_decides_the_vectors(tmp_path):
    r"""It stands in the fingerprint in place of the text column; a shell's `\n` is a new line; stored and read again it is the same."""
    config = load_config(source="in", output="out", text_template=r"{title}\n\t{body}")
    assert config.text_template == "{title}\n\t{body}"
    decided = config.settings(frozenset())
    assert decided["text_template"] == config.text_template
    assert "text_column" not in decided
    assert "text_template" not in load_config(source="in", output="out").settings(frozenset())
    assert validated(JobConfig, config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match="give one of the two"):
        load_config(source="in", output="out", text_template="{a}", text_column="b")
    with pytest.raises(ConfigError, match="id_column is the text column"):
        load_config(source="in", output="out", text_template="{a}", id_column="a")


def test_files_are_read_and_planned_by_the_templates_columns(tmp_path):
    """The size of a text is that of its columns together; a column that is missing, or is no text, is named."""
    file = write_source(
        tmp_path / "in/a.parquet",
        {"id": [1, 2], "title": ["T" * 500, None], "year": [1999, None], "tags": [["a"], []]},
        use_dictionary=False,
    )
    selection = Selection("text", ("id",), text_template="{title} ({year})")
    shape = read_shapes([file], selection)[0]
    alone = read_shapes([file], Selection("title", ("id",)))[0]
    assert shape.text_bytes > alone.text_bytes > 500
    rows = next(read_shards([Shard.of("f", file, 0, 2)], selection))
    assert rows.table.column_names == [TEXT, "id", "_source_row"]
    assert texts.texts_in(rows)[0] == ["T" * 500 + " (1999)"]
    assert texts.texts_in(rows)[2] == {1: texts.NULL}
    with pytest.raises(SourceError, match="has no column 'body'"):
        read_shapes([file], Selection("text", text_template="{title}{body}"))
    with pytest.raises(SourceError, match=r"'tags' .* a text template takes"):
        read_shapes([file], Selection("text", text_template="{title}{tags}"))
