"""Sources in a bucket and on the Hub: what is listed, what is read, and what is noticed when it changes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.buckets import ranged_file
from engine.buckets.bucket import Bucket
from engine.buckets.place import place_of
from engine.errors import SourceChanged, SourceError
from engine.schema import TEXT, InputFile, Shard
from engine.sources import in_memory
from engine.sources.formats import read_shapes, read_shards
from engine.sources.inventory import absolute, list_inputs
from engine.sources.opening import open_input
from engine.sources.rows import Selection
from engine.sources.tables import tables_of
from engine.sources.texts import texts_in
from engine.storage import open_storage
from tests import hub
from tests.object_stores import BUCKET

PATHS = (
    "a.parquet",
    "b/c.parquet",
    "b/d e.pq",
    "b/deep/ü#%20?.parquet",
    "_hidden/x.parquet",
    ".h/x.parquet",
    "b/_x.parquet",
    "b/n.md",
)
WHOLE = Selection("text")


def parquet(num_rows: int, word: str = "text") -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"text": [f"{word} {row} " + "x" * 50 for row in range(num_rows)]}), sink, row_group_size=500
    )
    return sink.getvalue()


@pytest.fixture(scope="module")
def both(s3_server, tmp_path_factory) -> tuple[Path, str]:
    """The same files in a folder and below a prefix."""
    tmp_path = tmp_path_factory.mktemp("both")
    root = f"s3://{BUCKET}/{tmp_path.name}"
    for number, path in enumerate(PATHS):
        data = parquet(10 + number)
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(data)
        put(f"{root}/in/{path}", data)
        put(f"{root}/inside-out/{path}", data)  # a name that begins as the folder's
    return tmp_path, root


def put(location: str, data: bytes) -> None:
    place = place_of(location)
    Bucket(place).replace(place.key, data)


def texts(file: InputFile) -> list[str]:
    num_rows = read_shapes([file], WHOLE)[0].num_rows
    shard = Shard.of("f", file, 0, num_rows)
    return list(next(read_shards([shard], WHOLE)).table.column(TEXT).to_pylist())


@pytest.mark.parametrize(
    "source",
    [
        *("in", "in/", "in/b", "in/a.parquet", "in/*.parquet", "in/**/*.parquet", "in/**", "in/*/*.p*", "in/?/[cd]*"),
        *("in/_hidden/*", "in/.h/*", "in/b/deep/ü#%20?.parquet", "in/[ab].parquet", "in/**/deep/*"),
    ],
)
def test_a_bucket_is_listed_as_a_folder_is(both, source):
    """Folders, single files and globs: the same paths, sizes and texts below the same base."""
    folder, root = both
    local, remote = list_inputs([f"{folder}/{source}"]), list_inputs([f"{root}/{source}"])
    assert [(file.path, file.size) for file in remote.files] == [(file.path, file.size) for file in local.files]
    assert remote.base.removeprefix(root) == local.base.removeprefix(str(folder))
    assert all(file.location == f"{remote.base}/{file.path}" for file in remote.files)
    assert [texts(file) for file in remote.files] == [texts(file) for file in local.files]
    assert absolute(absolute(f"{root}/{source}")) == absolute(f"{root}/{source}")


def test_a_version_is_the_content_s(s3, tmp_path):
    """The same bytes put again are the same input; other bytes of the same size are another."""
    location = f"s3://{BUCKET}/{tmp_path.name}/a.parquet"
    versions = []
    for word in ("text", "text", "TEXT"):
        put(location, parquet(10, word))
        versions.append(list_inputs([location]).files[0])
    assert versions[0] == versions[1]
    assert versions[2].size == versions[0].size
    assert versions[2].version != versions[0].version


def test_sources_are_of_one_place_and_named_in_any_order(both):
    """The base is the nearest prefix above all; two buckets, or a bucket and a disk, are two jobs."""
    folder, root = both
    one, two = (
        list_inputs(order)
        for order in ([f"{root}/in/b", f"{root}/in/a.parquet"], [f"{root}/in/*.parquet", f"{root}/in/b/"])
    )
    assert one == two
    assert one.base == f"{root}/in"
    for other in (str(folder / "in"), "s3://another-bucket/in"):
        with pytest.raises(SourceError, match="the sources are in several places"):
            list_inputs([f"{root}/in", other])


@pytest.mark.parametrize("source", ["nothing", "in/nothing.parquet", "in/*.nothing", "in/b/deep/ü/"])
def test_what_names_nothing_is_said(both, source):
    """With the name."""
    with pytest.raises(SourceError, match=r"there is no file|no files match"):
        list_inputs([f"{both[1]}/{source}"])


def test_source_and_output_are_kept_apart(both):
    """Neither lies where the other is looked for; beside each other is well, and so is a name that only begins alike."""
    _, root = both
    for source, output in (
        ("in", "in/out"),
        ("in/", "in"),
        ("**/*.parquet", "out"),
        ("in/b", "in"),
        ("in/b/c.parquet", "in/b"),
    ):
        with pytest.raises(SourceError, match="beside the source"):
            list_inputs([f"{root}/{source}"], outside=f"{root}/{output}/")
    for output in (f"{root}/in-out", f"{root}/out", "/in", "s3://other/in"):
        assert list_inputs([f"{root}/in"], outside=output).files
    with pytest.raises(SourceError, match="beside the source"):
        list_inputs([f"{root}/in"], outside=f"{root.replace('s3:', 's3a:')}/in/out")


def test_a_file_is_read_in_pieces_and_in_spite_of_a_bad_store(s3, tmp_path):
    """A footer is one request; a shard's rows are a few, never the file; bodies that break off and 503 do not show."""
    location = f"s3://{BUCKET}/{tmp_path.name}/large.parquet"
    put(location, parquet(20_000))
    file = list_inputs([location]).files[0]
    s3.seen.clear()
    read_shapes([file], WHOLE)
    assert len(s3.seen) == 1
    s3.fail("cut", "GET", times=2)
    s3.fail((503, "SlowDown"), "GET", times=2)
    shard = Shard.of("f", file, 10_200, 10_300)
    rows = next(read_shards([shard], WHOLE))
    assert rows.table.column(TEXT)[0].as_py().startswith("text 10200 ")
    assert rows.table.num_rows == 100


def test_files_of_one_bucket_share_their_connections(s3, tmp_path):
    """However many there are: each connection costs round trips, and each client asks for its own credentials where a role gives them."""
    root = f"s3://{BUCKET}/{tmp_path.name}"
    for number in range(20):
        put(f"{root}/{number}.parquet", parquet(1, f"{number}"))
    files = list_inputs([root]).files
    s3.num_connections = 0
    assert len({texts(file)[0] for file in files}) == 20
    assert s3.num_connections < 5


def test_small_reads_that_follow_each_other_share_requests(s3, tmp_path):
    """A file of 10 MB, read line by line, or from its middle, is a handful of requests, and its bytes."""
    location = f"s3://{BUCKET}/{tmp_path.name}/lines.txt"
    data = b"".join(b"line %d of many\n" % number for number in range(500_000))
    put(location, data)
    file = list_inputs([location]).files[0]
    for start in (0, 5_000_000):
        s3.seen.clear()
        with io.BufferedReader(open_input(file)) as opened:
            opened.seek(start)
            assert b"".join(opened) == data[start:]
        assert len(s3.seen) <= 5


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_an_object_that_changes_while_it_is_read_is_noticed(s3, tmp_path, monkeypatch, change):
    """Between two shards of one pass: no row of the new content comes out."""
    monkeypatch.setattr(ranged_file, "AHEAD_BYTES", 1)
    location = f"s3://{BUCKET}/{tmp_path.name}/x.parquet"
    put(location, parquet(2000))
    file = list_inputs([location]).files[0]
    read = read_shards([Shard.of("f", file, start, start + 1000) for start in (0, 1000)], WHOLE)
    assert next(read).table.num_rows == 1000
    if change == "deleted":
        Bucket(place_of(location)).delete(place_of(location).key)
    else:
        put(location, parquet(2000, "TEXT"))
    with pytest.raises(SourceChanged, match="changed while it was being read"):
        next(read)


# The Hub


OF_HUB = """
import json, sys
from engine.errors import EngineError
from engine.schema import InputFile
from engine.sources.inventory import list_inputs
from tests.test_remote_sources import texts
listed = [list_inputs([source]) for source in sys.argv[1:]]
files = [[(file.path, file.version, texts(file)[0]) for file in one.files] for one in listed]
first = listed[0].files[0]
said = []
for bad in (InputFile(first.path, listed[0].base + "/" + first.path, first.size, "another"), "hf://datasets/owner/none/x"):
    try:
        list_inputs([bad]) if isinstance(bad, str) else texts(bad)
    except EngineError as error:
        said.append([type(error).__name__, error.message])
print(json.dumps([[one.base for one in listed], files, said]))
"""


def test_a_data_set_of_the_hub_is_a_source(tmp_path):
    """Listed as of one commit, read as of it, told apart by its blobs; a private or absent repository is one message without the token."""
    same = parquet(3)
    with hub.serving() as served:
        old = served.push({"data/a.parquet": same, "data/b.parquet": parquet(4, "old"), "README.md": b"#"})
        served.push({"data/b.parquet": parquet(4, "new")})
        sources = [f"{hub.SET}/data", f"{hub.SET}@{old}/**/*.parquet", f"{hub.SET}/data/b.parquet"]
        for fault, part in (
            ((503, ""), "api/datasets"),
            ("cut", "/tree/"),
            ((502, ""), "/resolve/"),
            ("cut", "/blobs/"),
        ):
            served.fail(fault, part=part)
        done = subprocess.run(
            [sys.executable, "-c", OF_HUB, *sources], env=os.environ, capture_output=True, text=True, timeout=120
        )
        assert not any(fault.times for fault in served.faults)
    assert done.returncode == 0, done.stderr[-3000:]
    bases, files, said = json.loads(done.stdout.splitlines()[-1])
    assert bases == [f"{hub.SET}/data", f"{hub.SET}@{old}", f"{hub.SET}/data"]
    assert [[(path, text.split()[0]) for path, _, text in listed] for listed in files] == [
        [("a.parquet", "text"), ("b.parquet", "new")],
        [("data/a.parquet", "text"), ("data/b.parquet", "old")],
        [("b.parquet", "new")],
    ]
    assert files[0][0][1] == files[1][0][1] == hub.blob_of(same)
    assert [kind for kind, _ in said] == ["SourceChanged", "SourceError"]
    assert "HF_TOKEN" in said[1][1]
    assert hub.TOKEN not in done.stdout + done.stderr


@pytest.mark.usefixtures("s3")
def test_a_source_in_memory_is_copied_to_a_bucket_and_read_from_there(tmp_path):
    """Its blocks are named by their content: no e-tag and no size of an object is asked of them."""
    store = open_storage(f"s3://{BUCKET}/{tmp_path.name}/out")
    selection = Selection("text", has_faults=True)
    name = in_memory.stage(tables_of(["a b", "", "c d"], selection), store, selection)
    files = in_memory.listed([name], store).files
    assert [shape.num_rows for shape in read_shapes(files, selection)] == [3]
    rows = next(read_shards([Shard.of("f", files[0], 0, 3)], selection))
    assert texts_in(rows)[0] == ["a b", "c d"]
    store.delete(files[0].location.removeprefix(f"{store.root}/"))
    with pytest.raises(SourceError, match="cannot be read"):
        next(read_shards([Shard.of("f", files[0], 0, 3)], selection))
