"""Answers: whatever a server makes of them, each text has its own vector or is rejected, and nothing else comes out."""

from __future__ import annotations

import asyncio
import base64
import json

import numpy as np
import orjson
import pytest

from engine.errors import ProviderError
from engine.models.api.answers import decoded
from engine.models.base import BadAnswer
from tests.api_servers import DIMENSION, EXACT, OWN, assert_right, numbered

pytest_plugins = ("tests.api_servers",)

TEXTS = numbered(40)
ODD = 17
"""The text that faults are aimed at."""
OF_A_REQUEST = ["short", "wrong_dimension", "one_wrong_dimension", "not_unit"]
OF_A_VECTOR = ["nan", "zero"]
NEEDS_TWO = ["duplicate_index"]
OF_THE_WIRE = ["html", "truncated"]
LASTING = OF_A_REQUEST + OF_A_VECTOR
EVERY = LASTING + NEEDS_TWO + OF_THE_WIRE


@pytest.fixture
def client(connect, hasty):
    """A client that has had an answer: it knows the dimension, and that vectors have length 1."""
    client = connect()
    client.rows(["something to begin with"])
    client.books.sent.clear()
    return client


# Order


@pytest.mark.parametrize("no_base64", [False, True], ids=["base64", "floats"])
def test_vectors_are_in_the_order_of_the_texts(server, client, no_base64):
    """In whatever order a server answers."""
    server.behave(faults=[{"kind": "shuffle", "times": -1}], no_base64=no_base64)
    answer = client.rows(TEXTS)
    assert_right(answer, TEXTS)
    assert (answer.rejects, client.books.sizes) == ({}, [40])


# Once


@pytest.mark.parametrize("kind", EVERY)
def test_an_answer_that_is_bad_once_is_asked_for_again(server, client, kind):
    """All texts come out, and come out right."""
    server.behave(faults=[{"kind": kind, "times": 1}])
    answer = client.rows(TEXTS)
    assert answer.rejects == {}
    assert_right(answer, TEXTS)
    assert len(client.books.sent) == 2
    assert answer.num_requests == 2


@pytest.mark.parametrize("kind", OF_A_VECTOR)
def test_only_a_vector_that_is_bad_is_asked_for_again(server, client, kind):
    """Its neighbours have been paid for."""
    server.behave(faults=[{"kind": kind, "times": 1}])
    client.rows(TEXTS)
    assert client.books.sizes == [40, 1]
    assert client.books.sent[1].texts == TEXTS[:1]


@pytest.mark.parametrize("kind", EVERY)
def test_cohere_s_answers_are_checked_too(server, cohere, hasty, kind):
    """Its vectors have no index: that is the one fault that it cannot have."""
    client = cohere()
    client.rows(["something to begin with"])
    server.behave(faults=[{"kind": kind, "times": 1}])
    answer = client.rows(TEXTS)
    assert answer.rejects == {}
    assert_right(answer, TEXTS)


# Always, for one text


@pytest.mark.parametrize("kind", LASTING + OF_THE_WIRE)
def test_a_text_that_brings_bad_answers_is_rejected_alone(server, client, kind):
    """All others are embedded, and the reason says what is wrong, without the text."""
    server.behave(faults=[{"kind": kind, "times": -1, "containing": TEXTS[ODD]}])
    answer = client.rows(TEXTS)
    assert list(answer.rejects) == [ODD]
    assert answer.rejects[ODD]
    assert TEXTS[ODD] not in answer.rejects[ODD]
    assert_right(answer, TEXTS)


@pytest.mark.parametrize("kind", NEEDS_TWO)
def test_a_fault_that_only_a_crowd_has_rejects_nobody(server, client, kind):
    """Alone the text passes."""
    server.behave(faults=[{"kind": kind, "times": -1, "containing": TEXTS[ODD]}])
    answer = client.rows(TEXTS)
    assert answer.rejects == {}
    assert_right(answer, TEXTS)


def test_two_texts_that_bring_bad_answers_are_both_found(server, client):
    """Wherever they stand, and the same text twice is rejected twice."""
    texts = [*TEXTS, TEXTS[ODD]]
    faults = [{"kind": "short", "times": -1, "containing": TEXTS[at]} for at in (ODD, 39)]
    server.behave(faults=faults)
    answer = client.rows(texts)
    assert sorted(answer.rejects) == [ODD, 39, 40]
    assert_right(answer, texts)


# Always, for all


@pytest.mark.parametrize("kind", LASTING)
def test_a_server_that_always_answers_badly_ends_the_run(server, client, kind):
    """No text is to blame: nothing is rejected, and nothing is half done."""
    server.behave(faults=[{"kind": kind, "times": -1}])
    with pytest.raises(ProviderError, match="fails on every text"):
        client.rows(TEXTS)


@pytest.mark.parametrize("kind", LASTING)
def test_one_text_is_not_blamed_for_a_server_that_always_answers_badly(server, client, kind):
    """Nor where it is the only one."""
    server.behave(faults=[{"kind": kind, "times": -1}])
    with pytest.raises(ProviderError, match="fails on every text"):
        client.rows(TEXTS[:1])


@pytest.mark.parametrize("kind", OF_THE_WIRE)
def test_a_server_that_answers_no_more_is_given_up_after_a_while(server, connect, hasty, kind):
    """What stands before it may answer in its place: that passes, or it does not."""
    client = connect(give_up_s=0.5)
    client.rows(["something to begin with"])
    server.behave(faults=[{"kind": kind, "times": -1}])
    with pytest.raises(ProviderError, match=r"answered nothing for 0\.5 s"):
        client.rows(TEXTS)


def test_a_web_page_in_place_of_a_server_is_waited_out(server, client):
    """Seven times, of which two are a sentence that is sent to see whether others pass."""
    server.behave(faults=[{"kind": "html", "times": 7}])
    answer = client.rows(TEXTS)
    assert answer.rejects == {}
    assert_right(answer, TEXTS)


def test_an_address_that_was_never_an_embeddings_server_ends_the_run_at_once(server, connect, hasty):
    """It is a slip in the settings, and no time mends it."""
    server.behave(faults=[{"kind": "html", "times": -1}])
    client = connect()
    with pytest.raises(ProviderError, match="fails on every text: bad answer, not an embeddings answer"):
        client.rows(TEXTS)
    assert client.books.sizes == [40, 40, 1]


# Dimensions


@pytest.mark.parametrize("no_base64", [False, True], ids=["base64", "floats"])
def test_the_dimensions_that_were_asked_for_come(server, connect, no_base64):
    """They are sent with every request."""
    server.behave(no_base64=no_base64)
    client = connect(dimensions=7)
    assert_right(client.rows(TEXTS), TEXTS, 7)


def test_the_dimension_that_cohere_was_asked_for_comes(cohere):
    """Under the name that Cohere has for it."""
    assert_right(cohere(dimensions=7).rows(TEXTS), TEXTS, 7)


def test_a_server_that_does_not_heed_the_dimensions_is_an_error(server, connect, hasty):
    """Whoever asks for 8 has no use for 7, and would find out after paying for all of them."""
    server.behave(faults=[{"kind": "wrong_dimension", "times": -1}])
    with pytest.raises(ProviderError, match="7 dimensions instead of 8"):
        connect(dimensions=8).rows(TEXTS)


def test_another_dimension_than_before_never_gets_into_an_output(server, client):
    """A server whose model was exchanged meanwhile."""
    server.behave(dimension=DIMENSION // 2)
    with pytest.raises(ProviderError, match=rf"{DIMENSION // 2} dimensions instead of {DIMENSION}"):
        client.rows(TEXTS)


def test_dimension_is_what_a_plain_sentence_has(client, connect):
    """Whether texts have been embedded before or not."""
    assert asyncio.run(client.model.dimension()) == DIMENSION
    fresh = connect()
    assert asyncio.run(fresh.model.dimension()) == DIMENSION
    assert fresh.books.sizes == [1]


# Forms


def test_a_server_that_does_not_know_base64_answers_in_floats(server, connect):
    """It ignores the wish."""
    server.behave(no_base64=True)
    assert_right(connect(OWN).rows(TEXTS), TEXTS)


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_base64_is_asked_for_floats(server, connect, status):
    """Once, and then for ever: the refusal is nobody's reject."""
    server.behave(faults=[{"kind": "status", "status": status, "message": "encoding_format base64 is not supported"}])
    client = connect(OWN)
    answer = client.rows(TEXTS)
    assert answer.rejects == {}
    assert_right(answer, TEXTS)
    assert_right(client.rows(numbered(3, "more")), numbered(3, "more"))
    assert server.stats()["statuses"] == {str(status): 1, "200": 2}


def test_base64_that_is_refused_of_several_requests_at_once_rejects_no_text(server, connect):
    """They were on their way before the first refusal told it, and each holds one text alone."""
    message = "encoding_format base64 is not supported"
    server.behave(
        latency_s=0.2, faults=[{"kind": "status", "status": 400, "message": message, "base64": True, "times": -1}]
    )
    texts = numbered(4)
    client = connect(OWN, model_batch_size=1, n_concurrent_jobs=4)
    answer = client.rows(texts)
    assert answer.rejects == {}
    assert_right(answer, texts)
    assert 1 < server.stats()["statuses"]["400"] <= 4


@pytest.mark.parametrize("kind", LASTING + NEEDS_TWO)
def test_the_tokens_of_a_bad_answer_are_counted(server, client, kind):
    """It is paid like a good one, and what is asked for again is paid again."""
    server.behave(faults=[{"kind": kind, "times": 1}])
    before = server.stats()["tokens_paid"]
    answer = client.rows(TEXTS)
    assert len(client.books.sent) == 2
    assert answer.num_tokens == server.stats()["tokens_paid"] - before


def test_tokens_are_those_that_the_server_says(server, connect):
    """They are what is paid."""
    answer = connect(EXACT).rows(TEXTS)
    assert answer.num_tokens == server.stats()["tokens_paid"] > 0


@pytest.mark.parametrize("name", [EXACT, OWN])
def test_an_answer_without_usage_is_as_good(server, connect, name):
    """Tokens are then those that were counted here, or the bound of them."""
    server.behave(no_usage=True)
    answer = connect(name).rows(TEXTS)
    assert_right(answer, TEXTS)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert answer.num_tokens == (server.stats()["tokens_paid"] if name == EXACT else num_bytes)


# Decoding


def body(vectors: list, indexes: list[int] | None = None, **more) -> bytes:
    """Write an answer."""
    at = range(len(vectors)) if indexes is None else indexes
    items = [{"index": index, "embedding": given} for index, given in zip(at, vectors, strict=True)]
    return orjson.dumps({"data": items, **more})


def in_base64(*numbers: float) -> str:
    return base64.b64encode(np.array(numbers, "<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (None, None),
        ({"prompt_tokens": 7, "total_tokens": 7}, 7),
        ({"total_tokens": 5}, 5),
        ({"input_tokens": 4}, 4),
        ({"prompt_tokens": 0, "total_tokens": 0}, None),
        ({"prompt_tokens": None}, None),
        ({"prompt_tokens": "7"}, None),
        ("seven", None),
    ],
)
def test_usage_is_read_in_its_several_forms(usage, tokens):
    """Null, absent or nonsense means that it is not known."""
    assert decoded(body([[1.0]], usage=usage), 1)[1] == tokens


def test_answers_without_indexes_are_in_order():
    """Some servers leave them out."""
    answer = orjson.dumps({"data": [{"embedding": [1.0, 0.0]}, {"embedding": [0.0, 1.0]}]})
    np.testing.assert_array_equal(decoded(answer, 2)[0], [[1, 0], [0, 1]])


def test_base64_and_floats_decode_to_the_same():
    """To float32, in an array of their own."""
    numbers = [0.1, -2.5, 3e-8]
    of_base64, _ = decoded(body([in_base64(*numbers)]), 1)
    of_floats, _ = decoded(body([numbers]), 1)
    np.testing.assert_array_equal(of_base64, of_floats)
    assert of_base64.dtype == of_floats.dtype == np.float32


def test_null_in_a_vector_is_a_number_that_is_not_finite():
    """JSON has no NaN: that one vector is bad, and its neighbours are not."""
    vectors, _ = decoded(body([[1.0, None], [1.0, 2.0]]), 2)
    assert np.isfinite(vectors).all(axis=1).tolist() == [False, True]


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b'{"data": null}',
        b'{"data": [null, null]}',
        b'{"data": [{"index": 0}, {"index": 1}]}',
        body([[1.0]]),
        body([[1.0], [1.0], [1.0]]),
        body([[1.0], [1.0]], [0, 0]),
        body([[1.0], [1.0]], [1, 2]),
        body([[1.0], [1.0]], [-1, 0]),
        body([[1.0], [1.0, 2.0]]),
        body([[], []]),
        body([1.0, 2.0]),
        body([["a"], ["b"]]),
        body([[[1.0]], [[1.0]]]),
        body([in_base64(1.0), in_base64(1.0, 2.0)]),
        body([in_base64(1.0), [1.0]]),
        body(["", ""]),
        body(["AAA", "AAA"]),
        body(["AAAA", "AAAA"]),
        body(["?", "?"]),
        json.dumps({"data": [{"index": "0", "embedding": [1.0]}, {"index": {}, "embedding": [1.0]}]}).encode(),
        json.dumps({"data": [{"index": None, "embedding": [1.0]}] * 2}).encode(),
        json.dumps({"data": [{"index": 2**70, "embedding": [1.0]}] * 2}).encode(),
        body([{"a": 1}, {"a": 1}]),
    ],
)
def test_what_is_not_one_vector_for_each_text_is_a_bad_answer(wrong):
    """And never another exception, which would look like a fault of the program."""
    with pytest.raises(BadAnswer):
        decoded(wrong, 2)
