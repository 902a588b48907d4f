"""A part: it describes itself, and damage to it is noticed."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.commits import CommitRecord, Usage
from engine.errors import CorruptOutput
from engine.part import decode, encode, vectors_of
from engine.part_checks import check
from engine.schema import EMBEDDING, PART_METADATA, SOURCE_ROW, TEXT_HASH, Reject, content_hash, vectors_type
from tests.builders import FINGERPRINT, USAGE, make_rejects, make_shard, make_table

NAME = "data/part-x.parquet"


def encoded(num_rows: int = 10, dimension: int = 4) -> bytes:
    shard = make_shard(num_rows)
    table = make_table(shard, dimension=dimension)
    return encode(table, shard=shard, fingerprint=FINGERPRINT, rejects=make_rejects(shard), usage=USAGE)


def test_what_is_encoded_is_decoded():
    """Rows, rejects and usage come back as they were, and the record says what the bytes are."""
    data, shard = encoded(), make_shard()
    part = decode(data, NAME)
    assert part.table.equals(make_table(shard))
    assert list(part.rejects) == make_rejects(shard)
    record = part.record
    assert (record.shard_id, record.fingerprint, record.usage) == (shard.id, FINGERPRINT, USAGE)
    assert (record.path, record.size, record.version) == (shard.file.path, shard.file.size, shard.file.version)
    assert (record.num_rows, record.num_rejects, record.reasons, record.dimension) == (8, 2, {"null": 2}, 4)
    assert (record.num_bytes, record.checksum) == (len(data), content_hash(data))


def test_a_record_is_read_as_it_was_written():
    """To bytes and back, and the same bytes again."""
    record = decode(encoded(), NAME).record
    assert CommitRecord.from_bytes(record.to_bytes(), "x") == record
    assert decode(encoded(), NAME).record.to_bytes() == record.to_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop("checksum"),
        lambda fields: fields.update(more=1),
        lambda fields: fields.update(usage=None),
        lambda fields: fields["usage"].update(more=1),
    ],
)
def test_a_record_with_other_fields_is_refused(change):
    """A field too many or too few, and the message names the file."""
    fields = json.loads(decode(encoded(), NAME).record.to_bytes())
    change(fields)
    with pytest.raises(CorruptOutput, match=r"commits/x\.json"):
        CommitRecord.from_bytes(json.dumps(fields).encode(), "commits/x.json")


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"[]", b"null", b"{", b"{}", b"\xff", b'"x"'])
def test_a_record_that_is_none_is_refused(data):
    """Zero bytes, other bytes, other JSON."""
    with pytest.raises(CorruptOutput, match="cannot be read"):
        CommitRecord.from_bytes(data, "x")


def test_a_part_says_nothing_of_where_its_input_lay():
    """The location of a source may hold names of users and servers."""
    assert b"/source/" not in encoded()


def test_hugging_face_sees_vectors_of_a_fixed_length():
    """The metadata that `datasets` goes by."""
    metadata = pq.read_schema(pa.BufferReader(encoded())).metadata
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert features[EMBEDDING] == {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4, "_type": "List"}
    assert features["id"] == {"dtype": "string", "_type": "Value"}


def test_any_type_of_id_can_be_rejected():
    """An id that JSON does not know is kept as its text."""
    shard = make_shard(3)
    rejects = [Reject(0, b"\xff", "null"), Reject(1, np.float32(1.5), "null")]
    table = make_table(shard, without=(0, 1))
    data = encode(table, shard=shard, fingerprint=FINGERPRINT, rejects=rejects, usage=Usage())
    assert [reject.id for reject in decode(data, NAME).rejects] == ["b'\\xff'", "1.5"]


def test_a_part_of_rejects_alone_keeps_its_dimension():
    """No row has a vector, and the schema still says how long one would be."""
    shard = make_shard(2)
    table = make_table(shard).slice(0, 0)
    data = encode(table, shard=shard, fingerprint=FINGERPRINT, rejects=make_rejects(shard, (0, 1)), usage=Usage())
    part = decode(data, NAME)
    assert (part.record.num_rows, part.record.dimension) == (0, 4)
    assert vectors_of(part.table).shape == (0, 4)


# Damage


def test_a_truncated_part_is_noticed_wherever_it_ends():
    """Zero bytes, one byte less, and many lengths between."""
    data = encoded()
    for length in (*range(0, len(data), 61), len(data) - 1):
        with pytest.raises(CorruptOutput, match="part-x"):
            decode(data[:length], NAME)


def test_a_flipped_bit_of_the_rows_is_noticed_wherever_it_is():
    """Each of many single bits of the stored vectors, ids and row numbers: Parquet alone would read half of them as data."""
    data = encoded(70, dimension=64)
    columns = pq.read_metadata(pa.BufferReader(data)).row_group(0)
    stored = {columns.column(number).path_in_schema: columns.column(number) for number in range(columns.num_columns)}
    embedding = stored["embedding.list.element"]
    end = embedding.data_page_offset + embedding.total_compressed_size
    for position in range(embedding.data_page_offset + 256, end, 97):  # behind the page's header
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(CorruptOutput):
            decode(bytes(flipped), NAME)


def test_other_files_are_no_parts():
    """Parquet that the engine did not write, and what is not Parquet."""
    sink = pa.BufferOutputStream()
    pq.write_table(make_table(make_shard()), sink)
    for data in (bytes(sink.getvalue()), b"PAR1", b"x" * 1000):
        with pytest.raises(CorruptOutput, match="cannot be read back"):
            decode(data, NAME)


@pytest.mark.parametrize("about", [b"", b"{}", b"[]", b"null", b'{"shard":{},"rejects":[],"usage":{}}', b"\xff"])
def test_a_part_whose_own_description_is_broken_is_refused(about):
    """Checked page by page, the rows may be whole; without a description they belong to nothing."""
    sink = pa.BufferOutputStream()
    pq.write_table(make_table(make_shard()).replace_schema_metadata({PART_METADATA: about}), sink)
    with pytest.raises(CorruptOutput, match="cannot be read back"):
        decode(bytes(sink.getvalue()), NAME)


# What a part must be


def replaced(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def with_vectors(change, kind: pa.DataType | None = None) -> pa.Table:
    """Return a good table whose vectors went through `change`, which may return None for the third."""
    table = make_table(make_shard())
    vectors = table.column(EMBEDDING).to_pylist()
    vectors[2] = change(vectors[2])
    return replaced(table, EMBEDDING, pa.array(vectors, kind or pa.list_(pa.float32(), 4)))


def with_rows(change) -> pa.Table:
    table = make_table(make_shard())
    rows = table.column(SOURCE_ROW).to_pylist()
    return replaced(table, SOURCE_ROW, pa.array(change(rows), pa.int64()))


WRONG = {
    "not finite": [
        with_vectors(lambda vector: [float("nan"), *vector[1:]]),
        with_vectors(lambda vector: [*vector[:3], float("inf")]),
        with_vectors(lambda vector: [float("-inf")] * 4),
    ],
    "a vector is zero": [with_vectors(lambda _: [0.0] * 4), with_vectors(lambda _: [-0.0] * 4)],
    "a vector is missing": [with_vectors(lambda _: None), with_vectors(lambda vector: [None, *vector[1:]])],
    "no column embedding of fixed-size lists of float32": [
        make_table(make_shard()).drop_columns(EMBEDDING),
        with_vectors(lambda vector: vector, pa.list_(pa.float32())),
        with_vectors(lambda vector: vector, pa.list_(pa.float64(), 4)),
    ],
    "no column _source_row of int64": [
        make_table(make_shard()).drop_columns(SOURCE_ROW),
        replaced(make_table(make_shard()), SOURCE_ROW, make_table(make_shard())[SOURCE_ROW].cast(pa.int32())),
    ],
    "no column _text_hash": [make_table(make_shard()).drop_columns(TEXT_HASH)],
    "_text_hash does not have 16 bytes for each row": [
        replaced(make_table(make_shard()), TEXT_HASH, pa.array([bytes(16)] * 7 + [None], pa.binary())),
        replaced(make_table(make_shard()), TEXT_HASH, pa.array([bytes(16)] * 7 + [bytes(17)], pa.binary())),
        replaced(make_table(make_shard()), TEXT_HASH, pa.array([bytes(16)] * 8, pa.binary(16))),
    ],
    "not in the order of the input": [
        make_table(make_shard()).take([1, 0, *range(2, 8)]),
        with_rows(lambda rows: rows[::-1]),
        with_rows(lambda rows: [rows[0], *rows[:-1]]),
    ],
    "rejects are not 10 rows": [
        make_table(make_shard()).slice(1),
        make_table(make_shard(), without=(3,)),
        make_table(make_shard()).slice(0, 0),
    ],
    "not the rows of its shard": [
        with_rows(lambda rows: [row + 1 for row in rows]),
        with_rows(lambda rows: [-1, *rows[1:]]),
        make_table(make_shard(), without=(2, 7)),
    ],
}


@pytest.mark.parametrize(
    ("problem", "table"), [(problem, table) for problem, tables in WRONG.items() for table in tables]
)
def test_a_table_that_is_not_the_rows_of_its_shard_is_refused(problem, table):
    """Each row once and in order, each vector there, finite and not zero; the message names the rows."""
    with pytest.raises(CorruptOutput, match=problem) as caught:
        check(table, shard=make_shard(), rejects=make_rejects(make_shard()), name=NAME)
    assert "rows 0 to 10 of a.parquet" in caught.value.message


def test_a_right_table_passes():
    """The check finds nothing in what the engine makes."""
    check(make_table(make_shard()), shard=make_shard(), rejects=make_rejects(make_shard()), name=NAME)


def test_the_vectors_of_a_table_are_those_of_its_rows_however_it_is_cut():
    """Slices and chunks have offsets; the array has not."""
    table = make_table(make_shard(20), without=())
    whole = vectors_of(table)
    np.testing.assert_array_equal(vectors_of(table.slice(5, 7)), whole[5:12])
    np.testing.assert_array_equal(
        vectors_of(pa.concat_tables([table.slice(3, 2), table.slice(9)])), whole[[3, 4, *range(9, 20)]]
    )
    assert whole.dtype == np.float32
    assert table.schema.field(EMBEDDING).type == vectors_type(4)


def test_a_flipped_bit_is_noticed_wherever_it_is():
    """Page headers, the footer and its metadata included: page checksums cover none of them."""
    data = encoded()
    unnoticed = []
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        try:
            decode(bytes(flipped), NAME)
        except CorruptOutput:
            continue
        unnoticed.append(position)
    assert unnoticed == []
