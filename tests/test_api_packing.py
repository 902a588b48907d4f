"""Packing: requests as full as a provider takes them, whoever's texts are in them, and no text twice."""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, InputRejected
from engine.models.api.orders import Order, Piece, take
from engine.models.api.tokens import ExactCounter, weight
from engine.models.base import Embeddings
from engine.models.openai import OpenAIEmbeddingModel
from tests.api_servers import DIMENSION, assert_right, numbered

pytest_plugins = ("tests.api_servers",)

MOST = 300_000
COUNTER = ExactCounter()


def weights(books) -> list[int]:
    """Weigh requests as OpenAI does."""
    return [sum(weight(text, COUNTER.count(text)) for text in sent.texts) for sent in books.sent]


# Full


def test_requests_are_full_of_texts(server, connect):
    """As many as OpenAI takes, and the last has the rest."""
    texts = numbered(5000)
    client = connect()
    answer = client.rows(texts)
    assert_right(answer, texts)
    assert sorted(client.books.sizes) == [904, 2048, 2048]
    assert answer.num_requests == 3


def test_a_batch_size_of_one_s_own_is_kept(server, connect):
    """Smaller than the provider's."""
    client = connect(model_batch_size=30)
    client.rows(numbered(100))
    assert sorted(client.books.sizes) == [10, 30, 30, 30]


@pytest.mark.parametrize("size", [0, -1, 2049])
def test_a_batch_size_that_the_provider_refuses_is_refused_first(key, size):
    """Before anything is sent."""
    with pytest.raises(ConfigError, match="1 to 2048 texts a request"):
        OpenAIEmbeddingModel(model_batch_size=size)


def many_bytes(number: int) -> str:
    """Few tokens for its bytes: a run of spaces is one, and the gate counts a quarter of the bytes."""
    return f"{number}" + " " * random.Random(number).randrange(2_000, 20_000) + "x"


def many_tokens(number: int) -> str:
    """Many tokens for its bytes: digits and signs in no order."""
    rng = random.Random(number)
    return f"{number}:" + "".join(rng.choices("~^|{}<>§", k=rng.randrange(500, 4000)))


@pytest.mark.parametrize("make", [many_bytes, many_tokens])
def test_requests_are_full_of_tokens_and_never_refused(server, connect, make):
    """By OpenAI's own arithmetic: the larger of the tokens and a quarter of the bytes of each text."""
    texts = [make(number) for number in range(800)]
    counted = [COUNTER.count(text) for text in texts]
    lighter = [num_tokens < len(text.encode()) / 4 for text, num_tokens in zip(texts, counted, strict=True)]
    assert all(lighter) if make is many_bytes else not any(lighter)
    client = connect()
    answer = client.rows(texts)
    assert answer.rejects == {}
    assert_right(answer, texts)
    assert client.books.errors == []
    full = sorted(weights(client.books))[1:]
    assert len(full) >= 2
    assert all(0.9 * MOST <= found <= MOST for found in full)


def test_large_and_small_texts_fill_requests_together(server, connect):
    """What does not fit is passed over for what does, and keeps its turn."""
    rng = random.Random(0)
    texts = [f"{number} " + "word " * int(rng.paretovariate(0.6) * 10 % 7000) for number in range(2000)]
    client = connect(model_batch_size=2048)
    assert_right(client.rows(texts), texts)
    assert client.books.errors == []
    full = sorted(weights(client.books))[1:]
    assert len(full) >= 2
    assert min(full) >= 0.9 * MOST


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=60), st.integers(1, 12), st.integers(20, 200))
def test_packing_leaves_nobody_behind(sizes, max_inputs, max_weight):
    """Whatever the weights: each piece goes once, within the limits, and never more than a few requests late."""
    loop = asyncio.new_event_loop()
    fitted = [[("x", size)] for size in sizes]
    order = Order(range(len(sizes)), fitted, loop.create_future(), Embeddings(np.empty((0, 0), np.float32)))
    pieces = [Piece(order, number, 0, "x", size, size) for number, size in enumerate(sizes)]
    waiting, groups = deque(pieces), []
    while waiting:
        first = waiting[0]
        groups.append(take(waiting, max_inputs=max_inputs, max_weight=max_weight).pieces)
        assert groups[-1][0] is first, "the one that came first goes first"
    loop.close()
    assert sorted(piece.text_number for group in groups for piece in group) == list(range(len(sizes)))
    assert all(len(group) <= max_inputs for group in groups)
    assert all(len(group) == 1 or sum(piece.weight for piece in group) <= max_weight for group in groups)


def test_a_request_is_an_even_share_of_a_minute_s_tokens(server, connect):
    """Where a full one would be half a minute's, all others would wait for it."""
    texts = [f"{number} " + "word " * 98 for number in range(300)]
    client = connect(tokens_per_minute=1_200_000)
    assert_right(client.rows(texts), texts)
    assert all(found <= 1_200_000 / 30 for found in weights(client.books))
    assert len(client.books.sent) == 1


# Together


def test_calls_at_once_share_requests(server, connect):
    """Twenty calls of a hundred texts are not twenty requests, and each gets its own vectors."""
    server.behave(latency_s=0.2)
    calls = [numbered(100, f"call {number}") for number in range(20)]
    client = connect(n_concurrent_jobs=1)
    answers = client.at_once(*calls)
    for answer, texts in zip(answers, calls, strict=True):
        assert_right(answer, texts)
    assert sum(client.books.sizes) == 2000
    assert len(client.books.sent) <= 4
    assert sum(answer.num_requests for answer in answers) == len(client.books.sent)
    assert sum(answer.num_tokens for answer in answers) == server.stats()["tokens_paid"]


def test_calls_from_several_loops_share_a_client(server, connect):
    """Each `asyncio.run` has a loop of its own; the client stays on one."""
    client = connect()
    for number in range(3):
        texts = numbered(5, f"call {number}")
        assert_right(client.rows(texts), texts)


def test_no_more_requests_than_wanted_are_on_their_way(server, connect):
    """That is what n_concurrent_jobs is."""
    server.behave(latency_s=0.1)
    connect(model_batch_size=1, n_concurrent_jobs=3).rows(numbered(15))
    assert server.stats()["concurrent_max"] == 3


# Once


def test_the_same_text_is_sent_once(server, connect):
    """However often it is asked for, it has its vector in every place."""
    texts = ["one", "two", "one", "three", "two", "one"]
    client = connect()
    answer = client.rows(texts)
    assert_right(answer, texts)
    assert server.texts(["one", "two", "three"]) == [1, 1, 1]
    assert (client.books.sizes, answer.num_duplicates) == ([3], 3)


def test_a_prompt_is_put_before_every_text(server, connect):
    """It decides the vectors."""
    texts = ["one", "two", "one"]
    answer = connect(prompt="passage: ").rows(texts)
    assert_right(answer, [f"passage: {text}" for text in texts])


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u3000"])
def test_a_blank_text_is_never_sent(server, connect, blank):
    """Servers refuse it, some of them only the empty one: whoever asks is told where it is."""
    client = connect()
    with pytest.raises(InputRejected, match=r"text 2 cannot be embedded: (empty|blank) text"):
        asyncio.run(client.model.embed(["one", "two", blank, "three"]))
    assert client.books.sent == []


def test_a_text_that_is_no_unicode_is_never_sent(server, connect):
    """No JSON can carry it."""
    client = connect()
    with pytest.raises(InputRejected, match="text 1 cannot be embedded: lone surrogate"):
        asyncio.run(client.model.embed(["one", "two \ud800"]))
    assert client.books.sent == []


def test_embed_returns_plain_lists(server, connect):
    """As whoever calls it without the engine expects; of nothing, nothing."""
    client = connect()
    vectors = asyncio.run(client.model.embed(["one", "two"]))
    assert [len(vector) for vector in vectors] == [DIMENSION] * 2
    assert isinstance(vectors[0][0], float)
    assert asyncio.run(client.model.embed([])) == []


@given(st.text(max_size=60), st.integers(0, 50))
def test_weight_is_never_below_tokens_or_bytes(text, num_tokens):
    """A quarter of the bytes, rounded up, or the tokens."""
    assert weight(text, num_tokens) == max(num_tokens, math.ceil(len(text.encode()) / 4))
