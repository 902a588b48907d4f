"""Exports: right, each row once, the same when made again, whole whenever they are killed, and in bounded memory."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine.cli import main
from engine.commits import Usage
from engine.errors import ConfigError, CorruptOutput, Refused
from engine.exporting import faiss_index, lance_dataset, npy, one_file
from engine.ledger import Ledger, part_name
from engine.schema import EMBEDDING, SOURCE_ROW, TEXT_HASH, Shard, vectors_type
from engine.snapshot import LivePart, Snapshot
from engine.storage import LocalStorage
from tests.builders import FINGERPRINT, hashes_of, killed_at_each_call, make_job, make_shard, make_table
from tests.kills import ROOT
from tests.test_docs import blocks
from tests.test_quantization import DTYPES, Made, SignedModel
from tests.test_readers import Output, vectors_for

FORMATS = ("npy", "faiss", "lance")


def exported(path: Path) -> dict[str, np.ndarray]:
    """Return the vectors of an export by id, as those read them who load it; each id must be there once."""
    if path.suffix == ".lance":
        table = lance.dataset(str(path)).to_table()
        ids, vectors = table["id"].to_pylist(), np.stack(table[EMBEDDING].to_numpy())
    else:
        ids = pq.read_table(f"{path}.ids.parquet")["id"].to_pylist()
        if path.suffix == ".npy":
            vectors = np.load(path, mmap_mode="r")
        else:
            index = faiss.read_index(str(path))
            vectors = index.reconstruct_n(0, index.ntotal)
    assert len(ids) == len(vectors) == len(set(ids))
    return dict(zip(ids, vectors, strict=True))


def check(path: Path, out: Path, *, once_more: bool = True) -> None:
    """Make sure that an export is the output: the same ids, with the same vectors; and that another has nothing to do, if it is asked."""
    table = engine.read(out)
    expected = dict(zip(table["id"].to_pylist(), table[EMBEDDING].to_numpy(), strict=True))
    found = exported(path)
    assert found.keys() == expected.keys()
    for name, vector in found.items():
        np.testing.assert_array_equal(vector, expected[name])
    if path.suffix != ".lance":
        assert list(found) == list(expected)
    if once_more:
        again = engine.export(out, path)
        assert (again.num_rows, again.num_new_rows, again.num_deleted_rows) == (len(expected), 0, 0)
        assert again.lines()["exported"] == "nothing to do: it is this output already"
    assert not path.with_name(path.name + ".partial").exists()


# What is exported


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_is_the_output_and_follows_it(tmp_path, form):
    """At first, when the output has grown, and when a part has left it; in between there is nothing to do."""
    made = Output(tmp_path, "b")
    to = tmp_path / f"deep/vectors.{form}"
    first = engine.export(made.out, to)
    assert (first.num_rows, first.num_new_rows, first.dtype, first.dimension) == (50, 50, "float32", 8)
    check(to, made.out)
    made.grow("a")
    assert engine.export(made.out, to).num_new_rows == (50 if form == "lance" else 100)
    check(to, made.out)
    ledger = Ledger(LocalStorage(str(made.out)))
    left = min(ledger.live())
    num_left = ledger.record(left).num_rows
    ledger.set_aside(left)
    assert engine.export(made.out, to).num_deleted_rows == (num_left if form == "lance" else 0)
    check(to, made.out)


def test_a_lance_dataset_changes_in_one_commit_and_is_searched(tmp_path):
    """Growth and what has left the output are one version; a search finds the right row; rows that others deleted come back."""
    made = Output(tmp_path, "b")
    to = tmp_path / "vectors.lance"
    engine.export(made.out, to)
    ledger = Ledger(LocalStorage(str(made.out)))
    ledger.set_aside(min(ledger.live()))
    made.grow("a")  # which makes again what was set aside
    ledger.set_aside(max(ledger.live()))
    engine.export(made.out, to)
    dataset = lance.dataset(str(to))
    assert dataset.version == 2
    assert dataset.schema.names == ["id", EMBEDDING, TEXT_HASH, SOURCE_ROW, "_shard"]
    wanted = engine.read(made.out)["id"][7].as_py()
    query = vectors_for([f"text {wanted}"])[0]
    assert dataset.to_table(nearest={"column": EMBEDDING, "q": query, "k": 1})["id"].to_pylist() == [wanted]
    dataset.delete(f"id = '{wanted}'")
    again = engine.export(made.out, to)
    assert again.num_new_rows == again.num_deleted_rows + 1
    check(to, made.out)


@pytest.mark.parametrize("index", ["HNSW8", "IVF4,Flat", "L2norm,IVF2,PQ4x4"])
def test_faiss_makes_the_index_that_is_asked_for(tmp_path, index):
    """It is trained where it must be, finds rows of the ids beside it, and is made anew for another index."""
    made = Output(tmp_path)
    to = tmp_path / "vectors.faiss"
    engine.export(made.out, to)
    assert engine.export(made.out, to, index=index).num_new_rows == 100
    assert engine.export(made.out, to, index=index).num_new_rows == 0
    found = faiss.read_index(str(to))
    assert found.ntotal == 100
    assert found.metric_type == faiss.METRIC_INNER_PRODUCT
    ids = pq.read_table(f"{to}.ids.parquet")["id"].to_pylist()
    _, rows = found.search(vectors_for(["text a-31"]), 5)
    assert "a-31" in [ids[row] for row in rows[0]]


@pytest.mark.parametrize(("dtype", "kind"), [("float16", pa.float16()), ("uint8", pa.uint8())])
def test_vectors_are_exported_as_they_are_stored(tmp_path, dtype, kind):
    """An array of the dtype of the output, an index of floats or, of bits, a binary one; Lance keeps the type."""
    numbers = np.random.default_rng(0).integers(1, 200, (30, 4)).astype(dtype)
    ledger = Ledger(LocalStorage(str(tmp_path / "out")))
    ledger.claim(make_job())
    shard = make_shard(30)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), type=pa.list_(kind, 4))
    table = pa.table({"id": range(30), EMBEDDING: embedding, TEXT_HASH: hashes_of(range(30)), SOURCE_ROW: range(30)})
    ledger.publish(
        table.set_column(1, EMBEDDING, floats(numbers)), shard=shard, fingerprint="f", rejects=[], usage=Usage()
    )
    pq.write_table(table, next((tmp_path / "out/data").iterdir()))  # as an output of another dtype would have it
    for form in FORMATS:
        assert engine.export(tmp_path / "out", tmp_path / f"v.{form}").dtype == dtype
    stored = np.load(tmp_path / "v.npy")
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, numbers)
    np.testing.assert_array_equal(engine.read(tmp_path / "out", as_="numpy")[1], numbers)
    assert lance.dataset(str(tmp_path / "v.lance")).schema.field(EMBEDDING).type.value_type == kind
    if dtype == "uint8":
        index = faiss.read_index_binary(str(tmp_path / "v.faiss"))
        assert index.search(numbers[5:6], 1)[0][0, 0] == 0
    else:
        index = faiss.read_index(str(tmp_path / "v.faiss"))
        np.testing.assert_array_equal(index.reconstruct_n(0, 30), numbers.astype(np.float32))
    assert index.ntotal == 30


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_nearest_is_found_in_every_export_of_what_is_stored_in_fewer_bits(tmp_path, dtype):
    """By FAISS in floats, or in bits by their Hamming distance; by Lance but for int8; and in the array, as the guide says."""
    made = Made(tmp_path, dtype)
    made.make()
    for form in FORMATS:
        engine.export(made.out, tmp_path / f"v.{form}")
    query = SignedModel().vector("text 5")
    ids = pq.read_table(tmp_path / "v.faiss.ids.parquet")["id"]
    dataset = lance.dataset(str(tmp_path / "v.lance"))
    near = {"column": EMBEDDING, "q": query, "k": 1, "metric": "dot"}
    if dtype == "binary":
        query = np.packbits(query > 0)
        index = faiss.read_index_binary(str(tmp_path / "v.faiss"))
        best = np.unpackbits(np.load(tmp_path / "v.npy") ^ query, axis=1).sum(axis=1).argmin()
        near |= {"q": query, "metric": "hamming"}
    else:
        index = faiss.read_index(str(tmp_path / "v.faiss"))
        best = (np.load(tmp_path / "v.npy") @ query).argmax()
    found = [ids[int(index.search(query[None], 1)[1][0, 0])].as_py(), ids[int(best)].as_py()]
    if dtype != "int8":
        found += dataset.to_table(columns=["id"], nearest=near)["id"].to_pylist()
    assert set(found) == {"a.parquet#5"}


def floats(numbers: np.ndarray) -> pa.Array:
    flat = pa.array(numbers.astype(np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=vectors_type(numbers.shape[1]))


# What is refused


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_no_export_of_this_output_is_not_touched(tmp_path, form):
    """Neither a file of another program nor the export of another output; nor is what a live process is making."""
    made, other = Output(tmp_path / "1"), Output(tmp_path / "2", "c")
    to = tmp_path / f"vectors.{form}"
    if form == "lance":
        to.mkdir()
        (to / "mine").write_text("mine")
    else:
        to.write_text("mine")
    with pytest.raises(Refused, match="was not made by `engine export`"):
        engine.export(made.out, to)
    assert (to / "mine" if form == "lance" else to).read_text() == "mine"
    to = tmp_path / f"other.{form}"
    engine.export(other.out, to)
    with pytest.raises(Refused, match=r"export of (another|this) output"):
        engine.export(made.out, to)
    check(to, other.out)
    assert not list(tmp_path.glob("*.partial"))
    folder = tmp_path / f"new.{form}.partial"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(Refused, match="is being made by another process"):
        engine.export(made.out, tmp_path / f"new.{form}")
    assert folder.exists()
    os.close(descriptor)
    engine.export(made.out, tmp_path / f"new.{form}")


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("vectors.csv", {}, "let its name end with .npy, .faiss, .lance, or give --format"),
        ("out/vectors.npy", {}, "is inside the output"),
        ("s3://bucket/vectors.npy", {}, "on a local disk"),
        ("vectors.npy", {"index": "Flat"}, "--index is of FAISS"),
        ("vectors.faiss", {"index": "Nothing"}, "FAISS knows no such index of 8 numbers"),
        ("vectors.faiss", {"index": "IVF4096,Flat"}, "cannot be trained on 50 vectors"),
        ("in", {"format": "npy"}, "is a folder already"),
    ],
)
def test_an_export_that_cannot_be_is_said(tmp_path, monkeypatch, to, options, message):
    """With exit code 2, and nothing of it under its name."""
    made = Output(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        engine.export("out", to, **options)
    assert Path(to).is_dir() or not Path(to).exists()
    assert made.out.exists()


@pytest.mark.parametrize("form", FORMATS)
def test_a_part_that_is_missing_makes_no_shorter_export(tmp_path, monkeypatch, form):
    """An error, and no export under its name; when the part is there again, the same command goes on where it was."""
    monkeypatch.setattr(npy, "CHECKPOINT_BYTES", 1)
    monkeypatch.setattr(lance_dataset, "GROUP_BYTES", 1)
    monkeypatch.setattr(faiss_index, "CHECKPOINT_S", 0)
    monkeypatch.setattr(faiss_index, "MAX_CHECKPOINT_SHARE", 0)
    made = Output(tmp_path, "a")
    ledger = Ledger(LocalStorage(str(made.out)))
    last = max(ledger.records(), key=lambda record: record.start)
    part = made.out / part_name(last.shard_id)
    data = part.read_bytes()
    part.unlink()
    to = tmp_path / f"vectors.{form}"
    with pytest.raises(CorruptOutput, match="is missing"):
        engine.export(made.out, to)
    assert not to.exists() or form == "lance"
    written = {path.name for path in to.glob("data/*")}
    part.write_bytes(data)
    begun: list[int] = []
    stored = Snapshot.stored

    def spied(snapshot: Snapshot, columns: Any = None, *, from_row: int = 0) -> Any:
        begun.append(from_row)
        return stored(snapshot, columns, from_row=from_row)

    monkeypatch.setattr(Snapshot, "stored", spied)
    engine.export(made.out, to)
    if form == "lance":
        assert len(begun) == 1
        assert len(written) == 2
        assert written < {path.name for path in to.glob("data/*")}
    else:
        assert begun == [last.start, 0]  # the vectors that were left, and the ids
    check(to, made.out)


# The command line


def test_the_page_does_what_it_says(tmp_path, monkeypatch, capsys):
    """Each command and each piece of code of docs/export.md, as it stands; and the result as JSON."""
    Output(tmp_path, "abcdef")
    monkeypatch.chdir(tmp_path)
    for language, text in blocks("docs/export.md", "sh", "python"):
        if language == "sh":
            for line in text.splitlines():
                assert main(shlex.split(line)[1:]) == 0, line
        else:
            exec(text, {})
    capsys.readouterr()
    assert main(["export", "out", "--to", "x", "--format", "npy", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_new_rows"], result["ids"]) == (300, str(tmp_path / "x.ids.parquet"))
    assert main(["export", "out", "--to", "in"]) == 2
    assert main(["export", "out", "--to", str(next((tmp_path / "in").iterdir())), "--format", "npy"]) == 3


# Kills


def export_in_small_steps(folder: str, form: str) -> None:
    """Export, and note after each batch what is done."""
    npy.CHECKPOINT_BYTES = lance_dataset.GROUP_BYTES = 1
    faiss_index.CHECKPOINT_S = faiss_index.MAX_CHECKPOINT_SHARE = 0
    engine.export(f"{folder}/out", f"{folder}/vectors.{form}")


def export_npy(folder: str) -> None:
    export_in_small_steps(folder, "npy")


def export_faiss(folder: str) -> None:
    export_in_small_steps(folder, "faiss")


def export_lance(folder: str) -> None:
    export_in_small_steps(folder, "lance")


@pytest.mark.parametrize(
    ("function", "is_grown"), [(export_npy, False), (export_faiss, True), (export_lance, False), (export_lance, True)]
)
def test_an_export_that_is_killed_at_any_call_is_whole_and_goes_on(tmp_path, function, is_grown):
    """SIGKILL at each call to the system: what lies under the name is the old export or the new, with its ids, or nothing."""
    made = Output(tmp_path / "start", "b")
    to = f"vectors.{function.__name__.removeprefix('export_')}"
    states: list[Any] = [None]
    if is_grown:
        engine.export(made.out, tmp_path / "start" / to)
        states = [engine.read(made.out)["id"].to_pylist()]
        made.grow("a")
    states.append(engine.read(made.out)["id"].to_pylist())
    folders = killed_at_each_call(tmp_path / "killed", function, start=tmp_path / "start")
    for folder in folders:
        assert state(folder / to, states[0]) in states
        engine.export(folder / "out", folder / to)
        check(folder / to, folder / "out", once_more=folder is folders[-1])
        shutil.rmtree(folder)


def state(path: Path, before: list[str] | None) -> list[str] | None:
    """Return the ids of what lies under an export's name; None if nothing does, or a file whose ids are not there yet."""
    if path.suffix == ".lance":
        if not (path / "_versions").exists():
            return None
        return sorted(exported(path), key=lambda name: (name[0], int(name[2:])))
    if not path.exists() or not Path(f"{path}.ids.parquet").exists():
        return before
    return list(exported(path))


# Memory


def test_an_export_holds_a_batch_and_not_the_output(tmp_path):
    """Of 160 MB of vectors, a process that has exported 32 a few times, and has its buffers, needs a part more, and not all."""
    job = make_job()
    for name, num_parts in (("small", 8), ("large", 40)):
        ledger = Ledger(LocalStorage(str(tmp_path / name)))
        ledger.claim(job)
        for number in range(num_parts):
            publish_large(ledger, make_shard(4096, start=4096 * number))
    script = """
import engine, pathlib, re, sys
peak = lambda: int(re.search("VmHWM: *\\s(.*) kB", pathlib.Path("/proc/self/status").read_text())[1]) // 1024
for number in range(4):  # Lance's threads come to their buffers one after the other
    engine.export("small", f"small{number}.{sys.argv[1]}")
before = peak()
assert engine.export("large", f"large.{sys.argv[1]}").num_rows == 163840
print(peak() - before)
"""
    for form in ("npy", "lance"):
        done = subprocess.run(
            [sys.executable, "-c", script, form],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert int(done.stdout) < 64, (form, done.stdout)


def publish_large(ledger: Ledger, shard: Shard) -> None:
    """Publish 4 MB of vectors."""
    numbers = np.random.default_rng(shard.start).random((len(shard), 256), dtype=np.float32) + np.float32(0.1)
    rows = pa.array(range(shard.start, shard.stop), pa.int64())
    table = pa.table({"id": rows, EMBEDDING: floats(numbers), TEXT_HASH: hashes_of(rows), SOURCE_ROW: rows})
    ledger.publish(table, shard=shard, fingerprint="f", rejects=[], usage=Usage())


# Many small parts


@pytest.mark.parametrize("form", FORMATS)
def test_the_rows_of_twice_as_many_parts_are_twice_the_work_to_count(tmp_path, monkeypatch, form):
    """A million files of one row are groups of many thousand parts: to add up a group anew with each of its parts would take hours."""
    looks = 0
    of_part = vars(LivePart)["num_rows"]

    class Spied:
        def __get__(self, part: LivePart, _: type) -> int:
            nonlocal looks
            looks += 1
            return of_part.__get__(part)

        def __set__(self, part: LivePart, num_rows: int) -> None:
            of_part.__set__(part, num_rows)

    def spied(sized: Any) -> int:
        nonlocal looks
        looks += isinstance(sized, pa.RecordBatch)
        return len(sized)

    def looks_for(num_parts: int) -> int:
        nonlocal looks
        folder = tmp_path / str(num_parts)
        ledger = Ledger(LocalStorage(str(folder)))
        ledger.claim(make_job())
        for number in range(num_parts):
            shard = make_shard(1, start=number)
            ledger.publish(
                make_table(shard, without=()), shard=shard, fingerprint=FINGERPRINT, rejects=[], usage=Usage()
            )
        looks = 0
        assert engine.export(folder, tmp_path / f"{num_parts}.{form}").num_rows == num_parts
        return looks

    monkeypatch.setattr(LivePart, "num_rows", Spied())
    monkeypatch.setattr(one_file, "len", spied, raising=False)
    assert looks_for(40) <= 2 * looks_for(20)
