"""What an actor embedded lately: texts that come again in later shards get the vectors that they have."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.models.embeddings import Embeddings
from engine.models.recent import TEXT_BYTES, Recent
from engine.models.sentence_transformer import SentenceTransformerEmbeddingModel
from tests.test_models import ScriptedModel
from tests.tiny_models import PACKAGED, cosines, rows, sample

DIMENSION = 3
ROW_BYTES = 4 * DIMENSION + TEXT_BYTES
MINILM = f"sentence-transformers:{PACKAGED}"


class Teller:
    """Embeds short texts to what they say, and notes which it was asked for; `bad` ones it rejects, long ones lose tokens."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        self.asked.append(list(texts))
        lost = {at: len(text) for at, text in enumerate(texts) if text.startswith("long")}
        rejects = {at: f"not {text}" for at, text in enumerate(texts) if "bad" in text}
        good = [self.vector(text) for text in texts if "bad" not in text]
        return Embeddings(
            np.array(good, np.float32).reshape(-1, DIMENSION),
            rejects,
            num_tokens=len(texts),
            lost=lost,
            num_long=len(lost),
            num_lost_tokens=sum(lost.values()),
        )

    @staticmethod
    def vector(text: str) -> list[float]:
        return [float(len(text)), float(sum(text.encode())), 1.0]


def asked_of(recent: Recent, teller: Teller, texts: Sequence[str]) -> Embeddings:
    return asyncio.run(recent.embedded(texts, teller.embed))


def minilm(**options: object) -> SentenceTransformerEmbeddingModel:
    model = SentenceTransformerEmbeddingModel(PACKAGED, device="cpu", backend="torch", **options)  # type: ignore[arg-type]
    model.remember()
    return model


@given(
    st.lists(st.lists(st.sampled_from([f"{kind}{n}" for kind in ("", "long", "bad") for n in range(12)]), unique=True)),
    st.integers(0, 40),
)
def test_an_answer_is_what_it_would_be_without_a_memory(calls: list[list[str]], num_texts: int):
    """Vectors, their order, rejects and what long texts lose; whatever the memory has room for, and however often it is full."""
    recent, teller = Recent(ROW_BYTES * num_texts), Teller()
    for texts in calls:
        num_calls = len(teller.asked)
        answer, expected = asked_of(recent, teller, texts), asyncio.run(Teller().embed(texts))
        np.testing.assert_array_equal(answer.vectors.reshape(-1, DIMENSION), expected.vectors)
        assert (answer.rejects, answer.lost) == (expected.rejects, expected.lost)
        assert (answer.num_long, answer.num_lost_tokens) == (expected.num_long, expected.num_lost_tokens)
        assert answer.num_tokens + answer.num_duplicates == len(texts)
        new = [text for call in teller.asked[num_calls:] for text in call]
        assert [text for text in texts if text in new] == new  # in order, each once


def test_what_is_known_is_not_asked_again_and_what_was_rejected_is():
    recent, teller = Recent(), Teller()
    asked_of(recent, teller, ["a", "bad", "longer"])
    answer = asked_of(recent, teller, ["longer", "b", "bad", "a"])
    assert teller.asked == [["a", "bad", "longer"], ["b", "bad"]]
    assert (answer.num_duplicates, answer.rejects, answer.lost) == (2, {2: "not bad"}, {0: 6})
    assert asked_of(recent, teller, ["b", "a"]).num_duplicates == 2
    assert len(teller.asked) == 2


def test_the_latest_texts_stay_and_the_oldest_go():
    """Half of the memory is always of the latest; a text that comes again is among these."""
    recent, teller = Recent(ROW_BYTES * 20), Teller()  # two generations of ten
    for number in range(100):
        asked_of(recent, teller, [str(number), "again"])
        latest = [str(other) for other in range(max(number - 8, 0), number + 1)]
        assert asked_of(recent, teller, latest).num_duplicates == len(latest)
    assert sum("again" in texts for texts in teller.asked) == 1
    assert asked_of(recent, teller, ["0"]).num_duplicates == 0


@pytest.mark.parametrize("max_bytes", [0, 1, ROW_BYTES * 7, ROW_BYTES * 1000])
def test_memory_is_bounded_whatever_comes(max_bytes: int):
    recent, teller = Recent(max_bytes), Teller()
    for number in range(0, 5000, 50):
        asked_of(recent, teller, [str(text) for text in range(number, number + 50)])
    generations = [one for one in (recent._younger, recent._elder) if one is not None]
    assert sum(one.vectors.nbytes + TEXT_BYTES * len(one.places) for one in generations) <= max_bytes


def test_calls_at_once_give_each_text_its_own_vector():
    """Of several threads, with a memory that is full again and again, over texts that all of them have."""
    recent, teller = Recent(ROW_BYTES * 40), Teller()
    barrier = threading.Barrier(4)

    def embed(seed: int) -> None:
        chance = np.random.default_rng(seed)
        barrier.wait()
        for _ in range(200):
            texts = [str(text) for text in chance.choice(100, 12, replace=False)]
            np.testing.assert_array_equal(
                asked_of(recent, teller, texts).vectors, [teller.vector(text) for text in texts]
            )

    with ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(embed, range(4)))) == 4
    assert sum(map(len, teller.asked)) < 4 * 200 * 12


def test_a_local_model_computes_a_text_once_in_several_calls():
    """To the bit the vector that it had, in place, whatever else is in the call; long texts are counted each time."""
    model = minilm(long_texts="chunk")
    texts = [*sample("messages", 20), "word " * 400]
    first = rows(model, texts)
    again = rows(model, [texts[-1], "something new", *texts[::-1], texts[0]])
    np.testing.assert_array_equal(again.vectors[2:-1], first.vectors[::-1])
    np.testing.assert_array_equal(again.vectors[[0, -1]], first.vectors[[-1, 0]])
    assert cosines(again.vectors[1:2], rows(model, ["something new"]).vectors).min() == pytest.approx(1)
    assert again.num_tokens == 4  # [CLS] something new [SEP]
    assert again.num_duplicates == len(texts) + 2
    assert (first.num_long, again.num_long) == (1, 2)


def test_a_model_with_a_vector_for_each_chunk_and_models_of_others_remember_nothing():
    model = minilm(long_texts="chunk-rows")
    first, again = rows(model, ["word " * 400, "one"]), rows(model, ["word " * 400, "one"])
    assert (first.num_duplicates, again.num_duplicates) == (0, 0)
    assert again.num_tokens == first.num_tokens
    assert again.chunks is not None
    anything = ScriptedModel(lambda _texts, answer: answer)
    anything.remember()
    for _ in range(2):
        rows(anything, ["a", "b"])
    assert anything.calls == [["a", "b"], ["a", "b"]]
