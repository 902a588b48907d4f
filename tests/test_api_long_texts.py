"""Long texts: cut, embedded in pieces or rejected, where tokens are counted here and where only the server can."""

from __future__ import annotations

import math
import random

import bpe_openai
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.models.api.long_texts import averaged, fitted, shortened
from engine.models.api.tokens import ExactCounter, UpperBound
from engine.models.base import PROBE
from tests.api_servers import DIMENSION, OWN, assert_right
from tests.strict_server import vector

pytest_plugins = ("tests.api_servers",)

LIMIT = 8192
OVERLAP = 512
ENCODING = bpe_openai.get_encoding("cl100k_base")
WORDS = "".join(f"{number} bottles of beer on the wall, " for number in range(3000))
EMOJI = "🧑‍🚀🦑🪐" * 3000
CJK = "".join(random.Random(0).choices("鑫龘靐齉爩麤灪龖厵滟爨", k=30_000))
SHORT = "a short one"


def tokens_of(text: str) -> list[int]:
    return list(ENCODING.encode_ordinary(text))


def text_of(tokens: list[int]) -> str:
    """Return the text of tokens, less the characters that a cut goes through."""
    return str(ENCODING.decode_bytes(tokens).decode("utf-8", "ignore"))


def cut(text: str) -> str:
    """Cut a text by hand at as many tokens as the model takes."""
    return text_of(tokens_of(text)[:LIMIT])


def mean(pieces: list[str], weights: list[int], dimension: int = DIMENSION) -> np.ndarray:
    """Compute the mean of the vectors of pieces by hand, of length 1."""
    total = sum(vector(piece, dimension).astype(float) * share for piece, share in zip(pieces, weights, strict=True))
    return total / np.linalg.norm(total)


# Truncated


@pytest.mark.parametrize("text", [WORDS, EMOJI, "x" + EMOJI, CJK, "x" + CJK], ids=["words", "🪐", "x🪐", "龘", "x龘"])
def test_a_text_is_cut_at_the_tokens_that_the_model_takes(server, connect, text):
    """A character that the cut goes through is left out whole."""
    by_hand = cut(text)
    assert LIMIT - 4 <= len(tokens_of(by_hand)) <= LIMIT < len(tokens_of(text))
    answer = connect().rows([SHORT, text])
    assert_right(answer, [SHORT, by_hand])
    assert (answer.num_long, answer.num_requests, answer.rejects) == (1, 1, {})


def test_one_of_the_cuts_goes_through_a_character():
    """Or the tests above would say nothing of it."""
    whole = [ENCODING.decode_bytes(tokens_of(text)[:LIMIT]) for text in (EMOJI, "x" + EMOJI, CJK, "x" + CJK)]
    assert any(b.decode("utf-8", "replace").endswith("\ufffd") for b in whole)


def test_a_text_of_just_as_many_tokens_is_not_cut(server, connect):
    """The limit is what the model takes."""
    text = cut(WORDS)
    assert len(tokens_of(text)) == LIMIT
    answer = connect(long_texts="reject").rows([text])
    assert_right(answer, [text])
    assert answer.num_long == 0


def test_the_prompt_is_part_of_what_is_cut(server, connect):
    """It stays, and the text's end goes."""
    answer = connect(prompt="passage: ").rows([WORDS])
    assert_right(answer, [cut("passage: " + WORDS)])


@pytest.mark.parametrize("text", ["word " * 600_000, "x" * 2_500_000], ids=["words", "one run of letters"])
def test_a_text_of_millions_of_characters_is_cut_too(server, connect, text):
    """The library that counts refuses a million, and vocabularies take some runs of letters badly."""
    answer = connect().rows([SHORT, text])
    assert_right(answer, [SHORT, cut(text[:500_000])])
    assert answer.rejects == {}


def test_rows_that_are_cut_and_tokens_that_are_lost_are_counted(server, connect):
    """Of each row, also where several have one text; nothing is lost in chunks, nor known where only the server counts."""
    texts = [SHORT, WORDS, CJK, WORDS]
    lost = {at: len(tokens_of(texts[at])) - len(tokens_of(cut(texts[at]))) for at in (1, 2, 3)}
    answer = connect().rows(texts)
    assert answer.lost == lost
    assert (answer.num_long, answer.num_lost_tokens) == (3, sum(lost.values()))
    assert connect(long_texts="chunk").rows(texts).lost == {1: 0, 2: 0, 3: 0}
    server.behave(compat="tei", max_input_tokens=60)
    assert connect(OWN).rows([SHORT, LONG, LONG]).lost == {1: 0, 2: 0}


# In chunks


@pytest.mark.parametrize("text", [WORDS, EMOJI, CJK], ids=["words", "🪐", "龘"])
def test_a_text_is_embedded_in_chunks_and_averaged_by_their_tokens(server, connect, text):
    """Each chunk begins with the end of the one before, and the mean has length 1."""
    tokens = tokens_of(text)
    starts = range(0, len(tokens) - OVERLAP, LIMIT - OVERLAP)
    pieces = [text_of(tokens[start : start + LIMIT]) for start in starts]
    assert len(pieces) >= 3
    answer = connect(long_texts="chunk").rows([SHORT, text])
    np.testing.assert_allclose(answer.vectors[1], mean(pieces, [len(tokens_of(piece)) for piece in pieces]), atol=1e-5)
    np.testing.assert_allclose(answer.vectors[0], vector(SHORT, DIMENSION), atol=1e-6)
    assert math.isclose(float(np.linalg.norm(answer.vectors[1])), 1.0, abs_tol=1e-5)
    assert answer.num_long == 1
    assert server.texts(pieces) == [1] * len(pieces)


def test_a_text_of_millions_of_characters_is_embedded_in_chunks_too(server, connect):
    """All of it, though it is no more than a few full requests."""
    text = "".join(f"{number} bottles, " for number in range(90_000))
    client = connect(long_texts="chunk")
    answer = client.rows([text])
    assert (answer.rejects, answer.num_long, len(answer.vectors)) == ({}, 1, 1)
    sent = [piece for request in client.books.sent for piece in request.texts]
    assert len(text) > 1_000_000
    assert sum(map(len, sent)) >= len(text)
    assert all(f"{number} bottles" in "".join(sent) for number in range(0, 90_000, 1000))


def test_a_chunk_that_is_refused_rejects_its_text_alone(server, connect):
    """A mean of the others would be the vector of another text."""
    fault = {"kind": "status", "status": 400, "times": -1, "containing": "2999 bottles", "message": "No."}
    server.behave(faults=[fault])
    texts = [SHORT, WORDS, "another"]
    answer = connect(long_texts="chunk").rows(texts)
    assert answer.rejects == {1: "the provider refuses it (HTTP 400): No."}
    np.testing.assert_allclose(answer.vectors, [vector(text, DIMENSION) for text in (SHORT, "another")], atol=1e-6)


# Rejected


def test_a_text_that_is_too_long_is_rejected_alone(server, connect):
    """It is never sent, nor paid."""
    client = connect(long_texts="reject")
    answer = client.rows([SHORT, WORDS, "another", WORDS])
    reason = "longer than the 8192 tokens that the model takes"
    assert answer.rejects == {1: reason, 3: reason}
    assert client.books.sent[0].texts == [SHORT, "another"]
    np.testing.assert_allclose(answer.vectors, [vector(text, DIMENSION) for text in (SHORT, "another")], atol=1e-6)


def test_nothing_is_sent_where_all_are_rejected(server, connect):
    """And the answer has no vector."""
    client = connect(long_texts="reject")
    answer = client.rows([WORDS])
    assert (len(answer.vectors), list(answer.rejects), client.books.sent) == (0, [0], [])


# Where only the server counts


def passed(client) -> list[str]:
    """Return what the server has taken of texts that were cut."""
    sent = [text for request in client.books.sent if not request.error for text in request.texts]
    return [text for text in sent if text not in (*TEXTS, PROBE)]


@pytest.fixture(params=[413, 422])
def short_sighted(server, request):
    """A server that takes 60 tokens, as TEI says it, or with the status that other versions have."""
    server.behave(compat="tei", max_input_tokens=60, too_long_status=request.param)
    return server


LONG = " ".join(f"word{number}" for number in range(100))
TEXTS = [SHORT, LONG, "another", *(f"text {number}" for number in range(30))]


def test_a_text_that_the_server_finds_too_long_is_cut_until_it_does_not(short_sighted, connect):
    """By a share each time; its neighbours are embedded as they are."""
    client = connect(OWN, long_texts="truncate")
    answer = client.rows(TEXTS)
    (cut_short,) = passed(client)
    assert LONG.startswith(cut_short)
    assert 30 <= len(tokens_of(cut_short)) <= 60
    assert_right(answer, [SHORT, cut_short, *TEXTS[2:]])
    assert (answer.num_long, answer.rejects) == (1, {})


def test_a_text_that_the_server_finds_too_long_is_embedded_in_pieces(short_sighted, connect):
    """They overlap, all of the text is in one of them, and little of it is paid for twice."""
    client = connect(OWN, long_texts="chunk")
    answer = client.rows(TEXTS)
    pieces = passed(client)
    assert len(pieces) >= 4
    assert all(any(f"word{number}" in piece for piece in pieces) for number in range(100))
    assert sum(map(len, pieces)) <= 1.5 * len(LONG)
    expected = mean(pieces, [len(piece.encode()) for piece in pieces])
    np.testing.assert_allclose(answer.vectors[1], expected, atol=1e-5)
    assert (answer.num_long, answer.rejects) == (1, {})
    np.testing.assert_allclose(answer.vectors[2], vector("another", DIMENSION), atol=1e-6)


@pytest.mark.parametrize("how", ["truncate", "chunk"])
def test_a_text_is_cut_at_once_to_what_the_server_says_that_it_takes(short_sighted, connect, how):
    """It says how many tokens the text has, too: nobody has to try shorter and shorter ones."""
    client = connect(OWN, long_texts=how)
    text = "so many words " * 200
    answer = client.rows([text])
    assert answer.rejects == {}
    assert client.books.errors == ["InputTooLong"]
    assert all(40 <= len(tokens_of(piece)) <= 60 for piece in passed(client))


def test_texts_that_are_too_long_are_found_together(short_sighted, connect):
    """Many among many: the others pass in a few requests, and not in twos and threes."""
    client = connect(OWN)
    texts = [f"{number} " + "word " * (100 if number % 8 == 0 else 10) for number in range(128)]
    answer = client.rows(texts)
    assert (answer.num_long, answer.rejects) == (16, {})
    shorts = [sent for sent in client.books.sent if not sent.error and any(len(text) < 100 for text in sent.texts)]
    assert len(shorts) <= 4


def test_a_text_that_the_server_finds_too_long_is_rejected(short_sighted, connect):
    """In the server's words, alone."""
    answer = connect(OWN, long_texts="reject").rows(TEXTS)
    assert list(answer.rejects) == [1]
    assert "must have less than 60 tokens" in answer.rejects[1]
    assert_right(answer, TEXTS)


def test_a_text_that_no_cut_makes_short_enough_is_rejected(server, connect):
    """A server that finds one character too long has something against the text."""
    fault = {"kind": "status", "status": 413, "times": -1, "containing": "§", "message": "too long"}
    server.behave(faults=[fault])
    answer = connect(OWN).rows([SHORT, "§" + "x" * 50])
    assert list(answer.rejects) == [1]
    assert_right(answer, [SHORT, ""])


# Cutting


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=400), st.integers(4, 30))
def test_no_piece_has_more_tokens_than_the_limit(text, limit):
    """Whatever the text: what a cut leaves may be read as other tokens than it was."""
    counter = ExactCounter()
    for how in ("truncate", "chunk"):
        pieces = fitted(text, counter.count(text), counter=counter, limit=limit, how=how)
        for piece, num_tokens in pieces or ():
            assert num_tokens == counter.count(piece) <= limit
            assert piece in text


@pytest.mark.parametrize("counter", [ExactCounter(), UpperBound()])
def test_chunks_cover_the_text(counter):
    """From its beginning to its end."""
    text = WORDS[:4000]
    pieces = [piece for piece, _ in fitted(text, 10**6, counter=counter, limit=100, how="chunk")]
    at = 0
    for piece in pieces:
        found = text.find(piece, max(at - 60, 0))
        assert 0 <= found <= at
        at = found + len(piece)
    assert at == len(text)


@pytest.mark.parametrize("how", ["truncate", "chunk"])
def test_shortening_ends(how):
    """Each time there is less, down to a text that no longer becomes shorter."""
    text, steps = "word " * 200, 0
    while pieces := shortened(text, counter=UpperBound(), how=how):
        assert all(len(piece) < len(text) for piece, _ in pieces)
        text, steps = pieces[0][0], steps + 1
    assert steps >= 8
    assert len(text) <= 2


def test_blank_pieces_are_left_out():
    """Servers refuse them."""
    assert shortened("x" + " " * 100, counter=UpperBound(), how="chunk") == [("x" + " " * 52, 53)]


def test_the_mean_is_as_long_as_the_vectors_are():
    """Of a model whose vectors have length 1 it has that; of another it would lie apart from those of whole texts."""
    one, two = np.eye(2, dtype=np.float32)
    assert averaged([one, two], [1, 1]).tolist() == pytest.approx([0.5**0.5] * 2)
    assert averaged([8 * one, 8 * two], [1, 3]).tolist() == [2, 6]
    assert averaged([one, 8 * two], [1, 1]).tolist() == [0.5, 4]


def test_the_mean_of_opposite_vectors_is_not_a_number_s_end():
    """Their mean is zero, which the answer's check finds, and no division by it."""
    zero = averaged([np.array([1, 0], np.float32), np.array([-1, 0], np.float32)], [5, 5])
    assert zero.tolist() == [0, 0]
