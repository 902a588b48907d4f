"""Tokens of a text as a provider counts them: exactly where its vocabulary is known, from above where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import bpe_openai

CL100K = "cl100k_base"
MOST_CHARACTERS = 500_000
"""That are encoded in one go: bpe-openai refuses a million. A text of more is counted in pieces, to which the cuts add a token each."""
BYTES_PER_TOKEN = 4
"""By which OpenAI judges the size of a request before it counts (pgai, pull request 730)."""


class Counter(Protocol):
    """Counts tokens, and cuts texts by them."""

    is_exact: bool

    def count(self, text: str) -> int:
        """Return how many tokens a text has; at least that, if `is_exact` is not set."""

    def windows(self, text: str, size: int, step: int) -> list[tuple[str, int]]:
        """Return pieces of at most `size` tokens, one every `step` tokens, each with its number of tokens."""


class ExactCounter:
    """
    The tokens of a vocabulary of OpenAI's, counted by bpe-openai without a download.

    Args:
        vocabulary: Such as cl100k_base, which all of OpenAI's embedding models have.
    """

    is_exact = True

    def __init__(self, vocabulary: str = CL100K) -> None:
        self._encoding = _encoding(vocabulary)

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return sum(len(self._encoding.encode_ordinary(part)) for part in _parts(text))

    def windows(self, text: str, size: int, step: int) -> list[tuple[str, int]]:
        """Return pieces of at most `size` tokens, one every `step` tokens, each with its number of tokens."""
        found = []
        for part in _parts(text):
            tokens = self._encoding.encode_ordinary(part)
            starts = range(0, max(len(tokens) - (size - step), 1), step)
            found += [self._piece(tokens[start : start + size], size) for start in starts]
        return found

    def _piece(self, tokens: list[int], size: int) -> tuple[str, int]:
        """Return the text of tokens; characters that a cut goes through are left out, and so is what it makes too long."""
        while True:
            text = self._encoding.decode_bytes(tokens).decode("utf-8", "ignore")
            num_tokens = self.count(text)
            if num_tokens <= size:
                return text, num_tokens
            tokens = tokens[: len(tokens) - (num_tokens - size)]


class UpperBound:
    """For vocabularies that are not known: no token is shorter than a byte."""

    is_exact = False

    def count(self, text: str) -> int:
        """Return the bytes of a text in UTF-8."""
        return len(text) if text.isascii() else len(text.encode())

    def windows(self, text: str, size: int, step: int) -> list[tuple[str, int]]:
        """Return pieces of at most `size` characters, one every `step`, each with its bound."""
        pieces = [text[start : start + size] for start in range(0, max(len(text) - (size - step), 1), step)]
        return [(piece, self.count(piece)) for piece in pieces]


def weight(text: str, num_tokens: int) -> int:
    """Return what a text weighs in a request, by OpenAI's own arithmetic: its tokens, or a quarter of its bytes."""
    num_bytes = len(text) if text.isascii() else len(text.encode())
    return max(num_tokens, -(-num_bytes // BYTES_PER_TOKEN))


def _parts(text: str) -> Sequence[str]:
    if len(text) <= MOST_CHARACTERS:
        return (text,)
    return [text[start : start + MOST_CHARACTERS] for start in range(0, len(text), MOST_CHARACTERS)]


@lru_cache
def _encoding(vocabulary: str) -> bpe_openai.Encoding:
    import bpe_openai

    return bpe_openai.get_encoding(vocabulary)
