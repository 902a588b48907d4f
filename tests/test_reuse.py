"""Reuse: texts that have a vector already keep it, whatever is gone or damaged, and only others go through the model."""

from __future__ import annotations

import json
import tracemalloc
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine import former_vectors, reuse, switching
from engine.calibration import Calibration, fix
from engine.commits import Usage
from engine.config import load_config
from engine.errors import ConfigError, Refused
from engine.former_parts import check_reuse, reuse_index
from engine.former_vectors import FormerVectors
from engine.ledger import Ledger, part_name
from engine.models.base import PROBE
from engine.pipeline.datasource import _read
from engine.pipeline.parcel import unpack
from engine.pipeline.worker import EmbedWorker
from engine.quantization import VectorFormat, from_arrow
from engine.reuse import FOLDER, Candidates, build
from engine.schema import CHUNK_COLUMNS, EMBEDDING, SOURCE_ROW, TEXT_HASH
from engine.storage import LocalStorage, open_storage
from engine.survey import survey
from engine.text_hashes import Numbers, numbers_of, text_hashes
from tests.builders import make_shard, work_for
from tests.object_stores import BUCKET, serving
from tests.test_quantization import DTYPES, SIGNED, SignedModel
from tests.tiny_models import BERT, bert_tokenizer, save_transformer

pytestmark = pytest.mark.usefixtures("engine_logger_as_it_was")

SCALE = 1 / 120


class Loud(SignedModel):
    """Writes down what it embeds, and rejects what contains `refused`."""

    seen: list[str] = []  # noqa: RUF012 - of all

    async def embed(self, texts: list[str]) -> np.ndarray:
        self.seen.extend(texts)
        if any("refused" in text for text in texts):
            raise RuntimeError
        return await super().embed(texts)


class Run:
    """A run over lists of texts, one file each, made without Ray by its own actor."""

    scale = SCALE
    """Of int8."""

    def __init__(self, out: str | Path, files: dict[str, list[Any]], **options: Any) -> None:
        folder = Path(options.pop("inputs", Path(str(out) + "-in")))
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in files.items():
            pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / name)
        given = {"model": "custom:tests.test_reuse.Loud", "shard_rows": 10} | options
        self.config = load_config(source=str(folder), output=str(out), **given)
        self.asked = survey(self.config)
        self.out = out

    def __call__(self, most: int | None = None) -> list[str]:
        """Embed and commit all, or as many pairs of shards and no more; return what the model was asked for."""
        ledger, job = self.asked.ledger, self.asked.job
        check_reuse(self.asked)
        ledger.claim(job)
        scale = self.scale if self.config.output_dtype == "int8" else None
        if scale:
            fix(ledger.storage, Calibration(scale, "texts"))
        work = work_for(self.asked, scale=scale, reuse=reuse_index(self.asked))
        worker = EmbedWorker(work)
        Loud.seen.clear()
        groups = [tuple(self.asked.standing.plan.pending[at : at + 2]) for at in range(0, 1000, 2)]
        for block in _read([group for group in groups if group][:most], work.selection):
            for item in next(unpack(worker(block))):
                ledger.publish(
                    item.table,
                    shard=item.shard,
                    fingerprint=job.fingerprint,
                    rejects=item.rejects,
                    usage=item.usage,
                    vectors=item.vectors,
                )
        if most is None:
            switching.switch(ledger, self.asked.standing, lambda: None)
        return list(Loud.seen)

    def stored(self) -> dict[str, np.ndarray]:
        """Return the stored vectors, by file and row."""
        ledger = self.asked.ledger
        parts = [ledger.part(shard_id).table for shard_id in ledger.live()]
        return {
            row: vector
            for table in parts
            for row, vector in zip(table["id"].to_pylist(), from_arrow(table[EMBEDDING]), strict=True)
        }


TEXTS = [f"text {row}" for row in range(50)]


def first(folder: Path, **options: Any) -> Run:
    """Make an output of 50 texts in five parts."""
    run = Run(folder / "first", {"a.parquet": TEXTS}, **options)
    assert run() == TEXTS
    return run


@pytest.mark.parametrize("dtype", DTYPES)
def test_known_texts_keep_their_stored_vectors_and_only_others_reach_the_model(dtype, tmp_path):
    """In any order, among rejects and repeated texts, to the bit; they are counted as reused, not as tokens or duplicates."""
    old = first(tmp_path, output_dtype=dtype)
    texts = ["new 1", *TEXTS[30:45], None, "refused", "new 2", *TEXTS[:12], "", "new 1", TEXTS[3], "\U0001f600 new 3"]
    new = Run(tmp_path / "second", {"b.parquet": texts}, output_dtype=dtype, reuse=[tmp_path / "first"])
    assert set(new()) - {"refused", PROBE} == {"new 1", "new 2", "\U0001f600 new 3"}
    status = engine.status(tmp_path / "second")
    assert (status.num_rows, status.num_reused, status.num_rejects) == (32, 28, 3)
    assert "28 rows" in status.lines()["reused"]
    assert engine.verify(tmp_path / "second", "full").ok
    before, after = old.stored(), new.stored()
    fresh = Run(tmp_path / "fresh", {"b.parquet": texts}, output_dtype=dtype)
    fresh()
    for row, text in enumerate(texts):
        if text in TEXTS:
            np.testing.assert_array_equal(after[f"b.parquet#{row}"], before[f"a.parquet#{TEXTS.index(text)}"])
    wanted = fresh.stored()
    assert wanted.keys() == after.keys()
    for key, vector in wanted.items():
        np.testing.assert_array_equal(after[key], vector)
    for made in (new, fresh):
        tables = [made.asked.ledger.part(shard_id).table for shard_id in made.asked.ledger.live()]
        for table in tables:
            rows = table[SOURCE_ROW].to_pylist()
            assert table[TEXT_HASH].to_pylist() == text_hashes([texts[row] for row in rows]).to_pylist()


LONG = [" ".join(f"word {number} of text {row}" for number in range(60 + 90 * row)) for row in range(4)]
"""Of so many chunks that each differs in their number."""


def chunk_rows(out: str | Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return of each row of the source the chunks and their vectors, in the order of the output."""
    table = engine.read(out)
    columns = [table[name].to_pylist() for name in (*CHUNK_COLUMNS, "text", EMBEDDING)]
    found: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for key, *values in zip(table["id"].to_pylist(), *columns, strict=True):
        found[key].append(tuple(values))
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_text_with_a_row_for_each_chunk_keeps_all_of_them(dtype, tmp_path):
    """Between new ones, in any order, repeated, beside rejects; where all texts of a shard are known the model is not asked."""
    options = {
        "model": f"sentence-transformers:{save_transformer(tmp_path / 'tiny', BERT, bert_tokenizer())}",
        "backend": "torch",
        "long_texts": "chunk-rows",
        "keep": ["text"],
        "output_dtype": dtype,
    }
    old = Run(tmp_path / "first", {"a.parquet": [*LONG, "short", LONG[2], "another"]}, **options)
    old()
    texts = ["new", LONG[3], None, LONG[1], "short", LONG[1], LONG[2] + " and more", LONG[0], "", LONG[3]]
    texts += [LONG[2], "short", None]
    new = Run(tmp_path / "second", {"b.parquet": texts}, reuse=[tmp_path / "first"], **options)
    new()
    status = engine.status(tmp_path / "second")
    assert (status.num_rows, status.num_reused, status.num_rejects) == (10, 8, 3)
    assert engine.verify(tmp_path / "second", "full").ok
    known, found = chunk_rows(tmp_path / "first"), chunk_rows(tmp_path / "second")
    assert len({len(known[f"a.parquet#{row}"]) for row in range(4)}) == 4
    for row, text in enumerate(texts):
        if text in LONG:
            assert found[f"b.parquet#{row}"] == known[f"a.parquet#{LONG.index(text)}"]
    fresh = Run(tmp_path / "fresh", {"b.parquet": texts}, **options)
    fresh()
    wanted = chunk_rows(tmp_path / "fresh")
    assert found.keys() == wanted.keys()
    for key, chunks in wanted.items():
        assert [chunk[:4] for chunk in found[key]] == [chunk[:4] for chunk in chunks]
        np.testing.assert_allclose([c[4] for c in found[key]], [c[4] for c in chunks], atol=2e-3)


def test_a_column_that_is_named_as_chunks_are_is_no_chunk(tmp_path):
    """Where a text has one row, what is kept may have any name."""
    options = {"keep": ["chunk_index"], "inputs": tmp_path / "in"}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": TEXTS, "chunk_index": [None] * 50}), tmp_path / "in/a.parquet")
    first = Run(tmp_path / "first", {}, **options)
    first()
    again = Run(tmp_path / "second", {}, reuse=[tmp_path / "first"], **options)
    assert again() == []
    assert again.stored().keys() == first.stored().keys()


def test_a_job_s_own_former_parts_are_reused_and_the_model_is_not_asked_where_nothing_is_new(tmp_path):
    """The texts of an input that is gone; shards with no text at all among them."""
    first(tmp_path, inputs=tmp_path / "in")
    (tmp_path / "in/a.parquet").unlink()
    again = Run(tmp_path / "first", {"z.parquet": [*TEXTS[20:35], *[None] * 15]}, inputs=tmp_path / "in")
    assert again() == []
    assert again.asked.ledger.committed() > again.asked.standing.plan.unknown
    status = engine.status(tmp_path / "first")
    assert (status.num_reused, status.num_rejects) == (15, 15)


def test_of_an_input_that_changed_only_what_is_new_is_embedded(tmp_path, monkeypatch):
    """In front of all other rows, within them, behind them; a resume finds the index, and others may look on after the switch."""
    old = first(tmp_path, inputs=tmp_path / "in").stored()
    texts = ["front", *TEXTS[:20], "edited", *TEXTS[21:], "behind"]
    changed = Run(tmp_path / "first", {"a.parquet": texts}, inputs=tmp_path / "in")
    assert changed(most=1) == ["front"]
    looking_on = FormerVectors(reuse_index(changed.asked))
    monkeypatch.setattr(reuse, "_hashes", None)  # what reads the parts
    resumed = Run(tmp_path / "first", {}, inputs=tmp_path / "in")
    assert len(resumed.asked.standing.plan.pending) == 4
    assert resumed() == ["edited", "behind"]
    assert looking_on.find(numbers_of(text_hashes(TEXTS))).is_there.all()
    status = engine.status(tmp_path / "first")
    assert (status.num_rows, status.num_reused, status.pending_rows) == (52, 49, 0)
    new = resumed.stored()
    for row, text in enumerate(texts):
        if text in TEXTS:
            np.testing.assert_array_equal(new[f"a.parquet#{row}"], old[f"a.parquet#{TEXTS.index(text)}"])
    assert reuse_index(Run(tmp_path / "first", {}, inputs=tmp_path / "in").asked) is None


def test_what_is_gone_or_damaged_is_embedded_again(tmp_path, caplog):
    """Parts before and after the index is built, and files of the index: a warning each, and the same vectors."""
    old = first(tmp_path)
    ids = sorted(old.asked.ledger.live())
    of = {shard_id: old.asked.ledger.part(shard_id).table.num_rows for shard_id in ids}
    data = Path(old.out, part_name(ids[0])).read_bytes()
    Path(old.out, part_name(ids[0])).write_bytes(data[: len(data) // 2])
    new = Run(tmp_path / "second", {"b.parquet": TEXTS}, reuse=[tmp_path / "first"])
    new.asked.ledger.claim(new.asked.job)
    with caplog.at_level("WARNING"):
        index = reuse_index(new.asked)
        assert f"{ids[0]}.parquet cannot be read" in caplog.text
        flipped = bytearray(Path(old.out, part_name(ids[1])).read_bytes())
        flipped[-600] ^= 1
        Path(old.out, part_name(ids[1])).write_bytes(flipped)
        Path(old.out, part_name(ids[2])).unlink()
        assert len(new()) == of[ids[0]] + of[ids[1]] + of[ids[2]] == 30
        assert all(f"{shard_id}.parquet" in caplog.text for shard_id in ids[1:3])
        third = Run(tmp_path / "third", {"b.parquet": TEXTS}, reuse=[tmp_path / "second"])
        third.asked.ledger.claim(third.asked.job)
        index = reuse_index(third.asked)
        bucket = next(path for path in Path(third.out, index.folder).iterdir() if path.suffix == "")
        hashes = numbers_of(text_hashes(TEXTS))
        assert FormerVectors(index).find(hashes).is_there.all()
        for damage in (b"", bucket.read_bytes()[:-7], bytes(reversed(bucket.read_bytes())), None):
            bucket.unlink() if damage is None else bucket.write_bytes(damage)
            found = FormerVectors(index).find(hashes)
            assert not found.is_there.any()
        Path(third.out, index.folder, reuse.MANIFEST).write_text("[]")
        assert not FormerVectors(index).find(hashes).is_there.any()
        assert reuse_index(third.asked) == index  # which is built again
        assert FormerVectors(index).find(hashes).is_there.all()
        Path(third.out, index.folder, reuse.MANIFEST).unlink()
        assert not FormerVectors(index).find(hashes).is_there.any()


def test_an_index_is_found_again_and_not_built_again(tmp_path, monkeypatch):
    """By a resume, though the output was moved; other parts, another index; without candidates there is none."""
    first(tmp_path)
    new = Run(tmp_path / "second", {"b.parquet": TEXTS}, reuse=[tmp_path / "first"])
    new.asked.ledger.claim(new.asked.job)
    index = reuse_index(new.asked)
    monkeypatch.setattr(reuse, "_hashes", None)  # what reads the parts
    assert reuse_index(new.asked) == index
    Path(new.out).rename(tmp_path / "moved")
    moved = Run(tmp_path / "moved", {}, inputs=tmp_path / "second-in", reuse=[tmp_path / "first"])
    assert reuse_index(moved.asked).digest == index.digest
    alone = Run(tmp_path / "alone", {"b.parquet": TEXTS})
    assert reuse_index(alone.asked) is None
    assert not (tmp_path / "alone").exists()
    monkeypatch.undo()
    both = Run(tmp_path / "both", {"b.parquet": [*TEXTS, "new"]}, reuse=[tmp_path / "first", tmp_path / "first"])
    assert both() == ["new"]
    once_more = Run(tmp_path / "both", {"c.parquet": ["new", "newer"]}, inputs=tmp_path / "both-in", reuse=[both.out])
    assert once_more() == ["newer"]  # the output itself: of all its parts, not of former ones alone


def test_other_vectors_are_not_reused_and_the_message_names_what_differs(tmp_path, caplog):
    """Refused before anything is written: another model, type or setting. Where the text comes from may differ."""
    first(tmp_path)
    for options, named in (
        ({"output_dtype": "float16"}, 'output_dtype: "float32" in '),
        ({"model": SIGNED}, "slug|model"),
    ):
        other = Run(tmp_path / "second", {"b.parquet": TEXTS}, reuse=[tmp_path / "first"], **options)
        with pytest.raises(ConfigError, match=named):
            other()
        with pytest.raises(ConfigError, match=named):
            engine.plan(**other.config.model_dump(exclude_defaults=True))
    with pytest.raises(ConfigError, match="is not an output"):
        Run(tmp_path / "second", {"b.parquet": TEXTS}, reuse=[tmp_path / "nothing"])()
    assert not (tmp_path / "second").exists()
    made = Run(tmp_path / "third", {"b.parquet": TEXTS}, reuse=[tmp_path / "first"], text_template="{text}")
    assert made() == []
    int8 = Run(tmp_path / "int8", {"a.parquet": TEXTS}, output_dtype="int8")
    assert len(int8()) == 50
    other = Run(tmp_path / "other", {"a.parquet": TEXTS}, output_dtype="int8", reuse=[tmp_path / "int8"])
    other.asked.ledger.claim(other.asked.job)
    fix(other.asked.ledger.storage, Calibration(SCALE / 2, "texts"))
    assert reuse_index(other.asked) is None
    assert "have another scale" in caplog.text


def test_a_model_that_is_another_version_reuses_nothing_or_stops(tmp_path, caplog):
    """By its slug, or by its dimension: nothing of two models gets into one part."""
    old = first(tmp_path)
    index = build(old.asked.ledger.storage, [Candidates(old.asked.ledger, tuple(old.asked.ledger.live()), 10)],
                  VectorFormat("float32", 44), "hash-44")  # fmt: skip
    assert FormerVectors.of_model(index, "float32", None, "hash-45") is None
    assert "another version" in caplog.text
    assert FormerVectors.of_model(index, "float32", None, "hash-44") is not None
    assert FormerVectors.of_model(None, "float32", None, "") is None
    wrong = Run(tmp_path / "second", {"b.parquet": ["text 1", "new"]}, reuse=[tmp_path / "first"])
    wrong.config = wrong.config.model_copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loud, "vector", lambda self, text: np.ones(3, np.float32))
        with pytest.raises(Refused, match="answers with 3 dimensions, and the vectors to be reused have 44"):
            wrong()


def publish_texts(out: Path, parts: list[list[int]]) -> tuple[LocalStorage, list[str]]:
    """Publish parts of one-dimensional vectors that are the number of their text."""
    storage = LocalStorage(str(out))
    ledger, ids = Ledger(storage), []
    for number, texts in enumerate(parts):
        shard = make_shard(len(texts), path=f"{number:03}.parquet")
        vectors = pa.FixedSizeListArray.from_arrays(
            pa.array(np.float32(texts) + 1), type=VectorFormat("float32", 1).arrow_type
        )
        hashes = hashes_for(texts)
        table = pa.table({EMBEDDING: vectors, TEXT_HASH: hashes, SOURCE_ROW: pa.array(range(len(texts)), pa.int64())})
        ledger.publish(table, shard=shard, fingerprint="f", rejects=[], usage=Usage())
        ids.append(shard.id)
    return storage, ids


def hashes_for(texts: list[int]) -> pa.Array:
    """Return hashes of which some have the same first half, spread over all buckets."""
    raw = [(text % 7 * (2**64 // 7)).to_bytes(8, "big") + (text // 7).to_bytes(8, "big") for text in texts]
    return pa.array(raw, pa.binary())


@given(
    st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=30), min_size=1, max_size=14),
    st.lists(st.integers(0, 80), max_size=40),
)
@settings(max_examples=12, deadline=None)
def test_a_look_up_is_that_of_a_dict(tmp_path_factory, parts, wanted):
    """For any hashes, repeated within parts and among them, over several buckets; in as few parts as hold the most of the texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "BUCKET_ROWS", 8)
        patch.setattr(reuse, "SCATTERED_ROWS", 16)
        patch.setattr(reuse, "MAX_SAME", 3)
        patch.setattr(former_vectors, "MAX_PARTS", 2)
        storage, ids = publish_texts(tmp_path_factory.mktemp("reuse"), parts)
        index = build(storage, [Candidates(Ledger(storage), tuple(ids), 10)], VectorFormat("float32", 1))
        hashes = numbers_of(hashes_for(wanted))
        former = FormerVectors(index)
        found = former.find(hashes)
        known = {text for part in parts for text in part}
        assert found.is_there.tolist() == [text in known for text in wanted]
        assert found.stored.rows.ravel().tolist() == [text + 1 for text in wanted if text in known]
        # And with some of the parts gone, whatever is in another part still.
        gone = ids[::2]
        for shard_id in gone:
            storage.delete(part_name(shard_id))
        left = defaultdict(list)
        order = sorted(range(len(ids)), key=ids.__getitem__)
        for number in order:
            for text in set(parts[number]):
                left[text].append(number)
        still = {text for text, numbers in left.items() if any(ids[number] not in gone for number in numbers[:3])}
        found = FormerVectors(index).find(hashes)
        assert found.is_there.tolist() == [text in still for text in wanted]
        assert len(former._parts) <= 2


def test_texts_are_taken_from_the_part_that_has_the_most_of_them(tmp_path, monkeypatch):
    """A text that all parts have opens none of its own."""
    storage, ids = publish_texts(tmp_path, [[99, *range(at, at + 10)] for at in range(0, 80, 10)])
    index = build(storage, [Candidates(Ledger(storage), tuple(ids), 10)], VectorFormat("float32", 1))
    for at in range(8):
        former = FormerVectors(index)
        assert former.find(numbers_of(hashes_for([99, *range(at * 10, at * 10 + 10)]))).is_there.all()
        assert len(former._parts) == 1


def test_an_output_in_an_object_store_is_reused(tmp_path):
    """Its index lies there too; an actor copies what it needs of it to a file without a name."""
    with serving() as store:
        old = Run(f"s3://{BUCKET}/first", {"a.parquet": TEXTS}, inputs=tmp_path / "a")
        assert old() == TEXTS
        texts = [*TEXTS[5:30], "new"]
        new = Run(f"s3://{BUCKET}/second", {"a.parquet": texts}, inputs=tmp_path / "b", reuse=[str(old.out)])
        assert new() == ["new"]
        assert any(f"/second/{FOLDER}/" in seen and seen.startswith("PUT") for seen in store.seen)
        np.testing.assert_array_equal(new.stored()["a.parquet#0"], old.stored()["a.parquet#5"])
        assert json.loads(open_storage(str(new.out)).read("_engine/job.json"))["config"]["reuse"] == [str(old.out)]


def test_building_takes_no_more_memory_for_ten_times_the_hashes(tmp_path, monkeypatch):
    """A few parts and one bucket are in memory, Arrow's too; parts are synthesised, since only their column of hashes is read."""
    monkeypatch.setattr(reuse, "BUCKET_ROWS", 1 << 12)
    monkeypatch.setattr(reuse, "SCATTERED_ROWS", 1 << 12)
    monkeypatch.setattr(reuse, "PARTS_AT_ONCE", 4)
    in_arrow: list[int] = []

    def spied(hashes: pa.ChunkedArray) -> Numbers:
        in_arrow.append(pa.total_allocated_bytes() - before)
        return numbers_of(hashes)

    monkeypatch.setattr(reuse, "numbers_of", spied)
    peaks = []
    for num_parts in (10, 100):
        storage = LocalStorage(str(tmp_path / str(num_parts)))
        ids = [f"{number:032x}" for number in range(num_parts)]
        chance = np.random.default_rng(0)
        for shard_id in ids:
            raw = chance.bytes(2000 * 16)
            hashes = pa.array([raw[at : at + 16] for at in range(0, len(raw), 16)], pa.binary())
            path = Path(storage.root, part_name(shard_id))
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({TEXT_HASH: hashes}), path)
        del hashes
        in_arrow.clear()
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        index = build(storage, [Candidates(Ledger(storage), tuple(ids), 2000)], VectorFormat("float32", 1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes = {name: size for name, size in storage.sizes(index.folder) if name != reuse.MANIFEST}
        assert sum(sizes.values()) == num_parts * 2000 * 24
    assert len(sizes) == 64
    assert peaks[1] < 1.3 * peaks[0]
    assert max(in_arrow) < 25 * 2000 * 16  # which tracemalloc does not see; a quarter of all hashes
