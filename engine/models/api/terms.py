"""Terms: what a provider takes, and what a list of texts becomes under them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.model_config import LongTexts
from engine.models.api.long_texts import Pieces, fitted
from engine.models.api.tokens import Counter, UpperBound
from engine.models.duplicates import Distinct


@dataclass(frozen=True, slots=True)
class Terms:
    """What a provider takes of one of its models."""

    max_inputs: int = 2048
    """Texts in one request."""
    max_input_tokens: int | None = None
    """Tokens of one text; None if only the server knows."""
    max_request_tokens: float = math.inf
    """Tokens in one request, by `engine.models.api.tokens.weight`."""
    counter: Counter = field(default_factory=UpperBound)
    """Of the model's tokens."""

    def prepared(self, texts: Sequence[str], prompt: str, how: LongTexts) -> tuple[list[int], dict[str, Pieces | None]]:
        """
        Find the distinct texts, and what is sent for each.

        Args:
            texts: Neither empty nor blank.
            prompt: Put before each.
            how: What to do with those that are too long.

        Returns:
            For each text the number of its distinct text; and for each of these the pieces that are sent, None if it is rejected.
        """
        distinct = Distinct.of(texts)
        return list(distinct.numbers), {text: self._fitted(prompt + text, how) for text in distinct.texts}

    def _fitted(self, text: str, how: LongTexts) -> Pieces | None:
        num_tokens = self.counter.count(text)
        if self.max_input_tokens is None or num_tokens <= self.max_input_tokens:
            return [(text, num_tokens)]
        return fitted(text, num_tokens, counter=self.counter, limit=self.max_input_tokens, how=how) or None
