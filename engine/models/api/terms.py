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

    def prepared(
        self, texts: Sequence[str], prompt: str, how: LongTexts
    ) -> tuple[list[int], dict[str, Pieces | None], dict[int, int]]:
        """
        Find the distinct texts, and what is sent for each.

        Args:
            texts: Neither empty nor blank.
            prompt: Put before each.
            how: What to do with those that are too long.

        Returns:
            For each text the number of its distinct text; for each of these the pieces that are sent, None if it is rejected; and of
            each that is not sent as it is, how many of its tokens are not sent, 0 if that is not known.
        """
        distinct = Distinct.of(texts)
        pieces: dict[str, Pieces | None] = {}
        lost: dict[int, int] = {}
        for number, text in enumerate(distinct.texts):
            num_tokens = self.counter.count(prompt + text)
            found = pieces[text] = self._fitted(prompt + text, num_tokens, how)
            if found and found[0][0] != prompt + text:
                is_known = how == "truncate" and self.counter.is_exact
                lost[number] = num_tokens - found[0][1] if is_known else 0
        return list(distinct.numbers), pieces, lost

    def _fitted(self, text: str, num_tokens: int, how: LongTexts) -> Pieces | None:
        if self.max_input_tokens is None or num_tokens <= self.max_input_tokens:
            return [(text, num_tokens)]
        return fitted(text, num_tokens, counter=self.counter, limit=self.max_input_tokens, how=how) or None
