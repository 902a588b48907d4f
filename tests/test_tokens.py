"""Tokens: the ids that the model's own tokenizer makes, faster, and padded as the model wants them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from engine.models import model_files
from engine.models.tokens import CHARACTERS_PER_TOKEN, Tokenizer, Tokens
from tests.tiny_models import PACKAGED, Watched, sample

FOLDER = model_files.folder_of(PACKAGED)
LIMIT = 256
"""Tokens that MiniLM takes."""
ODD = [
    "漢字とかな交じり文、東京都",
    "Ünïcödé naïve cafe\u0301 — \uff46\uff55\uff4c\uff4c width ½ ﬁ ß İstanbul",
    "🙂🏽‍♀️ emoji 👩‍👩‍👧‍👦 and \u200b zero\u200dwidth \ufeff signs",
    "[CLS] [SEP] [MASK] [PAD] [UNK] are in [MASK][MASK] the text",
    "<s> </s> <|endoftext|> ##ing",
    "\u200b",
    "\u00ad\u200d",
    "  \t a\n\n ",
    "tab\tand\nnewline\r\nand\u00a0no-break\u2003em\u3000wide",
    "NUL \0 inside \x1f",
    "x" * 5000,
    "مرحبا بالعالم हिन्दी ไทย",
]


@cache
def watched(limit: int | None) -> tuple[Tokenizer, Watched]:
    fast = Watched(AutoTokenizer.from_pretrained(FOLDER).backend_tokenizer)
    return Tokenizer(fast, max_length=limit, prompt="", pad_id=0, pad_left=False, truncate_left=False), fast


def lists(tokens: Tokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens.ids, tokens.starts[1:-1])]


@cache
def reference() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


def theirs(texts: list[str], limit: int | None = LIMIT) -> list[list[int]]:
    return reference()(texts, truncation=limit is not None, max_length=limit)["input_ids"]


def of_minilm(limit: int = LIMIT, prompt: str | None = None) -> Tokenizer:
    model = SentenceTransformer(str(FOLDER), device="cpu")
    model.max_seq_length = limit
    tokenizer = Tokenizer.of(model, prompt)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    return of_minilm()


@pytest.fixture(scope="module")
def longest() -> list[str]:
    """Real conversations of 5,000 to 200,000 characters."""
    by_length = sorted(sample("conversations", 7000), key=len)
    texts = [*by_length[-400::40], by_length[-1], "\n".join(by_length[-3:])[:200_000]]
    assert len(texts[-1]) == 200_000
    return texts


# The ids


def test_ids_are_those_of_the_transformers_tokenizer(minilm, longest):
    """For messages, for conversations of up to 200,000 characters, and for what is odd."""
    texts = [*sample("messages", 512), *sample("conversations", 64), *longest, *ODD]
    tokens = minilm(texts)
    assert lists(tokens) == theirs(texts)
    assert tokens.ids.dtype == np.int32
    assert tokens.lengths.tolist() == [len(ids) for ids in theirs(texts)]


@pytest.mark.parametrize("limit", [3, 16, 512])
@pytest.mark.parametrize("prompt", ["", "query: "])
def test_prompt_and_limit_are_the_library_s(longest, limit, prompt):
    """The prompt stands before each text, and counts among its tokens."""
    texts = [*sample("messages", 64), *sample("conversations", 16), *longest[:3], *ODD]
    assert lists(of_minilm(limit, prompt)(texts)) == theirs([prompt + text for text in texts], limit)


def test_the_model_s_default_prompt_is_put_before_texts():
    """As `encode` does, if no prompt is asked for; an empty one is none."""
    model = SentenceTransformer(
        str(FOLDER), device="cpu", prompts={"query": "search for: "}, default_prompt_name="query"
    )
    default = Tokenizer.of(model, None)
    assert lists(default(["a sea"])) == theirs(["search for: a sea"])
    none = Tokenizer.of(model, "")
    assert lists(none(["a sea"])) == theirs(["a sea"])


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5), st.integers(3, 12))
def test_ids_of_any_text_are_the_library_s(texts, limit):
    """Whatever characters come, and wherever the tokens end."""
    tokenizer, _ = watched(limit)
    assert lists(tokenizer(texts)) == theirs(texts, limit)


words = st.sampled_from(
    ["a", "sea", "unbelievably", "  ", "\n", " ", "\u200b", "漢字", "[MASK]", "x" * 200, "don't", "\t "]
)


@given(st.lists(words, max_size=80).map(" ".join), st.integers(3, 20))
def test_ids_are_the_library_s_wherever_a_text_is_cut(text, limit):
    """Words long and short, spaces of all kinds, one and many: the cut falls on each of them."""
    tokenizer, _ = watched(limit)
    assert lists(tokenizer([text])) == theirs([text], limit)


def test_several_threads_make_the_same_ids(minilm):
    """While one shard is on the device, the next is tokenized."""
    texts = sample("conversations", 256)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: lists(minilm(texts)), range(8)))
    assert answers == [theirs(texts)] * 8


def test_no_texts_have_no_tokens(minilm):
    """A shard may have none."""
    tokens = minilm([])
    assert (len(tokens.ids), tokens.starts.tolist(), tokens.lengths.tolist()) == (0, [0], [])


# Long texts


def test_of_a_long_text_its_beginning_is_tokenized(longest):
    """The model takes 256 tokens of a conversation of 200,000 characters: a hundredth of it is read."""
    tokenizer, fast = watched(LIMIT)
    before = fast.total
    tokenizer(longest)
    assert fast.total - before <= len(longest) * (LIMIT * CHARACTERS_PER_TOKEN + 100) < sum(map(len, longest)) / 4


@pytest.mark.parametrize(
    "text",
    [
        ("a " + " " * 50) * 400,
        "a" + " " * 20_000 + "b c d",
        " ".join(["x" * 5000] * 20),
        " ".join(["pneumono" * 12] * 2000),
        "\n".join(["no space here"] * 3).replace(" ", "\t") * 3000,
        "漢字" * 10_000,
        "a " * 20_000 + " \n\t",
    ],
    ids=["many spaces", "one gap", "words of 5,000", "long words", "no space", "no space in script", "blank end"],
)
def test_a_beginning_that_is_too_short_is_not_taken_for_the_text(text):
    """Few tokens in many characters: then the whole text is tokenized, and the ids are the same."""
    for limit in (16, LIMIT):
        tokenizer, _ = watched(limit)
        assert lists(tokenizer([text, "short", text])) == theirs([text, "short", text], limit)


def test_without_a_limit_a_text_is_tokenized_to_its_end():
    """A model without positions takes it all."""
    text = "far away " * 5000
    tokenizer, _ = watched(None)
    assert lists(tokenizer([text])) == theirs([text], None)
    assert len(tokenizer([text]).ids) == 10_002


def test_a_tokenizer_that_cuts_at_the_beginning_sees_the_whole_text():
    """What it keeps is at the end."""
    text = "far away " * 5000 + "the end"
    model = SentenceTransformer(str(FOLDER), device="cpu", processor_kwargs={"truncation_side": "left"})
    expected = model.preprocess([text])["input_ids"].tolist()
    assert expected[0][-3:-1] == theirs(["the end"])[0][1:-1], "it does cut at the beginning"
    tokenizer = Tokenizer.of(model, None)
    assert lists(tokenizer([text])) == expected


# Padding

ROWS = st.lists(st.lists(st.integers(1, 30_000), max_size=20), min_size=1, max_size=12)


@given(ROWS, st.booleans(), st.data())
def test_rows_are_filled_up_on_the_side_that_the_model_wants(rows, pad_left, data):
    """As long as the longest of the batch; the mask is 1 for tokens alone."""
    positions = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=12))
    ids, mask = Tokens.of(rows).padded(np.array(positions), pad_id=7, pad_left=pad_left)
    longest = max(len(rows[at]) for at in positions)
    for filling, found in ((7, ids), (0, mask)):
        for row, at in zip(found.tolist(), positions, strict=True):
            own = rows[at] if found is ids else [1] * len(rows[at])
            more = [filling] * (longest - len(own))
            assert row == (more + own if pad_left else own + more)
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (len(positions), longest)


def test_padding_is_the_library_s(minilm):
    """What its tokenizer makes of a batch as a whole, on both sides."""
    texts = ["one", "one two three four", "one two"]
    for side in ("left", "right"):
        own = AutoTokenizer.from_pretrained(FOLDER, padding_side=side)(texts, padding=True)
        ids, mask = minilm(texts).padded(np.arange(3), pad_id=reference().pad_token_id, pad_left=side == "left")
        assert (ids.tolist(), mask.tolist()) == (own["input_ids"], own["attention_mask"])
