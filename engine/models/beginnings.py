"""Beginnings: as much of a long text as a model takes, cut off where its tokenizer sees no difference."""

from __future__ import annotations

import json
from typing import Any

SPLITS_AT_SPACES = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})
LEAVES_SPACES = frozenset(
    {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Strip", "StripAccents"}
)
"""Normalizers that neither take a space between two words away nor look past it."""
MOST_CHARACTERS = 1_000_000
"""Of a text without such spaces, as of Chinese: what stands behind so many has no part in the first tokens, and costs memory."""


def beginning(text: str, enough: int) -> str:
    """
    Return a text up to the first space that follows a letter or digit after `enough` characters.

    A tokenizer that splits at spaces makes the same tokens of it as of the text's beginning, so that of a text of a hundred
    thousand characters, of which the model takes 256 tokens, a hundredth is tokenized.
    """
    if len(text) <= enough:
        return text
    most = max(MOST_CHARACTERS, 2 * enough)
    at = text.find(" ", enough, most)
    while at > 0 and not text[at - 1].isalnum():  # which, unlike other signs, no normalizer makes a space of
        at = text.find(" ", at + 1, most)
    return text[:most] if at < 0 else text[:at]


def splits_at_spaces(fast: Any) -> bool:
    """Say whether no token can reach across a space."""
    if fast.pre_tokenizer is None or any(
        any(character.isspace() for character in token.content) for token in fast.get_added_tokens_decoder().values()
    ):
        return False
    if not all(
        step["type"] in LEAVES_SPACES
        or (step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"} and step["content"] in (" ", "▁"))
        for step in _steps(fast.normalizer, "normalizers")
    ):
        return False
    return any(
        step["type"] in SPLITS_AT_SPACES
        or (step["type"] == "ByteLevel" and step["use_regex"])
        or (step["type"] == "Metaspace" and step["split"])
        for step in _steps(fast.pre_tokenizer, "pretokenizers")[:1]  # later ones may find no spaces any more
    )


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """Return the settings of a normalizer or pre-tokenizer, one by one if it is several."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    steps: list[dict[str, Any]] = state[name] if state["type"] == "Sequence" else [state]
    return steps
