"""
A part: the output Parquet file of one shard, from a table to bytes and from bytes back to a commit record.

A part describes itself. Its metadata holds the shard, the fingerprint, the rejects and the usage, so that the commit record and
the rejects file are pure functions of its bytes: whoever finds a part without a record can finish the commit, and two writers
of one shard can only agree.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.errors import CorruptOutput
from engine.quantization import BITS, Stored, VectorFormat, dequantize, from_arrow, usable
from engine.schema import (
    CHUNK_COLUMNS,
    CHUNK_END,
    CHUNK_INDEX,
    CHUNK_START,
    EMBEDDING,
    PART_METADATA,
    SOURCE_ROW,
    TEXT_HASH,
    CommitRecord,
    InputFile,
    Reject,
    Shard,
    Usage,
    canonical_json,
    content_hash,
    count_reasons,
)
from engine.text_hashes import numbers_of

_SEAL = b"embedding_engine_seal"
_OPEN = b"0" * 32
_NUMBERS = f"{EMBEDDING}.list.element"
"""The path of the vectors' numbers in a Parquet file."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a part's bytes hold, checked."""

    table: pa.Table
    record: CommitRecord
    rejects: tuple[Reject, ...]
    vectors: VectorFormat
    """How the vectors of the table are stored."""

    def rejects_bytes(self) -> bytes:
        """Return the part's rejects as they are stored: JSON lines, one a row."""
        return "".join(canonical_json(reject.as_json()) + "\n" for reject in self.rejects).encode()


def encode(
    table: pa.Table,
    *,
    shard: Shard,
    fingerprint: str,
    rejects: Sequence[Reject],
    usage: Usage,
    vectors: VectorFormat | None = None,
) -> bytes:
    """
    Serialise a shard's table, in memory: a failure leaves no file behind, not even a readable short one.

    Args:
        table: Kept columns, `embedding` (fixed-size list of what `vectors` says), `_text_hash` and `_source_row` (int64), in the order of
            rows.
        shard: The shard that the table is of.
        fingerprint: Of the job.
        rejects: The rows of the shard that the table lacks.
        usage: What the shard cost.
        vectors: How they are stored; by default what the type of the column tells.
    """
    vectors = vectors or format_of(table.schema)
    about = {
        "shard": asdict(shard.file) | {"id": shard.id, "start": shard.start, "stop": shard.stop},
        "fingerprint": fingerprint,
        "rejects": [reject.as_json() for reject in rejects],
        "usage": asdict(usage),
        "vectors": vectors.as_json(),
    }
    del about["shard"]["location"]  # type: ignore[attr-defined] # where a file lay says nothing of what it is
    metadata = {PART_METADATA: canonical_json(about).encode()}
    features = _huggingface_features(table.schema)
    if features is not None:
        metadata[b"huggingface"] = canonical_json({"info": {"features": features}}).encode()
    table = table.replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        # Floats and hashes do not repeat: a dictionary of them costs time and saves nothing. Bytes do, and Parquet's plain integers have four.
        use_dictionary=[
            name for name in table.column_names if name not in (EMBEDDING, TEXT_HASH, SOURCE_ROW, *CHUNK_COLUMNS[1:])
        ]
        + ([_NUMBERS] if vectors.dtype in ("int8", "binary") else []),
        write_page_checksum=True,
        store_schema=True,
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_SEAL: _OPEN})
    return _sealed(bytes(sink.getvalue()))


def decode(data: bytes, name: str) -> Part:
    """
    Read a part whole and check all that it says of itself.

    Args:
        data: The file's bytes.
        name: Of the file, for messages.

    Raises:
        CorruptOutput: If it is truncated or damaged, or is not exactly the rows of its shard as checked vectors.
    """
    if not data or _sealed(data) != data:
        raise CorruptOutput(f"the part {name} cannot be read back: a byte of it is missing or is not what was written")
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as parquet:
            table = parquet.read()
        about = json.loads(table.schema.metadata[PART_METADATA])
        shard_fields = about["shard"]
        file = InputFile(shard_fields["path"], "", shard_fields["size"], shard_fields["version"])
        shard = Shard(shard_fields["id"], file, shard_fields["start"], shard_fields["stop"])
        rejects = tuple(Reject(**reject) for reject in about["rejects"])
        usage = Usage(**about["usage"])
        fingerprint = about["fingerprint"]
        vectors = VectorFormat(**about["vectors"])
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptOutput(f"the part {name} cannot be read back ({type(error).__name__})") from None
    check(table, shard=shard, rejects=rejects, name=name, vectors=vectors, num_vectors=usage.num_vectors)
    record = CommitRecord(
        shard_id=shard.id,
        fingerprint=fingerprint,
        path=file.path,
        size=file.size,
        version=file.version,
        start=shard.start,
        stop=shard.stop,
        num_rows=len(shard) - len(rejects),
        num_rejects=len(rejects),
        reasons=count_reasons(rejects),
        dimension=vectors.dimension,
        num_bytes=len(data),
        checksum=content_hash(data),
        usage=usage,
    )
    return Part(table, record, rejects, vectors)


def _sealed(data: bytes) -> bytes:
    """
    Put the hash of a part's bytes into its own footer, where it is computed as if it were zeros.

    Page checksums cover neither page headers nor the footer, and a part without a record has nothing else to vouch for it.
    """
    at = data.rfind(_SEAL)
    if at < 0:
        return b""
    at += len(_SEAL) + 2  # Thrift's field header and the length of the value
    opened = data[:at] + _OPEN + data[at + len(_OPEN) :]
    return data[:at] + content_hash(opened).encode() + data[at + len(_OPEN) :]


def check(
    table: pa.Table,
    *,
    shard: Shard,
    rejects: Sequence[Reject],
    name: str,
    vectors: VectorFormat | None = None,
    num_vectors: int = 0,
) -> None:
    """
    Check that a table and its rejects are the rows of `shard`, each once and in order, with vectors that can be used.

    Args:
        table: Of the part.
        shard: Whose rows it should have.
        rejects: The rows that it should lack.
        name: Of the part, for messages.
        vectors: How they are stored; by default what the type of their column tells.
        num_vectors: Rows of a table that has one for each chunk of a text, in order; 0 if each text has one.

    Raises:
        CorruptOutput: Says what is wrong.
    """
    if num_vectors:
        problem = _chunk_problem(table, num_vectors) or _row_problem(_texts_alone(table), shard, rejects)
    else:
        problem = _row_problem(table, shard, rejects)
    problem = problem or _hash_problem(table) or _vector_problem(table, vectors)
    if problem:
        raise CorruptOutput(f"the part {name} of rows {shard.start} to {shard.stop} of {shard.file.path}: {problem}")


def vectors_of(table: pa.Table, vectors: VectorFormat | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the `embedding` column as an array of shape (rows, dimension), float32; its format is by default what the table says."""
    return dequantize(from_arrow(table.column(EMBEDDING)), vectors or format_of(table.schema))


def format_of(schema: pa.Schema) -> VectorFormat:
    """
    Return how a part's vectors are stored: by the part's metadata, or else by the type of their column.

    Raises:
        ValueError: If there are no vectors.
    """
    about = json.loads((schema.metadata or {}).get(PART_METADATA, b"{}"))
    if "vectors" in about:
        return VectorFormat(**about["vectors"])
    found = VectorFormat.of_type(schema.field(EMBEDDING).type) if EMBEDDING in schema.names else None
    if found is None:
        raise ValueError(f"no column {EMBEDDING} of vectors")
    return found


def _row_problem(table: pa.Table, shard: Shard, rejects: Sequence[Reject]) -> str | None:
    if SOURCE_ROW not in table.column_names or table.schema.field(SOURCE_ROW).type != pa.int64():
        return f"it has no column {SOURCE_ROW} of int64"
    if table.num_rows + len(rejects) != len(shard):
        return f"{table.num_rows} rows and {len(rejects)} rejects are not {len(shard)} rows"
    rows = np.asarray(table.column(SOURCE_ROW))
    if np.any(np.diff(rows) <= 0):
        return "its rows are not in the order of the input"
    every = np.sort(np.concatenate([rows, np.fromiter((reject.source_row for reject in rejects), np.int64)]))
    if not np.array_equal(every, np.arange(shard.start, shard.stop)):
        return "its rows and rejects are not the rows of its shard"
    return None


def _hash_problem(table: pa.Table) -> str | None:
    if TEXT_HASH not in table.column_names:
        return f"it has no column {TEXT_HASH}"
    try:
        numbers_of(table.column(TEXT_HASH))
    except ValueError:
        return f"its column {TEXT_HASH} does not have 16 bytes for each row"
    return None


def _chunk_problem(table: pa.Table, num_vectors: int) -> str | None:
    """Say what is wrong with the order of chunks; whether each text is there is another question."""
    if table.num_rows != num_vectors:
        return f"it has {table.num_rows} rows instead of {num_vectors}"
    kinds = {CHUNK_INDEX: pa.int32(), CHUNK_START: pa.int64(), CHUNK_END: pa.int64(), SOURCE_ROW: pa.int64()}
    for name, kind in kinds.items():
        if name not in table.column_names or table.schema.field(name).type != kind:
            return f"it has no column {name} of {kind}"
        if table.column(name).null_count:
            return f"a {name} is missing"
    index, start, end, row = (np.asarray(table.column(name)) for name in kinds)
    is_next = np.concatenate([[False], np.diff(row) == 0])
    if not np.array_equal(index, np.where(is_next, np.concatenate([[0], index[:-1] + 1]), 0)):
        return f"its {CHUNK_INDEX} does not count the chunks of each row from 0"
    if np.any(start < 0) or np.any(start >= end) or np.any(np.diff(start)[is_next[1:]] < 0):
        return "its chunks are not in the order of their text"
    return None


def _texts_alone(table: pa.Table) -> pa.Table:
    """Return the source rows of the first chunks: each text's, once."""
    return table.select([SOURCE_ROW]).filter(pc.equal(table.column(CHUNK_INDEX), 0))


def _vector_problem(table: pa.Table, vectors: VectorFormat | None) -> str | None:
    kind = table.schema.field(EMBEDDING).type if EMBEDDING in table.column_names else pa.null()
    expected = vectors or VectorFormat.of_type(kind) or VectorFormat("float32", 0)
    wanted = expected.arrow_type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != wanted.value_type:
        name = "uint8" if expected.dtype == "binary" else expected.dtype
        return f"it has no column {EMBEDDING} of fixed-size lists of {name}"
    if kind.list_size < 1:
        return "its vectors have no dimensions"
    if kind.list_size != wanted.list_size:
        return f"its vectors have {kind.list_size} numbers instead of {wanted.list_size}"
    if table.column(EMBEDDING).null_count or table.column(EMBEDDING).combine_chunks().flatten().null_count:
        return "a vector is missing"
    return _value_problem(from_arrow(table.column(EMBEDDING)), expected)


def _value_problem(stored: Stored, of: VectorFormat) -> str | None:
    if of.dtype == "binary":
        unused = of.width * BITS - of.dimension
        return "a vector has bits beyond its dimensions" if (stored[:, -1] & ((1 << unused) - 1)).any() else None
    if of.dtype == "int8" and not of.scale:
        return "its vectors are int8, and nothing says what a step of them stands for"
    if not np.isfinite(stored).all():
        return "a vector is not finite"
    if not usable(stored, of).all():
        return "a vector is zero"
    return None


def _huggingface_features(schema: pa.Schema) -> dict[str, Any] | None:
    """Describe the columns to Hugging Face datasets, which then shows the vectors' length; None if a column has no plain name."""
    features: dict[str, Any] = {}
    for field in schema:
        if field.name == EMBEDDING:
            value = {"dtype": _huggingface_dtype(field.type.value_type), "_type": "Value"}
            features[field.name] = {"feature": value, "length": field.type.list_size, "_type": "List"}
        elif (dtype := _huggingface_dtype(field.type)) is not None:
            features[field.name] = {"dtype": dtype, "_type": "Value"}
        else:
            return None
    return features


def _huggingface_dtype(kind: pa.DataType) -> str | None:
    plain = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    floats = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}
    if any(is_kind(kind) for is_kind in plain) or kind == pa.binary():
        return str(kind)
    return floats.get(kind)
