"""Windows: what goes through a local model for texts that are longer than it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from engine.errors import ConfigError
from engine.model_config import LongTexts
from engine.models.api.long_texts import LENGTH_1, OVERLAP, TOO_LONG
from engine.models.base import PROBE, reason_of
from engine.models.embeddings import Chunks, Embeddings, Ints, Vectors
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
WINDOWS_AT_ONCE = 1024
"""That are tokenized together: what a tokenizer holds of them is a hundred times their token ids."""

Span = tuple[int, int]
"""Where a window begins and ends in its text, in characters."""
Piece = tuple[int, int, int]
"""A text's number, and the span of its window."""


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
    num_texts: int
    num_around: int
    """Tokens of a piece that are not its text's."""
    long: Sequence[int] = ()
    """Texts that are cut into windows."""
    rejects: dict[int, str] = field(default_factory=dict)
    """The reason for each text of which nothing is embedded."""

    def joined(self, answer: Embeddings, *, pooled: bool) -> Embeddings:
        """
        Return the answer to the pieces as one to the texts; a text of which a piece is rejected is rejected.

        Args:
            answer: To the pieces.
            pooled: Average the vectors of a text by their tokens; or keep each, and say which are whose.
        """
        if pooled and not self.long and not self.rejects:
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
        lost = dict.fromkeys(self.long, 0)
        for at, num_tokens in answer.lost.items():  # of a window that is too long and cannot be cut
            lost[int(self.numbers[at])] = lost.get(int(self.numbers[at]), 0) + num_tokens
        if pooled:
            vectors = _means(vectors, chunks, np.maximum(self.tokens.lengths[kept] - self.num_around, 1))
        joined = replace(answer, rejects=rejects, vectors=vectors, chunks=None if pooled else chunks)
        joined.count_lost(lost)
        return joined


def _means(vectors: Vectors, chunks: Chunks, weights: Ints) -> Vectors:
    """Return the mean of each text's vectors by their tokens; scaled to length 1, if its vectors have that."""
    is_cut = chunks.counts > 1
    means = vectors[chunks.firsts[:-1]]
    if not is_cut.any():
        return means
    rows = np.repeat(is_cut, chunks.counts)
    some, shares = vectors[rows], weights[rows]
    firsts = np.cumsum(chunks.counts[is_cut]) - chunks.counts[is_cut]
    found = np.add.reduceat(some * shares[:, None], firsts) / np.add.reduceat(shares, firsts)[:, None]
    has_length_1 = np.abs(np.linalg.norm(some, axis=1) - 1) <= LENGTH_1
    norms = np.linalg.norm(found, axis=1)
    is_scaled = np.logical_and.reduceat(has_length_1, firsts) & (norms > 0)
    means[is_cut] = found / np.where(is_scaled, norms, 1)[:, None]
    return means


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
            if failed and self._failure(PROBE):
                raise  # whatever the text
            good = np.array([at for at in range(len(texts)) if at not in failed], np.int64)
            fitted = self._fitted([texts[at] for at in good.tolist()])
            rejects = failed | {int(good[at]): reason for at, reason in fitted.rejects.items()}
            long = [int(good[at]) for at in fitted.long]
            return replace(fitted, numbers=good[fitted.numbers], rejects=rejects, long=long, num_texts=len(texts))

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
        fitted = Fitted(
            [texts[at] for at in short.tolist()] if long else texts,
            tokens.taken(short),
            short,
            np.zeros(len(short), np.int64),
            lengths[short],
            num_texts=len(texts),
            num_around=self._around,
        )
        if not long:
            return fitted
        if self._bounds is None:
            return replace(fitted, rejects=dict.fromkeys(long, TOO_LONG.format(limit=self._limit)))
        bounds = _bounds_of([texts[at] for at in long], self._bounds)
        planned = [
            (at, *span) for at, some in zip(long, bounds, strict=True) for span in self._windows(texts[at], some)
        ]
        found, of_found = self._that_fit(texts, planned)
        numbers, starts, stops = np.array(found, np.int64).T
        return replace(
            fitted,
            pieces=[*fitted.pieces, *(texts[at][start:stop] for at, start, stop in found)],
            tokens=fitted.tokens.followed_by(of_found),
            numbers=np.concatenate([fitted.numbers, numbers]),
            starts=np.concatenate([fitted.starts, starts]),
            stops=np.concatenate([fitted.stops, stops]),
            long=long,
        )

    def _that_fit(self, texts: Sequence[str], planned: Sequence[Piece]) -> tuple[list[Piece], Tokens]:
        """Return windows and their tokens, text by text and in order: halves of those that have too many tokens alone."""
        found: list[Piece] = []
        tokens = Tokens.of([])
        todo = list(planned)
        while todo:
            some, todo = todo[:WINDOWS_AT_ONCE], todo[WINDOWS_AT_ONCE:]
            of_some = self._tokenizer([texts[at][start:stop] for at, start, stop in some])
            is_fit = np.array([stop - start < 2 for _, start, stop in some]) | (of_some.lost == 0)
            found += [some[number] for number in np.flatnonzero(is_fit).tolist()]
            tokens = tokens.followed_by(of_some.taken(np.flatnonzero(is_fit)))
            for number in np.flatnonzero(~is_fit).tolist():
                at, start, stop = some[number]
                middle = (start + stop) // 2
                todo += [(at, *span) for span in ((start, middle), (middle, stop)) if not _is_blank(texts[at], span)]
        order = sorted(range(len(found)), key=found.__getitem__)
        return [found[number] for number in order], tokens.taken(np.array(order, np.int64))

    def _windows(self, text: str, bounds: Ints) -> list[Span]:
        """Return the windows of a text, in order; of what is blank there is none."""
        return [span for span in self._planned(text, bounds) if not _is_blank(text, span)] or [(0, len(text))]

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


def _is_blank(text: str, span: Span) -> bool:
    return text[slice(*span)].isspace()


def _bounds_of(texts: Sequence[str], bounds: Bounds) -> list[Ints]:
    """Return where the tokens of each text begin and end, shape (tokens, 2): found segment by segment, so that memory is bounded."""
    segments = [(number, *span) for number, text in enumerate(texts) for span in pairwise(_cuts(text))]
    found: list[list[Ints]] = [[] for _ in texts]
    for at in range(0, len(segments), SEGMENTS_AT_ONCE):
        some = segments[at : at + SEGMENTS_AT_ONCE]
        parts = bounds([texts[number][start:stop] for number, start, stop in some])
        for (number, start, _), part in zip(some, parts, strict=True):
            found[number].append(part[part[:, 1] > part[:, 0]] + start)
    return [np.concatenate(parts) for parts in found]


def _cuts(text: str) -> list[int]:
    """Return where the segments of a text begin and end: at spaces, where there are any."""
    cuts = [0]
    while cuts[-1] < len(text):
        stop = cuts[-1] + SEGMENT_CHARACTERS
        if stop < len(text):
            space = max(text.rfind(one, cuts[-1] + 1, stop) for one in SPACES)
            stop = space if space > 0 else stop
        cuts.append(min(stop, len(text)))
    return cuts
