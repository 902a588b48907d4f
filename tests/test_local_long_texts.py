"""Long texts in models that run here: cut and counted, in windows of tokens, or rejected; and the same text only once."""

from __future__ import annotations

import asyncio
import json
import logging
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

import engine
from engine.config import load_config
from engine.errors import ConfigError, CorruptOutput, EngineError, InputRejected
from engine.model_config import ModelConfig
from engine.models import local, model_files, registry
from engine.models.sentence_transformer import SentenceTransformerEmbeddingModel
from engine.models.tokens import Tokenizer
from engine.models.windows import WINDOWS_AT_ONCE, Fitter
from engine.part_checks import check
from engine.pipeline.parcel import Item, pack, unpack
from engine.pipeline.worker import EmbedWorker, Work
from engine.schema import SOURCE_ROW, TEXT_HASH
from engine.sources.formats import read_shards
from engine.sources.rows import Selection
from engine.survey import survey
from engine.text_hashes import text_hashes
from tests.builders import hashes_of, make_shard
from tests.test_models import ScriptedModel
from tests.test_own_encode import own_forward, own_module, static
from tests.tiny_models import (
    BERT,
    PACKAGED,
    Watched,
    bert_tokenizer,
    cosines,
    mixed,
    rows,
    sample,
    save_transformer,
    with_modules,
)

MINILM = f"sentence-transformers:{PACKAGED}"
LIMIT = 256
"""Tokens that MiniLM takes, [CLS] and [SEP] among them."""
SIZE = 246
"""Of a window: what is left of them, less a thirty-second."""
MANY = "".join(f"Satz {number} über naïve Cafés 🧑‍🚀 in 東京; " for number in range(120))
TEXTS = [
    "a short one",
    "one two three four " * 300,
    MANY,
    "漢字とかな交じり文" * 200,
    "x" * 90 + " y" * 700 + " " * 9000,
]
REASON = "longer than the 256 tokens that the model takes"


@cache
def reference() -> SentenceTransformer:
    return SentenceTransformer(str(model_files.folder_of(PACKAGED)), device="cpu")


@cache
def uncut() -> Any:
    """Return the library's tokenizer, apart: its calls change what it does next."""
    return AutoTokenizer.from_pretrained(model_files.folder_of(PACKAGED))


@cache
def minilm(**options: Any) -> SentenceTransformerEmbeddingModel:
    return SentenceTransformerEmbeddingModel(PACKAGED, device="cpu", backend="torch", **options)


def num_tokens(text: str) -> int:
    """Count a text's tokens by the library's tokenizer, uncut, and without special ones."""
    return len(uncut()(text, add_special_tokens=False, verbose=False)["input_ids"])


def fitter(how: Any = "chunk", overlap: int | None = None, prompt: str | None = None) -> Fitter:
    tokenizer = Tokenizer.of(reference(), prompt)
    assert tokenizer is not None
    return Fitter(tokenizer, how, overlap)


# Chunks


def test_each_chunk_is_a_window_of_its_text_and_has_the_vector_of_its_text():
    """Offsets are in characters, whatever these are; windows cover the text and lose no token; duplicates have the same ones."""
    texts = [*TEXTS, TEXTS[1]]
    answer = rows(minilm(long_texts="chunk-rows"), texts)
    assert answer.chunks is not None
    numbers = np.repeat(np.arange(len(texts)), answer.chunks.counts)
    spans = list(zip(numbers.tolist(), answer.chunks.starts.tolist(), answer.chunks.stops.tolist(), strict=True))
    pieces = [texts[number][start:stop] for number, start, stop in spans]
    assert cosines(answer.vectors, reference().encode(pieces)).min() > 0.99999
    assert max(map(num_tokens, pieces)) <= LIMIT - 2
    for number, text in enumerate(texts):
        own = [(start, stop) for at, start, stop in spans if at == number]
        assert (own[0][0], own[-1][1]) == (0, len(text))
        assert all(before[0] < start <= before[1] for before, (start, _) in pairwise(own))
    assert answer.chunks.counts.tolist()[0] == 1
    assert answer.chunks.counts[1] == answer.chunks.counts[-1] == 6
    assert answer.chunks.indices[:8].tolist() == [0, *range(6), 0]
    assert (answer.num_long, answer.num_lost_tokens, answer.num_duplicates, answer.rejects) == (5, 0, 1, {})


def test_a_chunked_vector_is_the_mean_of_its_windows_vectors_by_their_tokens():
    """Of length 1, as MiniLM's vectors are; short texts have the vectors that they have anyway."""
    texts = [*TEXTS, TEXTS[0], TEXTS[2]]
    answer = rows(minilm(long_texts="chunk"), texts)
    fitted = fitter()(texts)
    for number in range(len(texts)):
        pieces = [piece for piece, of in zip(fitted.pieces, fitted.numbers, strict=True) if of == number]
        weights = [num_tokens(piece) for piece in pieces]
        mean = np.average(reference().encode(pieces), axis=0, weights=weights)
        assert cosines(answer.vectors[[number]], mean[None, :]) > 0.99999
        assert np.linalg.norm(answer.vectors[number]) == pytest.approx(1, abs=1e-5)
    assert (answer.num_long, answer.num_lost_tokens, answer.num_duplicates) == (5, 0, 2)
    by_face = engine.embed(texts, model=MINILM, long_texts="chunk", backend="torch")
    assert cosines(by_face, answer.vectors).min() > 0.99999


def test_a_mean_is_not_scaled_where_vectors_are_not(tmp_path):
    """A model that does not normalise: a chunked vector is the plain mean, so that products with it stay comparable."""
    with_modules(save_transformer(tmp_path / "0", BERT, bert_tokenizer())).save(str(tmp_path / "bert"))
    made = {
        how: rows(
            SentenceTransformerEmbeddingModel(str(tmp_path / "bert"), device="cpu", backend="torch", long_texts=how),
            [MANY, "a b"],
        )
        for how in ("chunk", "chunk-rows")
    }
    chunks = made["chunk-rows"].vectors[:-1]
    assert np.linalg.norm(chunks, axis=1).min() > 1.1
    weights = [len(ids) - 2 for ids in Tokenizer.of(with_modules(tmp_path / "0"), None)(_pieces(MANY, made)).lists()]
    np.testing.assert_allclose(made["chunk"].vectors[0], np.average(chunks, axis=0, weights=weights), rtol=1e-4)
    np.testing.assert_allclose(made["chunk"].vectors[1], made["chunk-rows"].vectors[-1], rtol=1e-4)


def _pieces(text: str, made: dict[str, Any]) -> list[str]:
    chunks = made["chunk-rows"].chunks
    return [text[start:stop] for start, stop in zip(chunks.starts[:-1], chunks.stops[:-1], strict=True)]


@pytest.mark.parametrize(("overlap", "shared"), [(None, 16), (0, 0), (40, 40), (123, 123)])
def test_chunks_share_as_many_tokens_as_is_said(overlap, shared):
    """By default a sixteenth of what the model takes. Where words have several tokens, a few more, so that a chunk begins with a word."""
    fitted = fitter(overlap=overlap)(["word " * 1000])
    common = [
        fitted.pieces[at][len(fitted.pieces[at]) - (fitted.stops[at] - fitted.starts[at + 1]) :].split()
        for at in range(len(fitted.pieces) - 1)
    ]
    assert {len(words) for words in common} == {shared} if shared else not any(common)
    assert {num_tokens(piece) for piece in fitted.pieces[:-1]} == {SIZE}
    odd = fitter(overlap=overlap)([MANY])
    for at in range(len(odd.pieces) - 1):
        assert shared - 1 <= num_tokens(MANY[odd.starts[at + 1] : odd.stops[at]]) <= shared + 16
        assert MANY[odd.starts[at + 1] - 1] == " "


def test_a_prompt_is_put_before_each_chunk_and_takes_room_from_it():
    """No window loses a token to it; a prompt that leaves no room is refused."""
    fitted = fitter(prompt="find what is like this: ")([MANY])
    assert fitted.num_around == 2 + num_tokens("find what is like this: ")
    assert not fitted.tokens.lost.any()
    with pytest.raises(ConfigError, match="leave none for chunks: shorten --prompt"):
        fitter(prompt="word " * 254)


def test_windows_with_too_many_tokens_alone_are_halved():
    """However a tokenizer sees a piece out of its text, no token is lost, and the order stays that of the text."""
    short = fitter()
    short._size = 600  # as if pieces had more than twice the tokens that they have within their texts
    fitted = short([MANY, "a", TEXTS[3]])
    assert not fitted.tokens.lost.any()
    for number, text in ((0, MANY), (2, TEXTS[3])):
        own = np.flatnonzero(fitted.numbers == number)
        assert (fitted.starts[own[0]], fitted.stops[own[-1]]) == (0, len(text))
        assert (np.diff(fitted.starts[own]) > 0).all()
        assert (fitted.starts[own[1:]] <= fitted.stops[own[:-1]]).all()


# Texts that are cut, and texts that are rejected


def test_what_truncation_costs_is_counted_text_by_text():
    """Exactly in texts of up to six characters for each token that the model takes, nearly in longer ones; duplicates count each."""
    texts = [*sample("conversations", 400), *mixed(), *TEXTS[:4]]
    exact = [text for text in texts if len(text) <= 6 * LIMIT]
    expected = {at: lost for at, text in enumerate(exact) if (lost := num_tokens(text) + 2 - LIMIT) > 0}
    assert 10 < len(expected) < len(exact)
    tokens = Tokenizer.of(reference(), None)(exact)
    assert {at: int(tokens.lost[at]) for at in np.flatnonzero(tokens.lost)} == expected
    long = [text for text in texts if len(text) > 6 * LIMIT]
    lost = Tokenizer.of(reference(), None)(long).lost
    assert (lost > 0).all()
    assert lost.sum() == pytest.approx(sum(num_tokens(text) + 2 - LIMIT for text in long), rel=0.05)
    cut = MANY[: 6 * LIMIT]
    answer = rows(minilm(), [cut, "short", cut, "a" + " " * 50_000])
    each = num_tokens(cut) + 2 - LIMIT
    assert (answer.num_long, answer.num_lost_tokens, answer.num_duplicates) == (2, 2 * each, 1)
    assert answer.lost == {0: each, 2: each}


def test_long_texts_are_rejected_with_the_limit_in_the_reason():
    """Their neighbours are embedded; a face that needs a vector for each text says which one has none."""
    model = minilm(long_texts="reject")
    answer = rows(model, [MANY, "short", MANY, "word " * 254, "word " * 255])
    assert answer.rejects == {0: REASON, 2: REASON, 4: REASON}
    np.testing.assert_allclose(answer.vectors, reference().encode(["short", "word " * 254]), atol=1e-5)
    with pytest.raises(EngineError, match=f"text 1 .*{REASON}"):
        engine.embed(["short", MANY], model=MINILM, long_texts="reject")
    with pytest.raises(InputRejected, match=f"text 0 cannot be embedded: {REASON}"):
        asyncio.run(model.embed([MANY]))


# The same texts


def test_the_same_text_goes_through_a_model_once():
    """Each of its rows has the vector, or the reason; order is kept, and duplicates are counted."""

    def fails_on_poison(texts: list[str], answer: np.ndarray) -> np.ndarray:
        if "poison" in texts:
            raise RuntimeError
        return answer

    model = ScriptedModel(fails_on_poison)
    texts = ["a", "poison", "b", "a", "poison", "c", "b", "a"]
    answer = rows(model, texts)
    assert model.calls[0] == ["a", "poison", "b", "c"]
    assert max(len(call) for call in model.calls) == 4
    np.testing.assert_array_equal(answer.vectors, [model.vector(text) for text in "abacba"])
    assert sorted(answer.rejects) == [1, 4]
    assert answer.num_duplicates == 4
    twice = rows(minilm(), ["one", "two", "one"])
    np.testing.assert_array_equal(twice.vectors[0], twice.vectors[2])
    assert twice.num_tokens == 6


# Megabytes


def test_a_text_of_4_mb_is_looked_at_piece_by_piece():
    """A tokenizer holds a hundred bytes and more for each character: it never sees more than a part of the text."""
    text = (" ".join(sample("conversations", 60)) * 200)[:4_000_000]
    words = fitter()
    seen, bounds = (Watched(one) for one in (words._tokenizer._fast, words._bounds._fast))
    words._tokenizer._fast, words._bounds._fast = seen, bounds
    fitted = words([text])
    assert max(seen.most, bounds.most) < 2_000_000
    assert bounds.total <= len(text)
    assert seen.total < 1.3 * len(text)
    assert len(fitted.pieces) > 4 * WINDOWS_AT_ONCE
    seen.total = 0
    words._tokenizer([text])
    assert seen.total < 10_000  # truncated: nothing but its beginning
    without_spaces = "漢字とかな交じり文" * 400_000  # more than 10 MB
    (lost,) = words._tokenizer([without_spaces]).lost
    assert seen.most < 2_000_000
    assert lost == pytest.approx(len(without_spaces), rel=0.01)  # a token a character


# A job


class Job:
    """A job with a row for each chunk, without Ray: survey, worker, ledger and verification."""

    def __init__(self, folder: Path) -> None:
        (folder / "in").mkdir()
        self.texts = ["short", MANY, None, "x", *TEXTS[1:3], MANY, " "]
        kind = pa.dictionary(pa.int32(), pa.string())
        columns = {"id": [f"id-{row}" for row in range(8)], "text": pa.array(self.texts).cast(kind), "year": range(8)}
        pq.write_table(pa.table(columns), folder / "in/a.parquet")
        self.out = folder / "out"
        self.config = load_config(
            source=str(folder / "in"), output=str(self.out), model=MINILM, id_column="id", keep=["text", "year"],
            long_texts="chunk-rows", chunk_overlap=30, shard_rows=4, backend="torch",
        )  # fmt: skip

    def run(self) -> None:
        asked = survey(self.config)
        asked.ledger.claim(asked.job)
        config, selection = self.config.of_model(), Selection.of(self.config)
        worker = EmbedWorker(Work(config, registry.identity(config), selection, "id", 0, logging.WARNING))
        shards = asked.standing.plan.pending
        items = [
            Item(shard, found.table, faults=found.faults)
            for shard, found in zip(shards, read_shards(shards, selection), strict=True)
        ]
        for item in (item for some in unpack(worker(pack(items))) for item in some):
            asked.ledger.publish(
                item.table, shard=item.shard, fingerprint=asked.job.fingerprint, rejects=item.rejects, usage=item.usage
            )


@pytest.fixture
def job(tmp_path: Path, engine_logger_as_it_was: None) -> Job:
    made = Job(tmp_path)
    made.run()
    return made


def test_a_job_with_a_row_for_each_chunk_is_whole_and_verified(job):
    """Columns, offsets, the kept text of each chunk, counts of rows and of vectors; every level of verification goes by them."""
    table = pads.dataset(job.out / "data").to_table()
    names = ["id", "text", "year", "embedding", "chunk_index", "chunk_start", "chunk_end", "_text_hash", "_source_row"]
    assert sorted(table.column_names) == sorted(names)
    assert table.column_names[-1] == SOURCE_ROW
    kinds = {name: table.schema.field(name).type for name in names[4:]}
    assert list(kinds.values()) == [pa.int32(), pa.int64(), pa.int64(), pa.binary(), pa.int64()]
    per_row: dict[int, int] = {}
    for row in (
        table.drop_columns(["embedding"]).sort_by([(SOURCE_ROW, "ascending"), ("chunk_index", "ascending")]).to_pylist()
    ):
        source = row[SOURCE_ROW]
        assert row[TEXT_HASH] == text_hashes([job.texts[source]])[0].as_py()
        assert (row["id"], row["year"]) == (f"id-{source}", source)
        assert row["text"] == job.texts[source][row["chunk_start"] : row["chunk_end"]]
        assert row["chunk_index"] == per_row.get(source, 0)
        per_row[source] = row["chunk_index"] + 1
    assert sorted(per_row) == [0, 1, 3, 4, 5, 6]
    assert per_row[0] == per_row[3] == 1 < per_row[1] == per_row[5] == per_row[6]
    status = engine.status(str(job.out))
    assert (status.num_rows, status.num_rejects, status.num_vectors) == (6, 2, table.num_rows)
    assert (status.num_long, status.num_lost_tokens, status.num_duplicates) == (4, 0, 2)
    assert f"4 long texts in {table.num_rows - 2} chunks" in status.lines()["texts"]
    for level in ("quick", "footers", "full", "sample"):
        verdict = engine.verify(job.out, level)
        assert verdict.ok, verdict.findings
        assert not verdict.warnings  # that ids repeat: those of chunks do not
    assert verdict.lowest_cosine == pytest.approx(1, abs=1e-4)


def test_a_part_of_chunks_that_was_changed_is_found(job):
    """A record that counts other vectors by the footers, a flipped bit by a full look."""
    part = max((job.out / "data").iterdir(), key=lambda path: path.stat().st_size)
    record = job.out / f"_engine/commits/{part.stem.removeprefix('part-')}.json"
    good = json.loads(record.read_text())
    good["usage"]["num_vectors"] -= 1
    before = record.read_bytes()
    record.write_text(json.dumps(good))
    assert engine.verify(job.out, "quick").ok
    assert "does not say what its commit record says" in engine.verify(job.out, "footers").findings[0].problem
    record.write_bytes(before)
    data = bytearray(part.read_bytes())
    data[400] ^= 1
    part.write_bytes(data)
    assert not engine.verify(job.out, "full").ok


def chunk_table(**changed: list[int]) -> pa.Table:
    columns = {
        "chunk_index": [0, 1, 2, 0],
        "chunk_start": [0, 5, 9, 0],
        "chunk_end": [6, 10, 12, 3],
        SOURCE_ROW: [0, 0, 0, 1],
    }
    columns |= changed
    kinds = {"chunk_index": pa.int32()}
    arrays = {name: pa.array(values, kinds.get(name, pa.int64())) for name, values in columns.items()}
    size = len(columns[SOURCE_ROW])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * size, np.float32)), 2)
    return pa.table({"id": columns[SOURCE_ROW], "embedding": vectors, TEXT_HASH: hashes_of(range(size)), **arrays})


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"chunk_index": [0, 1, 3, 0]}, "does not count the chunks of each row from 0"),
        ({"chunk_index": [1, 2, 3, 0]}, "does not count the chunks of each row from 0"),
        ({"chunk_index": [0, 1, 2, 3]}, "does not count the chunks of each row from 0"),
        ({"chunk_start": [0, 5, 4, 0]}, "not in the order of their text"),
        ({"chunk_end": [6, 5, 12, 3]}, "not in the order of their text"),
        ({SOURCE_ROW: [0, 0, 0, 2]}, "are not the rows of its shard"),
        ({SOURCE_ROW: [1, 1, 1, 0]}, "not in the order of the input"),
    ],
)
def test_a_part_whose_chunks_are_not_those_of_its_rows_is_never_committed(changed, problem):
    """The check before a commit, and after it."""
    shard = make_shard(2)
    check(chunk_table(), shard=shard, rejects=[], name="p", num_vectors=4)
    with pytest.raises(CorruptOutput, match=problem):
        check(chunk_table(**changed), shard=shard, rejects=[], name="p", num_vectors=4)
    with pytest.raises(CorruptOutput, match="it has 4 rows instead of 5"):
        check(chunk_table(), shard=shard, rejects=[], name="p", num_vectors=5)


# Options


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"chunk_overlap": 10}, "chunk_overlap: it is for --long-texts chunk and chunk-rows; leave it out"),
        ({"chunk_overlap": 0, "long_texts": "reject"}, "chunk_overlap: it is for --long-texts chunk and chunk-rows"),
        (
            {"model": "openai:text-embedding-3-small", "long_texts": "chunk-rows"},
            "long_texts: chunk-rows is for local models",
        ),
        ({"model": "openai:text-embedding-3-small", "chunk_overlap": 10}, "chunk_overlap: not for openai models"),
        ({"model": "custom:tests.models.HashModel", "long_texts": "chunk"}, "long_texts: not for custom models"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_loaded(options, problem):
    """One message says which, and what to do."""
    config = ModelConfig(**{"model": MINILM} | options)
    with pytest.raises(ConfigError, match=problem):
        registry.model_class(config).check_options(config)


def test_what_does_not_fit_the_model_or_the_output_is_refused(tmp_path):
    """An overlap of more than half a window; columns that chunks bring; a vector for each text where chunks have their own."""
    for overlap in (SIZE, SIZE // 2 + 1):
        with pytest.raises(ConfigError, match=f"hold 246 tokens, of which 0 to 123 can be shared, not {overlap}"):
            fitter(overlap=overlap)
    with pytest.raises(ConfigError, match="chunk_start"):
        load_config(source="in", output="out", keep=["chunk_start"], long_texts="chunk-rows")
    assert load_config(source="in", output="out", keep=["chunk_start"], long_texts="chunk").keep == ("chunk_start",)
    with pytest.raises(ConfigError, match="take chunk, or truncate"):
        engine.embed(["a"], model=MINILM, long_texts="chunk-rows")
    with pytest.raises(ConfigError, match="take chunk, or truncate"):
        asyncio.run(minilm(long_texts="chunk-rows").embed(["a"]))


def test_kura_which_needs_a_vector_for_each_text_is_refused_chunks(tmp_path):
    """And gets means of them."""
    pytest.importorskip("kura", reason="Kura is not installed: docs/kura.md says how")
    from engine.integrations.kura import EngineEmbeddingModel

    with_modules(save_transformer(tmp_path / "0", BERT, bert_tokenizer())).save(str(tmp_path / "bert"))
    name = f"sentence-transformers:{tmp_path / 'bert'}"
    with pytest.raises(ConfigError, match="take chunk, or truncate"):
        EngineEmbeddingModel(name, long_texts="chunk-rows", device="cpu", backend="torch")
    model = EngineEmbeddingModel(name, long_texts="chunk", device="cpu", backend="torch")
    assert np.shape(asyncio.run(model.embed([MANY, "a", MANY]))) == (3, 32)


def test_models_with_an_encode_of_their_own_go_by_their_tokenizer(tmp_path):
    """One without a limit takes every text whole; one that does more than its tokenizer says can only be truncated."""

    def made(model: SentenceTransformer) -> Fitter | None:
        encoder = local.encoder(
            model, local.chosen("cpu", "torch"), dtype="float32", prompt=None, max_rows=None, batch_tokens=None
        )
        return local.fitter(model, encoder, prompt=None, how="chunk", overlap=None)

    assert len(made(static(tmp_path / "s"))([MANY]).pieces) == 1
    fitted = made(own_forward(tmp_path / "f"))([MANY, "a"])
    assert len(fitted.pieces) > 2
    assert not fitted.tokens.lost.any()
    with pytest.raises(ConfigError, match="long_texts: chunk needs the model's tokenizer"):
        made(own_module(tmp_path / "m"))
