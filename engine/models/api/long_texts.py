"""Long texts: what to do with those that have more tokens than the model takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.model_config import LongTexts
from engine.models.api.tokens import Counter

OVERLAP = 1 / 16
"""Of a chunk, that it shares with the one before: a sentence or two, so that what a cut goes through is whole in one of them."""
SHORTER = 0.7
"""To which a text is cut whose tokens cannot be counted here, when the server says that it is too long; in chunks, it is halved."""
SPARE = 1 / 20
"""Of what the server says to be taken: tokens are not spread evenly over a text, and some are the model's own."""
LENGTH_1 = 1e-2
"""By which a vector of length 1 may be off, in bfloat16 too."""

TOO_LONG = "longer than the {limit} tokens that the model takes"

Pieces = list[tuple[str, int]]
"""Texts that stand for one, each with its number of tokens."""


def fitted(text: str, num_tokens: int, *, counter: Counter, limit: int, how: LongTexts) -> Pieces | None:
    """
    Return what is sent for a text of `num_tokens`, of which the model takes `limit`; None if it is to be rejected.

    Chunks are of one size but for the last, and overlap, as in OpenAI's own recipe ("Embedding texts that are longer than the
    model's maximum context length", OpenAI Cookbook).
    """
    if num_tokens <= limit:
        return [(text, num_tokens)]
    if how == "reject":
        return None
    if how == "truncate":
        return counter.windows(text, limit, limit)[:1]
    return _with_text(counter.windows(text, limit, max(round(limit * (1 - OVERLAP)), 1)))


def shortened(text: str, *, counter: Counter, how: LongTexts, share: float | None = None) -> Pieces | None:
    """
    Return what is sent for a text of which the server says that it is too long; None if it is to be rejected.

    Args:
        text: That was refused.
        counter: Of tokens.
        how: What to do with it.
        share: Of its tokens, that the server takes, if it says so.
    """
    usual = SHORTER if how == "truncate" else (1 + OVERLAP) / 2
    size = max(int(len(text) * (usual if share is None else share * (1 - SPARE))), 1)
    if how == "reject" or size >= len(text):
        return None
    if how == "truncate":
        parts = [text[:size]]
    else:  # the last one ends with the text, and is as long as the others
        step = max(round(size * (1 - OVERLAP)), 1)
        starts = [*range(0, len(text) - size, step), len(text) - size]
        parts = [text[start : start + size] for start in starts]
    return _with_text([(part, counter.count(part)) for part in parts]) or None


def averaged(vectors: Sequence[npt.NDArray[np.float32]], weights: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the mean of pieces' vectors by their tokens, scaled to length 1 if they have that: shape (dimension,)."""
    mean = np.average(np.stack(vectors), axis=0, weights=weights)
    norm = np.linalg.norm(mean)
    has_length_1 = (np.abs(np.linalg.norm(vectors, axis=1) - 1) <= LENGTH_1).all()
    return (mean / norm if has_length_1 and norm > 0 else mean).astype(np.float32)


def _with_text(pieces: Pieces) -> Pieces:
    """Leave out what is blank: servers refuse it."""
    return [(text, num_tokens) for text, num_tokens in pieces if text and not text.isspace()]
