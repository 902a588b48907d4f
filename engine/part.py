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
import pyarrow.parquet as pq

from engine.commits import CommitRecord, Usage, count_reasons
from engine.errors import CorruptOutput
from engine.part_checks import check
from engine.quantization import VectorFormat, dequantize, from_arrow
from engine.schema import (
    CHUNK_COLUMNS,
    EMBEDDING,
    PART_METADATA,
    SOURCE_ROW,
    TEXT_HASH,
    InputFile,
    Reject,
    Shard,
    canonical_json,
    content_hash,
)

DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading the footer of a damaged part may raise."""
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
    data = bytearray(sink.getvalue())
    place, seal = _seal(data)
    data[place] = seal
    return bytes(data)


def decode(data: bytes, name: str) -> Part:
    """
    Read a part whole and check all that it says of itself.

    Args:
        data: The file's bytes.
        name: Of the file, for messages.

    Raises:
        CorruptOutput: If it is truncated or damaged, or is not exactly the rows of its shard as checked vectors.
    """
    place, seal = _seal(data)
    if not seal or data[place] != seal:
        raise CorruptOutput(f"the part {name} cannot be read back: a byte of it is missing or is not what was written")
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as parquet:
            table = parquet.read()
        about = about_of(table.schema)
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


def _seal(data: bytes | bytearray) -> tuple[slice, bytes]:
    """
    Return the hash of a part's bytes and its place in the part's own footer, where it is computed as if it were zeros.

    Page checksums cover neither page headers nor the footer, and a part without a record has nothing else to vouch for it.
    There is no hash, but nothing, if there is no place for one. The bytes are not copied: a part may have hundreds of megabytes.
    """
    at = data.rfind(_SEAL)
    if at < 0:
        return slice(0), b""
    at += len(_SEAL) + 2  # Thrift's field header and the length of the value
    place, view = slice(at, at + len(_OPEN)), memoryview(data)
    return place, content_hash(view[:at], _OPEN, view[place.stop :]).encode()


def vectors_of(table: pa.Table, vectors: VectorFormat | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the `embedding` column as an array of shape (rows, dimension), float32; its format is by default what the table says."""
    return dequantize(from_arrow(table.column(EMBEDDING)), vectors or format_of(table.schema))


def about_of(schema: pa.Schema) -> dict[str, Any]:
    """
    Return what a part says of itself: its shard, fingerprint, rejects, usage and vectors.

    Raises:
        KeyError, TypeError, ValueError: If it says nothing, or nothing that can be read.
    """
    about: dict[str, Any] = json.loads(schema.metadata[PART_METADATA])
    return about


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
