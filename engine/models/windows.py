"""Windows: what goes through a local model for texts that are longer than it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np

from engine.errors import ConfigError
from engine.model_config import LongTexts
from engine.models.api.long_texts import OVERLAP, TOO_LONG, averaged
from engine.models.base import Chunks, Embeddings, Ints, reason_of
from engine.models.tokens import Bounds, Tokenizer, Tokens

SPARE = 1 / 32
"""Of a window that stays empty: a piece may have a token or two more alone than it has within its text."""
MAX_OVERLAP = 1 / 2
"""Of a window: with more, most tokens would go through the model more than twice."""
WORD_TOKENS = 16
"""By which a window may begin earlier, so that it begins with a word; few words have more."""
SEGMENT_CHARACTERS = 16_384
SEGMENTS_AT_ONCE = 64
"""Of a long text, whose tokens are looked at: a million characters, however long the text is."""
SPACES = (" ", "\n")

Span = tuple[int, int]
"""Where a window begins and ends in its text, in characters."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What goes through a model for a list of texts: each that fits as it is, and the windows of the others."""

    pieces: Sequence[str]
    tokens: Tokens
    """Of the pieces."""
    numbers: Ints
    """For each piece the number of its text; the pieces of a text are in order."""
    starts: Ints
    stops: Ints
    """Of each piece in its text, in characters."""
    rejects: dict[int, str]
    """The reason for each text of which nothing is embedded."""
    num_texts: int
    num_long: int
    num_around: int
    """Tokens of a piece that are not its text's."""

    def joined(self, answer: Embeddings, *, pooled: bool) -> Embeddings:
        """
        Return the answer to the pieces as one to the texts; a text of which a piece is rejected is rejected.

        Args:
            answer: To the pieces.
            pooled: Average the vectors of a text by their tokens; or keep each, and say which are whose.
        """
        if pooled and not self.num_long and not self.rejects:
            return answer
        rejects = self.rejects | {
            int(self.numbers[at]): why for at, why in sorted(answer.rejects.items(), reverse=True)
        }
        has_vector = np.ones(len(self.pieces), bool)
        has_vector[list(answer.rejects)] = False
        of_good = ~np.isin(self.numbers, np.fromiter(rejects, np.int64, len(rejects)))
        kept = np.flatnonzero(of_good & has_vector)
        kept = kept[np.argsort(self.numbers[kept], kind="stable")]
        vectors = answer.vectors[(np.cumsum(has_vector) - 1)[kept]]
        counts = np.bincount(self.numbers[kept], minlength=self.num_texts)
        counts = counts[counts > 0]
        chunks = Chunks(counts, self.starts[kept], self.stops[kept])
        found = replace(answer, vectors=vectors, rejects=rejects, num_long=self.num_long)
        if not pooled:
            return replace(found, chunks=chunks)
        firsts = chunks.firsts
        if len(vectors) > len(counts):
            weights = np.maximum(self.tokens.lengths[kept] - self.num_around, 1)
            found.vectors = vectors[firsts[:-1]]
            for number in np.flatnonzero(counts > 1).tolist():
                part = slice(firsts[number], firsts[number + 1])
                found.vectors[number] = averaged(list(vectors[part]), weights[part].tolist())
        return found


class Fitter:
    """
    Finds what goes through a model for texts, if those that are too long are not to be truncated.

    Windows are cut at the model's own tokens, begin with a word where there is one, and overlap. Each is a text of its own, so that the
    model's prompt and its special tokens are put around it.

    Args:
        tokenizer: The model's.
        how: chunk, chunk-rows or reject.
        overlap: Tokens that a window shares with the one before, at least; by default a sixteenth of it.

    Raises:
        ConfigError: If windows would hold too little.
    """

    def __init__(self, tokenizer: Tokenizer, how: LongTexts, overlap: int | None) -> None:
        self._tokenizer = tokenizer
        self._how = how
        self._limit = tokenizer.max_length
        self._bounds: Bounds | None = None
        self._around = tokenizer.num_around
        if self._limit is None or how == "reject":
            return
        room = self._limit - self._around
        if room < 1:
            raise ConfigError(
                f"long_texts: of {self._limit} tokens that the model takes, the prompt and special tokens leave none for "
                "chunks: shorten --prompt, or allow more (--max-length)"
            )
        self._size = room - round(room * SPARE)
        most = int(self._size * MAX_OVERLAP)
        if overlap is not None and overlap > most:
            raise ConfigError(
                f"chunk_overlap: chunks of this model hold {self._size} tokens, of which 0 to {most} can be shared, "
                f"not {overlap}"
            )
        self._overlap = min(round(room * OVERLAP), most) if overlap is None else overlap
        self._bounds = tokenizer.bounds()

    def __call__(self, texts: Sequence[str]) -> Fitted:
        """Tokenize texts, and cut those that are too long; one that the tokenizer fails on is rejected."""
        try:
            return self._fitted(texts)
        except Exception:
            failed = {at: reason for at, text in enumerate(texts) if (reason := self._failure(text))}
            good = np.array([at for at in range(len(texts)) if at not in failed], np.int64)
            fitted = self._fitted([texts[at] for at in good.tolist()])
            rejects = failed | {int(good[at]): reason for at, reason in fitted.rejects.items()}
            return replace(fitted, numbers=good[fitted.numbers], rejects=rejects, num_texts=len(texts))

    def _failure(self, text: str) -> str | None:
        try:
            self._tokenizer([text])
        except Exception as error:
            return reason_of(error)
        return None

    def _fitted(self, texts: Sequence[str]) -> Fitted:
        tokens = self._tokenizer(texts)
        long = np.flatnonzero(tokens.lost).tolist()
        short = np.flatnonzero(tokens.lost == 0)
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        starts = np.zeros(len(short), np.int64)
        fitted = Fitted(
            [texts[at] for at in short.tolist()] if long else texts,
            tokens.taken(short),
            short,
            starts,
            lengths[short],
            {},
            len(texts),
            len(long),
            self._around,
        )
        if not long:
            return fitted
        if self._bounds is None:
            reason = TOO_LONG.format(limit=self._limit)
            return replace(fitted, rejects=dict.fromkeys(long, reason), num_long=0)
        spans = [(at, span) for at in long for span in self._spans(texts[at], self._bounds)]
        pieces = [texts[at][start:stop] for at, (start, stop) in spans]
        some = np.array([(at, *span) for at, span in spans], np.int64)
        return replace(
            fitted,
            pieces=[*fitted.pieces, *pieces],
            tokens=fitted.tokens.followed_by(self._tokenizer(pieces)),
            numbers=np.concatenate([short, some[:, 0]]),
            starts=np.concatenate([starts, some[:, 1]]),
            stops=np.concatenate([fitted.stops, some[:, 2]]),
        )

    def _spans(self, text: str, bounds: Bounds) -> list[Span]:
        """Return the windows of a text, in order; of what is blank there is none."""
        planned = [span for span in self._planned(text, _bounds_of(text, bounds)) if not text[slice(*span)].isspace()]
        return list(chain.from_iterable(self._that_fit(text, planned))) or [(0, len(text))]

    def _that_fit(self, text: str, spans: Sequence[Span]) -> Iterator[list[Span]]:
        """Yield for each window what fits of it: it alone, or its halves, if it has too many tokens alone."""
        lost = self._tokenizer([text[start:stop] for start, stop in spans]).lost
        for (start, stop), num_lost in zip(spans, lost, strict=True):
            middle = (start + stop) // 2
            halves = [(start, middle), (middle, stop)]
            if num_lost and start < middle:
                yield [*chain.from_iterable(self._that_fit(text, halves))]
            else:
                yield [(start, stop)]

    def _planned(self, text: str, bounds: Ints) -> list[Span]:
        """Return windows of so many tokens, one after another; the first begins with the text, and the last ends with it."""
        starts, stops = bounds[:, 0], bounds[:, 1]
        spans: list[Span] = []
        first = 0
        while True:
            last = first + self._size
            is_last = last >= len(bounds)
            span = (int(starts[first]) if spans else 0, len(text) if is_last else int(stops[last - 1]))
            if not spans or spans[-1] != span:  # as of the many tokens of one character
                spans.append(span)
            if is_last:
                return spans
            first = self._next(text, starts, first, last)

    def _next(self, text: str, starts: Ints, first: int, last: int) -> int:
        """Return the token with which the next window begins: that of a word, if there is one near."""
        at = max(last - self._overlap, first + 1)
        for token in range(at, max(at - WORD_TOKENS, first), -1):
            start = int(starts[token])
            if text[start].isspace() or text[start - 1].isspace():
                return token
        return at


def _bounds_of(text: str, bounds: Bounds) -> Ints:
    """Return where the tokens of a text begin and end, shape (tokens, 2): found piece by piece, so that memory is bounded."""
    cuts = [0]
    while cuts[-1] < len(text):
        stop = cuts[-1] + SEGMENT_CHARACTERS
        if stop < len(text):
            space = max(text.rfind(one, cuts[-1] + 1, stop) for one in SPACES)
            stop = space if space > 0 else stop
        cuts.append(min(stop, len(text)))
    found: list[Ints] = []
    for at in range(0, len(cuts) - 1, SEGMENTS_AT_ONCE):
        some = cuts[at : at + SEGMENTS_AT_ONCE + 1]
        parts = bounds([text[start:stop] for start, stop in pairwise(some)])
        found += [part + start for start, part in zip(some, parts, strict=False)]
    every = np.concatenate(found)
    return every[every[:, 1] > every[:, 0]]
