"""Sources: which files there are, how they are cut and read, and which texts can be embedded."""

from __future__ import annotations

import errno
import glob
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.errors import ConfigError, SourceChanged, SourceError
from engine.planning import cut
from engine.schema import SOURCE_ROW, TEXT, InputFile, Shard
from engine.sources import texts
from engine.sources.formats import read_shapes, read_shards
from engine.sources.inventory import list_inputs
from engine.sources.rows import Selection
from tests.builders import FINGERPRINT, Started, fail_below, write_source


def paths(*sources: object, **options) -> list[str]:
    return [file.path for file in list_inputs([str(source) for source in sources], **options).files]


# Listing


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files at several depths, hidden ones, and others that are no Parquet."""
    names = [
        "in/b.parquet",
        "in/a.parquet",
        "in/deep/er/c.pq",
        "in/.hidden.parquet",
        "in/_metadata.parquet",
        "in/_temporary/d.parquet",
        "in/.git/e.parquet",
        "in/deep/notes.md",
        "in/deep/.crc",
        "other/f.parquet",
    ]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_a_folder_is_all_parquet_below_it_but_what_is_hidden(folder):
    """In the order of paths, which are relative to it; names with a dot or an underscore first are not data."""
    inventory = list_inputs([str(folder / "in")])
    assert [file.path for file in inventory.files] == ["a.parquet", "b.parquet", "deep/er/c.pq"]
    assert inventory.base == str(folder / "in")


def test_a_file_is_known_by_its_size_and_its_time(folder):
    """What identifies an input is what a listing tells, without opening it."""
    path = folder / "in/a.parquet"
    file = list_inputs([str(path)]).files[0]
    status = path.stat()
    assert file == InputFile("a.parquet", str(path), status.st_size, str(status.st_mtime_ns))


def test_globs_match_files_at_any_depth(folder):
    """`*` one step, `**` any, `[ab]` one of some; folders that match are no files."""
    (folder / "in/folder.parquet").mkdir()
    assert paths(folder / "in/*.parquet") == ["_metadata.parquet", "a.parquet", "b.parquet"]
    assert paths(folder / "in/[a-z].parquet") == ["a.parquet", "b.parquet"]
    assert paths(folder / "in/**/*.pq") == ["deep/er/c.pq"]
    assert paths(folder / "*/[bf].parquet") == ["in/b.parquet", "other/f.parquet"]


def test_a_glob_and_its_folder_give_the_same_paths(folder):
    """So the shards are the same, however the source is spelt."""
    assert list_inputs([str(folder / "in/[a-z].parquet")]).base == list_inputs([str(folder / "in")]).base


@pytest.mark.parametrize("source", ["in", "in/**/*.pq", "in/**", "in/*/*/*.pq", "in/deep/*/c.pq", "in/d*/er/*"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_listed_is_an_error_that_names_it(folder, monkeypatch, source, number):
    """As if it were empty, its rows would be missing from the output, and nobody would know."""
    locked = "deep" if "deep/*" in source else "deep/er"
    unlisted(folder / "in" / locked, number, monkeypatch)
    with pytest.raises(SourceError, match=rf"in/{locked} cannot be read \({os.strerror(number)}\)"):
        paths(folder / source)


def test_a_folder_that_no_source_looks_into_may_be_unreadable(folder, monkeypatch):
    """Hidden ones, those that a glob passes by, one that is gone meanwhile, and that of a disk's file system."""
    expected = paths(folder / "in")
    (folder / "in/lost+found").mkdir()
    (folder / "in/gone").mkdir()
    for name, number in ((".git", errno.EACCES), ("lost+found", errno.EACCES), ("gone", errno.ENOENT)):
        unlisted(folder / "in" / name, number, monkeypatch)
    assert paths(folder / "in") == expected
    unlisted(folder / "in/deep", errno.EACCES, monkeypatch)
    assert paths(folder / "in/*.parquet") == ["_metadata.parquet", "a.parquet", "b.parquet"]


@pytest.mark.parametrize(
    "source", ["in/deep/er", "in/deep/er/c.pq", "in/deep/er/*.pq", "in/deep/*/c.pq", "in/no/../deep/er/c.pq"]
)
def test_a_path_that_may_not_be_looked_at_is_an_error_that_names_it(folder, monkeypatch, source):
    """A folder above it is another user's: nothing tells whether there is an input."""
    fail_below(folder / "in/deep", monkeypatch)
    with pytest.raises(SourceError, match=r"in/deep.* \(Permission denied\)"):
        paths(folder / source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("loop", "there is no file or folder"),
        ("x" * 300, r"cannot be looked at \(File name too long\)"),
        ("a\0b", "there is no file or folder"),
    ],
)
def test_a_path_that_leads_nowhere_is_a_message(folder, source, message):
    """A link to itself, a name that no disk takes, and one that is none."""
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(SourceError, match=message):
        paths(folder / source)


def test_a_home_folder_of_nobody_is_a_message(folder):
    """Of a source as of an output."""
    with pytest.raises(ConfigError, match="~no-such-user/in: there is no such user's home folder"):
        paths("~no-such-user/in")
    with pytest.raises(ConfigError, match="~no-such-user/out: there is no such user's home folder"):
        paths(folder / "in", outside="~no-such-user/out")


def test_an_output_that_is_a_link_to_itself_is_not_followed_for_ever(folder):
    """Whether it lies in the source can be told all the same."""
    (folder / "loop").symlink_to(folder / "loop")
    assert paths(folder / "other", outside=str(folder / "loop")) == ["f.parquet"]


def shapes_as_nobody(path: str) -> object:
    (file,) = list_inputs([path]).files
    if os.getuid() == 0:
        os.setuid(65534)
    return read_shapes([file], Selection("text"))


def test_a_file_that_may_not_be_read_is_not_said_to_be_damaged():
    """Its owner has it whole."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        write_source(Path(name, "a.parquet"), {"text": ["a"]})
        Path(name, "a.parquet").chmod(0)
        with pytest.raises(SourceError, match=r"a\.parquet cannot be read \(Permission denied\): make it readable"):
            Started(shapes_as_nobody, f"{name}/a.parquet").result()


def unlisted(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the listing of a folder fail: root may list them all."""
    scandir = os.scandir

    def failing(path="."):
        if Path(path) == folder:
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)


@pytest.mark.parametrize(
    "pattern",
    ["*", "**", "**/*", "*/*", "**/er/*", "**/deep/**", "d*/**/c.pq", "**/**", ".*", "**/.*", "[ab].parquet", "?.parquet",
     "**/*.parquet", "*/er/c.pq", "loop/*", "**/d.parquet", "a.parquet/*", "nothing/*"],
)  # fmt: skip
def test_a_pattern_matches_what_it_does_in_the_shell_of_python(folder, pattern):
    """`glob` itself is not asked, since it says nothing of folders that it cannot list."""
    (folder / "in/loop").symlink_to(folder / "in/deep")
    (folder / "in/deep/er" / ("long" * 60)).symlink_to(folder / "in/deep")
    (folder / "in/deep/dead.pq").symlink_to(folder / "nothing")
    found = sorted(path for path in glob.glob(f"{folder}/in/{pattern}", recursive=True) if os.path.isfile(path))  # noqa: PTH113, PTH207
    expected = {os.path.realpath(path): path for path in reversed(found)}.values()  # each file once
    if expected:
        assert {file.location for file in list_inputs([f"{folder}/in/{pattern}"]).files} == set(expected)
        return
    with pytest.raises(SourceError, match="no files match"):
        list_inputs([f"{folder}/in/{pattern}"])


def test_a_file_that_is_named_twice_counts_once(folder):
    """By its name, its folder and a glob."""
    assert paths(folder / "in", folder / "in/a.parquet", folder / "in/*.parquet") == [
        "_metadata.parquet",
        "a.parquet",
        "b.parquet",
        "deep/er/c.pq",
    ]


def test_the_order_of_sources_decides_nothing(folder):
    """The base is the nearest folder above all, and files are in the order of their paths."""
    one = list_inputs([str(folder / "in"), str(folder / "other")])
    assert one == list_inputs([str(folder / "other"), str(folder / "in")])
    assert one.base == str(folder)
    assert [file.path for file in one.files] == [
        "in/a.parquet",
        "in/b.parquet",
        "in/deep/er/c.pq",
        "other/f.parquet",
    ]


def test_a_relative_path_is_the_absolute_one(folder, monkeypatch):
    """A job may be submitted from its folder."""
    monkeypatch.chdir(folder)
    assert list_inputs(["in"]) == list_inputs([str(folder / "in")]) == list_inputs([f"file://{folder}/in"])
    monkeypatch.setenv("HOME", str(folder))
    assert list_inputs(["~/in"]) == list_inputs(["in"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty", "holds no files of a known format"),
        ("nothing", "there is no file or folder"),
        ("in/*.csv", "no files match"),
        ("in/**/nothing.parquet", "no files match"),
    ],
)
def test_a_source_that_names_nothing_is_an_error(folder, source, message):
    """A typing mistake must not look like a job that is done."""
    with pytest.raises(SourceError, match=message) as caught:
        list_inputs([str(folder / "in"), str(folder / source)])
    assert source in caught.value.message


def test_other_schemes_are_refused():
    """There is one message for what cannot be read, which does not quote it: there may be a password in it."""
    with pytest.raises(SourceError, match="ftp://: only files, folders and globs") as caught:
        list_inputs(["ftp://user:secret@host/texts"])
    assert "secret" not in caught.value.message


def test_an_input_inside_the_output_is_refused(folder):
    """A run would embed its own output."""
    with pytest.raises(SourceError, match="lies inside the output"):
        list_inputs([str(folder / "in")], outside=str(folder))
    assert paths(folder / "in", outside=str(folder / "in-2"))


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(folder):
    """A name that exists is never taken for a glob."""
    (folder / "in/x[1].parquet").touch()
    assert paths(folder / "in/x[1].parquet") == ["x[1].parquet"]


# Shapes


def test_a_shape_is_what_the_footer_says(tmp_path):
    """Rows of each group, the size of the text alone, and the types of the kept columns."""
    table = {"text": [f"text {row}" for row in range(10)], "id": list(range(10)), "wide": ["x" * 1000] * 10}
    file = write_source(tmp_path / "a.parquet", table, row_group_size=4, use_dictionary=False)
    shape = read_shapes([file], Selection("text", ("id",)))[0]
    assert (shape.row_groups, shape.num_rows) == ((4, 4, 2), 10)
    assert 60 < shape.text_bytes < 1000
    assert shape.kept_types == (("id", "int64"),)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.null(), pa.dictionary(pa.int32(), pa.string())],
)
def test_every_kind_of_text_column_is_taken(tmp_path, kind):
    """Strings of any layout, bytes, dictionaries, and a column of nulls alone."""
    values = pa.nulls(3) if pa.types.is_null(kind) else pa.array(["a", None, "b"]).cast(kind)
    file = write_source(tmp_path / "a.parquet", {"text": values})
    assert read_shapes([file], Selection("text"))[0].num_rows == 3
    table = next(read_shards([Shard.of(FINGERPRINT, file, 0, 3)], Selection("text"))).table
    assert texts.values_of(table[TEXT]) == ([None] * 3 if pa.types.is_null(kind) else ["a", None, "b"])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("body", r"has no column 'body'; it has: text, number, nested.*--text-column"),
        ("number", "is int64, not text"),
        ("nested", "not text"),
    ],
)
def test_a_column_that_is_missing_or_no_text_is_named(tmp_path, column, message):
    """The message says which file, and what there is instead."""
    table = {"text": ["a"], "number": [1], "nested": [["a"]]}
    file = write_source(tmp_path / "a.parquet", table)
    with pytest.raises(SourceError, match=message) as caught:
        read_shapes([file], Selection(column))
    assert file.location in caught.value.message


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv", "jsonl"])
def test_the_option_that_names_a_missing_column_is_said(tmp_path, suffix):
    """Of ids and kept columns, which --text-column has nothing to do with, as of a template's."""
    path = tmp_path / f"a.{suffix}"
    table = pa.table({"text": ["a"]})
    with pa.OSFile(str(path), "wb") as file:
        if suffix == "parquet":
            pq.write_table(table, file)
        elif suffix == "arrow":
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        else:
            file.write(b'{"text": "a"}\n' if suffix == "jsonl" else b"text\na\n")
    files = list_inputs([str(path)]).files
    with pytest.raises(
        SourceError, match=r"has no column 'year'.*\. It is named by --id-column or --keep: correct that$"
    ):
        read_shapes(files, Selection("text", ("year",)))
    with pytest.raises(SourceError, match=r"has no column 'body'.*\. Correct --text-template$"):
        read_shapes(files, Selection("text", text_template="{body}"))


def test_a_kept_column_of_another_type_in_one_file_is_refused(tmp_path):
    """Both files and both types are named: the parts would not read as one table."""
    same = [write_source(tmp_path / f"{name}.parquet", {"text": ["a"], "id": [1]}) for name in "abc"]
    odd = write_source(tmp_path / "odd.parquet", {"text": ["a"], "id": ["x"]})
    assert len(read_shapes(same, Selection("text", ("id",)))) == 3
    with pytest.raises(SourceError, match=r"odd\.parquet than in .*a\.parquet: id string against id int64"):
        read_shapes([*same, odd], Selection("text", ("id",)))
    assert len(read_shapes([*same, odd], Selection("text"))) == 4


@pytest.mark.parametrize("damage", ["zero bytes", "truncated", "garbage", "footer", "gone", "folder"])
def test_a_file_that_is_no_parquet_is_named(tmp_path, damage):
    """One message that says which file and what to do, and quotes nothing of it."""
    path = tmp_path / "a.parquet"
    file = write_source(path, {"text": ["secret text"]})
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        changed = {"zero bytes": b"", "truncated": data[:-5], "garbage": b"x" * 100, "footer": data[:-30] + data[-8:]}
        path.write_bytes(changed[damage])
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read as Parquet") as caught:
        read_shapes([file], Selection("text"))
    assert "secret" not in caught.value.message


def test_a_file_without_rows_has_an_empty_shape(tmp_path):
    """It is no error: writers leave such files behind."""
    file = write_source(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    assert read_shapes([file], Selection("text"))[0].num_rows == 0


# Reading shards

NUM_ROWS = 9000


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    """Texts of varying lengths, some null, beside ids and what nobody asks for."""
    values = [None if row % 97 == 0 else f"text {row} " * (row % 13) for row in range(NUM_ROWS)]
    return pa.table({"id": list(range(NUM_ROWS)), "text": values, "other": [1.5] * NUM_ROWS})


@pytest.mark.parametrize("select", [slice(None), slice(1, None, 2), slice(-1, None), slice(0, 1), slice(2, 4)])
@pytest.mark.parametrize(
    ("layout", "shard_rows"),
    [
        ({"row_group_size": NUM_ROWS}, 700),
        ({"row_group_size": NUM_ROWS}, 5000),
        ({"row_group_size": 10}, 256),
        ({"row_group_size": 1000}, 300),
        ({"row_group_size": 4097, "use_dictionary": False, "data_page_size": 1024}, 4096),
        ({"row_group_size": 2500, "compression": "zstd", "data_page_version": "2.0"}, 10**6),
    ],
)
def test_shards_hold_the_rows_that_a_plain_read_gives(tmp_path, rows, layout, shard_rows, select):
    """However the file is written and cut, and whichever shards are pending: columns asked for, and `_source_row`."""
    file = write_source(tmp_path / "a.parquet", rows, **layout)
    shape = read_shapes([file], Selection("text", ("id",)))[0]
    shards = [Shard.of(FINGERPRINT, file, *bounds) for bounds in cut(shape.row_groups, shard_rows)][select]
    tables = [rows.table for rows in read_shards(shards, Selection("text", ("id", "text")))]
    assert len(tables) == len(shards)
    for shard, table in zip(shards, tables, strict=True):
        wanted = rows.slice(shard.start, len(shard))
        assert table[TEXT].to_pylist() == table["text"].to_pylist() == wanted["text"].to_pylist()
        assert table["id"].to_pylist() == wanted["id"].to_pylist()
        assert table.column_names == [TEXT, "id", "text", SOURCE_ROW]
        np.testing.assert_array_equal(table[SOURCE_ROW], np.arange(shard.start, shard.stop))


def shards_of(path: Path) -> list[Shard]:
    file = write_source(path, {"text": [str(row) for row in range(100)]})
    return [Shard.of(FINGERPRINT, file, start, start + 10) for start in range(0, 100, 10)]


def rewrite(path: Path) -> None:
    write_source(path, {"text": ["other"] * 100})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda path: os.utime(path, ns=(1, 1)), SourceChanged, "changed while it was being read"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), SourceChanged, "changed while it was being read"),
        (rewrite, SourceChanged, "changed while it was being read"),
        (Path.unlink, SourceError, "cannot be read: No such file"),
    ],
)
def test_a_file_that_changes_gives_no_further_shard(tmp_path, change, error, message):
    """Before the first row and between two shards: an error that names the file, never rows of two versions."""
    path = tmp_path / "a.parquet"
    reading = read_shards(shards_of(path), Selection("text"))
    assert next(reading).table[TEXT].to_pylist() == [str(row) for row in range(10)]
    change(path)
    with pytest.raises(error, match=message) as caught:
        next(reading)
    assert str(path) in caught.value.message
    shards = shards_of(path)
    change(path)
    with pytest.raises(error, match=message):
        next(read_shards(shards, Selection("text")))


def test_a_shard_that_the_file_does_not_have_is_an_error(tmp_path):
    """Fewer rows than were planned are never taken for all."""
    file = shards_of(tmp_path / "a.parquet")[0].file
    with pytest.raises(SourceError, match="cannot be read as Parquet"):
        list(read_shards([Shard.of(FINGERPRINT, file, 90, 110)], Selection("text")))


def test_a_flipped_bit_in_a_source_with_page_checksums_is_noticed(tmp_path):
    """Checksums that a writer took the trouble to add are checked; another text is never embedded in their place."""
    path = tmp_path / "a.parquet"
    options = {"write_page_checksum": True, "compression": "none", "write_statistics": False}
    file = write_source(path, {"text": ["needle in a row"]}, **options)
    data = bytearray(path.read_bytes())
    data[data.index(b"needle")] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(int(file.version), int(file.version)))
    with pytest.raises(SourceError, match="damaged"):
        list(read_shards([Shard.of(FINGERPRINT, file, 0, 1)], Selection("text")))


# Texts

NASTY = st.one_of(
    st.none(),
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.text(st.sampled_from([" ", "\t", "\n", "\u00a0", "\u2003", "\u200b", "\0", "a", "é", "😀", "\ud800", "\udfff"])),
    st.integers(),
    st.binary(max_size=4),
)
REASONS = {texts.NULL, texts.EMPTY, texts.BLANK, texts.SURROGATE, "not a string: int", "not a string: bytes"}


@given(st.lists(NASTY))
@example(["\ud800", "a\udc80", "😀", "\0", " ", "", None, 1, b"x"])
def test_every_value_is_a_text_or_has_a_reason(values):
    """Positions cover all values once; each text is the value itself and can be encoded; no reason quotes a value."""
    found, positions, reasons = texts.split(values)
    assert sorted([*positions, *reasons]) == list(range(len(values)))
    assert positions == sorted(positions)
    assert found == [values[position] for position in positions]
    assert all(text.strip() and text.encode() for text in found)
    assert set(reasons.values()) <= REASONS


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null"),
        ("", "empty text"),
        (" \t\n", "blank text"),
        ("\u2003\u00a0", "blank text"),
        ("a\ud83d", "lone surrogate, not valid Unicode"),
        (5, "not a string: int"),
        (float("nan"), "not a string: float"),
        ("\0", None),
        ("a\0b", None),
        (" a ", None),
        ("😀", None),
        ("\u200b", None),
    ],
)
def test_what_cannot_be_embedded_has_one_reason(value, reason):
    """NUL and zero-width characters are text; null, nothing, blanks and halves of characters are not."""
    assert texts.reject_reason(value) == reason
    found, positions, reasons = texts.split([value])
    assert (found, positions, reasons) == (([value], [0], {}) if reason is None else ([], [], {0: reason}))


@given(st.lists(st.one_of(st.none(), st.binary(max_size=6), st.text(max_size=6).map(str.encode)), min_size=1))
@example([b"\xff", b"ok", None, b"", b"\xed\xa0\x80", b"a\x00b"])
def test_bytes_are_texts_where_they_are_utf_8(values):
    """In columns of bytes, of strings that were never checked, and of dictionaries: valid values survive their neighbours."""
    raw = pa.array(values, pa.binary())
    unchecked = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)
    wanted = [_decoded(value) for value in values]
    for column in (
        raw,
        unchecked,
        pa.chunked_array([unchecked]),
        unchecked.dictionary_encode(),
        raw.dictionary_encode(),
    ):
        got = texts.values_of(column)
        assert [value if isinstance(value, str) or value is None else texts.INVALID_UTF8 for value in got] == wanted
        assert texts.split(got)[0] == [
            text for text in wanted if text not in (None, texts.INVALID_UTF8) and text.strip()
        ]


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return texts.INVALID_UTF8


def test_bad_utf_8_in_a_string_column_of_a_file_is_a_reject(tmp_path):
    """Readers of Parquet do not check what is declared as UTF-8; the row is rejected and its neighbours are not."""
    raw = pa.array([b"good", b"\xff\xfe", b"nul \x00 here", None], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 4, raw.buffers(), 1)
    file = write_source(tmp_path / "a.parquet", {"text": column})
    assert pq.read_schema(file.location).field("text").type == pa.string()
    rows = next(read_shards([Shard.of(FINGERPRINT, file, 0, 4)], Selection("text")))
    found, positions, reasons = texts.texts_in(rows)
    assert (found, positions) == (["good", "nul \0 here"], [0, 2])
    assert reasons == {1: "not valid UTF-8", 3: "null"}


def test_a_link_to_a_folder_above_doubles_no_file(tmp_path):
    """A folder that is reached a second time is not walked a second time."""
    write_source(tmp_path / "in/a.parquet", {"text": ["a"]})
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    assert len(list_inputs([str(tmp_path / "in")]).files) == 1


def test_two_spellings_of_a_file_count_once(tmp_path):
    """`in/../in` is `in`."""
    write_source(tmp_path / "in/a.parquet", {"text": ["a"]})
    assert len(list_inputs([f"{tmp_path}/in", f"{tmp_path}/in/../in/a.parquet"]).files) == 1


@pytest.mark.parametrize("spelling", ["{}/out/data", "{}/in/../out/data", "{}/link/data"])
def test_an_input_inside_the_output_is_refused_however_it_is_spelt(tmp_path, spelling):
    """Dots, links and file:// do not hide it."""
    write_source(tmp_path / "out/data/a.parquet", {"text": ["a"]})
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for outside in (f"{tmp_path}/out", f"{tmp_path}/in/../out", f"file://{tmp_path}/out"):
        with pytest.raises(SourceError, match="inside the output"):
            list_inputs([spelling.format(tmp_path)], outside=outside)


def test_a_file_name_that_is_not_utf_8_is_a_message(tmp_path):
    """Such a name cannot be written into records."""
    write_source(tmp_path / "in/a.parquet", {"text": ["a"]})
    os.rename(tmp_path / "in/a.parquet", os.fsencode(tmp_path / "in") + b"/\xff.parquet")  # noqa: PTH104 - bytes
    with pytest.raises(SourceError):
        read_shapes(list_inputs([str(tmp_path / "in")]).files, Selection("text"))


def test_two_columns_of_one_name_are_a_message(tmp_path):
    """Which of them is the text cannot be told."""
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    file = write_source(tmp_path / "a.parquet", table)
    with pytest.raises(SourceError, match="2 columns named 'text'"):
        read_shapes([file], Selection("text"))


@pytest.mark.parametrize("source", ["{}/in", "{}/in/**/*.parquet", "{}/in/../in"])
def test_an_output_inside_the_source_is_refused_at_the_first_run(tmp_path, source):
    """Not only at the second, which would find the parts of the first."""
    write_source(tmp_path / "in/a.parquet", {"text": ["a"]})
    with pytest.raises(SourceError, match="lies inside the source folder"):
        list_inputs([source.format(tmp_path)], outside=f"{tmp_path}/in/out")
    assert list_inputs([f"{tmp_path}/in/*.parquet"], outside=f"{tmp_path}/in/out").files


def test_a_link_to_a_file_that_is_there_already_counts_once(tmp_path):
    """In one folder, and through another source."""
    write_source(tmp_path / "in/a.parquet", {"text": ["a"]})
    (tmp_path / "in/b.parquet").symlink_to(tmp_path / "in/a.parquet")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert len(list_inputs([f"{tmp_path}/in", f"{tmp_path}/link"]).files) == 1
