"""Tokenizers of other families: a long text is either cut where no token ends otherwise, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Fast

from engine.models.tokens import Tokenizer
from tests.test_tokens import lists
from tests.tiny_models import (
    BERT,
    SPECIALS,
    VOCAB,
    Watched,
    bert_tokenizer,
    byte_pairs,
    sample,
    save_transformer,
    with_modules,
    word_pieces,
)

ENDS = processors.TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", [("<s>", 0), ("</s>", 2)])
LIMIT = 16


def gpt(**options: Any) -> Fast:
    fast = Fast.from_str(byte_pairs())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | options)
    return fast


def llama_3() -> Fast:
    """It splits by a pattern of its own, and leaves none to the bytes' step."""
    fast = Fast.from_str(byte_pairs())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return fast


@cache
def _unigram(*, split: bool) -> str:
    fast = Fast(models.Unigram())
    fast.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    trainer = trainers.UnigramTrainer(vocab_size=VOCAB, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    fast.train_from_iterator(sample("messages", 300), trainer)
    fast.post_processor = ENDS
    return str(fast.to_str())


def unigram(*steps: Any, split: bool = True) -> Fast:
    """As XLM-RoBERTa, T5 and DeBERTa have it."""
    fast = Fast.from_str(_unigram(split=split))
    if steps:
        fast.normalizer = normalizers.Sequence(list(steps))
    return fast


def xlm_r() -> Fast:
    fast = unigram(normalizers.NFKC())
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return fast


def llama_2() -> Fast:
    """Spaces are letters from the beginning, and nothing is split."""
    fast = unigram(normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"))
    fast.pre_tokenizer = None
    return fast


def whole_texts(splitting: Any = None) -> Fast:
    """Each text is one word."""
    vocab = {word: at for at, word in enumerate([*SPECIALS, "yes", "no", "yes no " * 100 + "yes"])}
    fast = Fast(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = splitting
    return fast


def words_alone() -> Fast:
    words = sorted({word for text in sample("messages", 300) for word in text.split()})
    fast = Fast(models.WordLevel({word: at for at, word in enumerate([*SPECIALS, *words])}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast


def with_added(token: AddedToken | str) -> Fast:
    fast = Fast.from_str(word_pieces())
    fast.add_tokens([token])
    return fast


def without_spaces() -> Fast:
    """What stands before the splitting takes spaces away, so that words grow together."""
    fast = Fast.from_str(word_pieces())
    fast.normalizer = normalizers.Replace(Regex(r" (?=\w)"), "")
    return fast


def spaces_as_letters() -> Fast:
    """A step that splits at spaces finds none: the step before it has made letters of them."""
    fast = unigram(split=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(split=False), pre_tokenizers.WhitespaceSplit()]
    )
    return fast


def odd_spaces() -> Fast:
    """As DeBERTa: characters that are no spaces become spaces, and two spaces one."""
    return unigram(normalizers.Strip(), normalizers.Nmt(), normalizers.Replace(Regex(" {2,}"), " "))


CUT = {
    "ByteLevel": gpt,
    "ByteLevel with a space before": lambda: gpt(add_prefix_space=True),
    "Metaspace": unigram,
    "WhitespaceSplit and Metaspace": xlm_r,
    "a normalizer that makes spaces": odd_spaces,
    "WordPiece": lambda: Fast.from_str(word_pieces()),
    "WordLevel": words_alone,
    "an added token that takes the spaces after it": lambda: with_added(AddedToken("sea", rstrip=True)),
    "an added token that takes the spaces before it": lambda: with_added(AddedToken("sea", lstrip=True)),
    "an added token that is a word": lambda: with_added(AddedToken("sea", single_word=True)),
}
WHOLE = {
    "an own pattern": llama_3,
    "ByteLevel without a pattern": lambda: gpt(use_regex=False),
    "Metaspace that does not split": lambda: unigram(split=False),
    "spaces that are letters": llama_2,
    "no splitting": whole_texts,
    "no step of splitting": lambda: whole_texts(pre_tokenizers.Sequence([])),
    "an added token with a space": lambda: with_added("of the sea"),
    "an added token with a line break": lambda: with_added("of\nthe sea"),
}
ODD = {
    "a normalizer that takes spaces away": without_spaces,
    "letters made of spaces before the splitting": spaces_as_letters,
}
FAMILIES: dict[str, Callable[[], Fast]] = CUT | WHOLE | ODD
SPACES = [" ", " ", " ", "  ", "\n", "\t", "\ufffd", "\u200b"]
WORDS = ["a", "sea", "of the sea", "the", "unbelievable", "x" * 120, ".", "don't", "12345", "漢字"]
SIGNS = ["é", "e\u0301", "\u0301", "🙂", "▁", "Ġ", "<s>", "[SEP]"]
PIECES = st.sampled_from([*SPACES, *WORDS, *SIGNS])


@cache
def both(family: str, limit: int) -> tuple[Tokenizer, Watched, Fast]:
    """Return a family's tokenizer as the engine calls it, what it calls, and the same by itself."""
    fast, own = Watched(FAMILIES[family]()), FAMILIES[family]()
    own.enable_truncation(limit)
    tokenizer = Tokenizer(fast, max_length=limit, prompt="", pad_id=1, pad_left=False, truncate_left=False)
    return tokenizer, fast, own


def check(family: str, texts: list[str], limit: int = LIMIT) -> None:
    tokenizer, _, own = both(family, limit)
    assert lists(tokenizer(texts)) == [encoding.ids for encoding in own.encode_batch(texts)]


@pytest.mark.parametrize("family", FAMILIES)
@given(text=st.lists(PIECES, min_size=20, max_size=120).map("".join), limit=st.integers(3, 24))
def test_ids_are_the_tokenizer_s_own_wherever_a_text_is_cut(family, text, limit):
    """Whatever it makes of spaces, and of what looks like them."""
    check(family, [text], limit)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_real_text_are_the_tokenizer_s_own(family):
    """Messages, and conversations that are longer than what is read of them."""
    check(family, [*sample("messages", 200), *sample("conversations", 100)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_that_reaches_across_spaces_is_found_wherever_it_stands(family):
    """It lies across every place where a text could be cut."""
    words = ["ǂ" * width + " " for width in range(1, 16)]  # unknown, so that they are one token, of any length
    texts = [word * number + "of the sea " * 30 for word in words for number in range(24)]
    check(family, [*texts, "yes no " * 100 + "yes"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_text_is_cut_only_where_the_tokenizer_splits_at_spaces(family):
    """Where it does not, a text is read to its end, since its last character may be part of a token at its beginning."""
    tokenizer, fast, _ = both(family, LIMIT)
    before = fast.total
    tokenizer(["far away " * 1000])
    read = fast.total - before
    assert read == 9000 if family in WHOLE else read < 9000 or family in ODD


def test_characters_that_become_spaces_do_not_end_a_beginning():
    """U+FFFD before a space is one space with it; cut there, it would be a token of its own."""
    texts = [("漢" * width + " ") * number + "\ufffd the end" for width in range(1, 16) for number in range(1, 24)]
    for limit in range(4, 16):
        check("a normalizer that makes spaces", texts, limit)


# Those that do more than their `tokenizers` part


def test_a_tokenizer_that_does_more_is_left_to_the_library(tmp_path, caplog):
    """Its ids are not those of its fast part: the model is not taken apart, and the log says why."""
    model = with_modules(save_transformer(tmp_path, BERT, bert_tokenizer()))
    own = type(model.tokenizer)

    class Shouting(own):
        def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._encode_plus([one.replace("fox", "sea") for one in text], *args, **kwargs)

    model.tokenizer.__class__ = Shouting
    assert Tokenizer.of(model, None) is None
    assert "the tokenizer of Shouting does more than it says; the model's own encode is used" in caplog.text


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_and_the_token_of_padding_are_the_model_s(tmp_path, side):
    """Decoders are padded on the left."""
    tokenizer = Tokenizer.of(
        with_modules(save_transformer(tmp_path, BERT, bert_tokenizer(padding_side=side, pad_token="[MASK]"))), None
    )
    assert (tokenizer.pad_left, tokenizer.pad_id) == (side == "left", 4)
