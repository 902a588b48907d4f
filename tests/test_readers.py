"""An output opens as it is, without our code, in what people use; and `engine.read` gives exactly what the records say."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

import engine
from engine.cli import main
from engine.commits import Usage
from engine.config import load_config
from engine.errors import ConfigError, CorruptOutput
from engine.ledger import part_name
from engine.quantization import INT8_MAX, VectorFormat, quantize, to_arrow
from engine.schema import EMBEDDING, SOURCE_ROW, TEXT_HASH, Shard
from engine.survey import survey
from tests.builders import hashes_of, write_source
from tests.kills import ROOT
from tests.models import HashModel

SNIPPET = re.compile(r"^### ([^\n]+)\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = dict(SNIPPET.findall((ROOT / "docs/readers.md").read_text()))
OF_DTYPES = dict(SNIPPET.findall((ROOT / "docs/output-dtypes.md").read_text()))
RAY = {name for name, text in SNIPPETS.items() if "Ray" in name}
NEAREST = "b-17"
LISTED = {
    "pyarrow", "pandas", "polars", "DuckDB", "Hugging Face datasets", "Lance", "FAISS", "Ray Data",
    "In memory, or mapped", "In batches", "As a Ray Dataset",
}  # fmt: skip


def vectors_for(texts: list[str], dimension: int = 8) -> np.ndarray:
    """Return a hash model's vectors, of length 1."""
    vectors = asyncio.run(HashModel(dimension).embed(texts)) - np.float32(0.5)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Output:
    """
    An output of two files or more, 50 rows each, made without Ray.

    Args:
        folder: Where its source and its output go.
        files: The names of its files, a letter each.
        dtype: What vectors are stored as; int8 with a scale that holds all numbers of vectors of length 1.
        dimension: Of the vectors.
    """

    def __init__(self, folder: Path, files: str = "ab", dtype: str = "float32", dimension: int = 8) -> None:
        self.source, self.out = folder / "in", folder / "out"
        self.kind = VectorFormat(dtype, dimension, 1 / INT8_MAX if dtype == "int8" else None)
        self.grow(files)

    def grow(self, files: str) -> None:
        """Add files to the source, and publish what is pending, as a run does."""
        for name in files:
            ids = [f"{name}-{row}" for row in range(50)]
            write_source(self.source / f"{name}.parquet", {"id": ids, "text": [f"text {row}" for row in ids]})
        asked = survey(
            load_config(
                source=str(self.source), output=str(self.out), model="custom:tests.models.HashModel", id_column="id",
                shard_rows=20, output_dtype=self.kind.dtype,
            )
        )  # fmt: skip
        asked.ledger.claim(asked.job)
        for shard in asked.standing.plan.pending:
            self._publish(asked, shard)

    def _publish(self, asked, shard: Shard) -> None:
        rows = range(shard.start, shard.stop)
        ids = [f"{shard.file.path[0]}-{row}" for row in rows]
        vectors = vectors_for([f"text {row}" for row in ids], self.kind.dimension)
        embedding = to_arrow(quantize(vectors, self.kind), self.kind)
        table = pa.table(
            {"id": ids, EMBEDDING: embedding, TEXT_HASH: hashes_of(rows), SOURCE_ROW: pa.array(rows, pa.int64())}
        )
        asked.ledger.publish(
            table, shard=shard, fingerprint=asked.job.fingerprint, rejects=[], usage=Usage(created_at="now"),
            vectors=self.kind,
        )  # fmt: skip


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return Output(tmp_path_factory.mktemp("readers")).out


@pytest.fixture
def folder(output, tmp_path, monkeypatch) -> Path:
    """A folder to run snippets in, with the output in it as `out`."""
    (tmp_path / "out").symlink_to(output)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(text: str, dimension: int = 8) -> None:
    names = {"query": vectors_for([f"text {NEAREST}"], dimension)[0] + np.float32(0.01)}
    exec(text, names)
    assert str(names["nearest"]) == NEAREST


# As it is, and by the records: the snippets of docs/readers.md


def test_the_page_has_all_readers():
    """None of the tests below is of a snippet that the page has lost."""
    assert set(SNIPPETS) == LISTED


@pytest.mark.parametrize("name", sorted(LISTED - RAY))
def test_the_nearest_row_is_found(folder, monkeypatch, name):
    """By the snippet of the page as it stands, in pyarrow, pandas, polars, DuckDB, datasets, Lance and FAISS."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    check(SNIPPETS[name])


@pytest.mark.ray
def test_the_nearest_row_is_found_by_ray(shared_ray, folder):
    """Over the files as they are; and over exactly the committed parts, each row once, with a file beside them that is none."""
    for name in sorted(RAY):
        check(SNIPPETS[name].replace('"out/data"', f'"{folder}/out/data"'))  # workers of a shared Ray are elsewhere
    rows = engine.read("out", as_="ray").take_all()
    assert sorted(row["id"] for row in rows) == sorted(f"{name}-{row}" for name in "ab" for row in range(50))
    assert set(rows[0]) == {"id", EMBEDDING, TEXT_HASH, SOURCE_ROW}


# Of other dtypes: the same snippets where they do, and those of docs/output-dtypes.md


@pytest.fixture(scope="module")
def typed(tmp_path_factory) -> dict[str, Path]:
    """Outputs of each dtype; bits of 64 dimensions, since 8 tell no two rows apart."""
    dimensions = {"float16": 8, "int8": 8, "binary": 64}
    return {
        dtype: Output(tmp_path_factory.mktemp(dtype), dtype=dtype, dimension=dimension).out
        for dtype, dimension in dimensions.items()
    }


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("name", sorted(LISTED - RAY))
def test_the_same_snippets_read_float16_and_int8(typed, tmp_path, monkeypatch, name, dtype):
    """As they stand."""
    (tmp_path / "out").symlink_to(typed[dtype])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    if (name, dtype) == ("Lance", "int8"):
        with pytest.raises(ValueError, match="element type Int8"):
            check(SNIPPETS[name])
    else:
        check(SNIPPETS[name])


@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
def test_faiss_finds_the_nearest_in_parts_and_in_an_export_of_any_dtype(typed, tmp_path, monkeypatch, dtype):
    """By the snippets of the page; what is exported of int8 has its scale, so that numbers are the model's as near as int8 comes."""
    (tmp_path / "out").symlink_to(typed[dtype])
    monkeypatch.chdir(tmp_path)
    is_binary = dtype == "binary"
    check(OF_DTYPES["FAISS, of bits" if is_binary else "FAISS, of float16 and int8"], 64 if is_binary else 8)
    for index in ("Flat",) if is_binary else ("Flat", "L2norm,Flat"):
        assert main(["export", "out", "--to", "vectors.faiss", "--index", index]) == 0
        check(OF_DTYPES["FAISS, exported bits" if is_binary else "FAISS, exported"], 64 if is_binary else 8)
    table = engine.read("out")
    wanted = vectors_for([f"text {row}" for row in table["id"].to_pylist()], 64 if is_binary else 8)
    if is_binary:
        found = faiss.read_index_binary("vectors.faiss")
        np.testing.assert_array_equal(found.reconstruct_n(0, 100), np.packbits(wanted > 0, axis=1))
    else:
        assert main(["export", "out", "--to", "plain.faiss"]) == 0
        step = 1 / INT8_MAX if dtype == "int8" else 2**-10
        np.testing.assert_allclose(faiss.read_index("plain.faiss").reconstruct_n(0, 100), wanted, atol=step / 2 * 1.001)


# What is read, and what is not


def test_rows_come_in_the_order_of_the_input_and_parts_without_a_record_do_not_come(output, tmp_path):
    """Whatever the names of the parts are; in each form the same rows."""
    shutil.copytree(output, tmp_path / "out")
    loose = tmp_path / "out" / part_name("0" * 32)
    shutil.copy(next((output / "data").iterdir()), loose)
    table = engine.read(tmp_path / "out")
    ids = [f"{name}-{row}" for name in "ab" for row in range(50)]
    assert table["id"].to_pylist() == ids
    assert table.schema.names == ["id", EMBEDDING, TEXT_HASH, SOURCE_ROW]
    expected = vectors_for([f"text {row}" for row in ids])
    found, vectors = engine.read(tmp_path / "out", as_="numpy")
    assert list(found) == ids
    np.testing.assert_array_equal(vectors, expected)
    for form in ("pandas", "polars"):
        frame = engine.read(tmp_path / "out", [SOURCE_ROW, "id"], form)
        assert list(frame.columns) == [SOURCE_ROW, "id"]
        assert list(frame["id"]) == ids
    batches = list(engine.read_batches(tmp_path / "out", ["id"]))
    assert [row for batch in batches for row in batch["id"].to_pylist()] == ids


def test_mapped_vectors_are_made_once_and_anew_when_the_output_has_grown(tmp_path):
    """A `numpy.memmap` of an export, and the ids of its rows."""
    made = Output(tmp_path, "b")
    for files in ("b", "ab"):
        made.grow("" if files == "b" else "a")
        for _ in range(2):
            ids, vectors = engine.read(made.out, as_="numpy", mapped=tmp_path / "vectors.npy")
            assert isinstance(vectors, np.memmap)
            assert list(ids) == [f"{name}-{row}" for name in files for row in range(50)]
            np.testing.assert_array_equal(vectors, vectors_for([f"text {row}" for row in ids]))


def test_vectors_are_mapped_in_the_home_folder_too(tmp_path, monkeypatch):
    """A path with a tilde is that of the export, and of what is read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    made = Output(tmp_path, "b")
    made.grow("")
    _, vectors = engine.read(made.out, as_="numpy", mapped="~/vectors.npy")
    assert len(vectors) == 50
    assert (tmp_path / "vectors.npy").exists()


def test_a_part_that_is_missing_or_damaged_is_an_error(output, tmp_path):
    """It names the part, and what to do; nothing is left out in silence."""
    shutil.copytree(output, tmp_path / "out")
    part = sorted((tmp_path / "out/data").iterdir())[2]
    data = bytearray(part.read_bytes())
    for damaged in (data[:60] + bytes([data[60] ^ 1]) + data[61:], data[:-20], b"", None):
        part.unlink()
        if damaged is not None:
            part.write_bytes(damaged)
        with pytest.raises(CorruptOutput, match=rf"{part.name}.*engine verify") as error:
            engine.read(tmp_path / "out")
        assert error.value.exit_code == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["nothing"]}, "has no column 'nothing'; it has id, embedding, _text_hash, _source_row"),
        ({"as_": "excel"}, "choose arrow, pandas, polars, numpy, ray"),
        ({"as_": "numpy", "columns": ["id"]}, "leave columns out"),
        ({"mapped": "x.npy"}, "for as_='numpy' alone"),
    ],
)
def test_what_cannot_be_read_is_said(output, options, message):
    """A column or a form that there is not."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        engine.read(output, **options)


def test_an_output_that_is_not_there_or_has_nothing_yet_is_said(tmp_path):
    """Neither is an empty table: its columns are not known."""
    with pytest.raises(ConfigError, match="is not an output of the engine"):
        engine.read(tmp_path)
    made = Output(tmp_path, "a")
    shutil.rmtree(made.out / "_engine/commits")
    with pytest.raises(ConfigError, match="nothing is committed in"):
        engine.read_batches(made.out)
