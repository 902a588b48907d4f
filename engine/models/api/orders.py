"""Orders: the texts of one call, on their way through requests that they share with others."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from engine.errors import ProviderError
from engine.models.api.long_texts import Pieces, averaged
from engine.models.api.tokens import weight
from engine.models.base import Embeddings, Vectors

LOOK_AHEAD = 8
"""Pieces that may be passed over for one that fits: a large one is never passed over for long."""


@dataclass(slots=True, eq=False)
class Piece:
    """A text, or a part of one that is too long, as it is sent."""

    order: Order
    text_number: int
    """Of its text, among the order's distinct ones."""
    part: int
    text: str
    num_tokens: int
    """Or a bound of them."""
    weight: int
    """In a request."""


@dataclass(slots=True, eq=False)
class Group:
    """What goes into one request, and what became of it before."""

    pieces: list[Piece]
    num_failures: int = 0
    """In a row, of any kind but a pause that the provider asked for."""
    num_blamed: int = 0
    """Failures in a row after which a plain sentence passed."""
    num_timeouts: int = 0
    failed_since: float | None = None

    @property
    def weight(self) -> int:
        """Of all pieces."""
        return sum(piece.weight for piece in self.pieces)

    def failed(self) -> None:
        """Count a failure."""
        self.num_failures += 1
        self.failed_since = self.failed_since or time.monotonic()

    def halves(self) -> tuple[Group, Group]:
        """Cut it in two, each of which has gone through the same."""
        middle = len(self.pieces) // 2
        return replace(self, pieces=self.pieces[:middle]), replace(self, pieces=self.pieces[middle:])


@dataclass(slots=True, eq=False)
class Order:
    """
    The distinct texts of one call, and what has come back of them.

    Args:
        numbers: For each text of the call, the number of its distinct text, shape (texts,).
        fitted: For each distinct text the pieces that are sent for it; None if it is rejected.
    """

    numbers: Sequence[int]
    fitted: list[Pieces | None]
    done: asyncio.Future[None]
    usage: Embeddings
    reasons: dict[int, str] = field(default_factory=dict)
    """Of distinct texts."""
    lost: dict[int, int] = field(default_factory=dict)
    """Of each distinct text that is not sent as it is, how many of its tokens are not sent; 0 where only the provider can count."""
    _vectors: Vectors | None = None
    _parts: dict[int, dict[int, tuple[Vectors, int]]] = field(default_factory=dict)
    """Of texts in several pieces: what came back so far, with its tokens."""
    _missing: int = 0

    def __post_init__(self) -> None:
        self._missing = len(self.fitted)

    @property
    def num_tokens(self) -> int:
        """Of all pieces, or a bound of them."""
        return sum(num_tokens for pieces in self.fitted for _, num_tokens in pieces or ())

    def pieces(self) -> list[Piece]:
        """Return what is to be sent; what is rejected is settled by it."""
        return [piece for number in range(len(self.fitted)) for piece in self.pieces_of(number)]

    def pieces_of(self, number: int) -> list[Piece]:
        """Return what is to be sent for one text."""
        found = self.fitted[number]
        return [self._piece(number, part, text, num_tokens) for part, (text, num_tokens) in enumerate(found or ())]

    def refit(self, piece: Piece, shorter: Pieces) -> list[Piece]:
        """Send others in place of a piece that was too long; return them."""
        pieces = list(self.fitted[piece.text_number] or ())
        pieces[piece.part] = shorter[0]
        first_new = len(pieces)
        pieces += shorter[1:]
        self.fitted[piece.text_number] = pieces
        self.lost.setdefault(piece.text_number, 0)
        parts = (piece.part, *range(first_new, len(pieces)))
        return [self._piece(piece.text_number, at, *pieces[at]) for at in parts]

    def settle(self, piece: Piece, vector: Vectors) -> None:
        """Take a piece's vector, shape (dimension,)."""
        if self.done.done() or piece.text_number in self.reasons:
            return
        number = piece.text_number
        num_pieces = len(self.fitted[number] or ())
        if num_pieces > 1:
            parts = self._parts.setdefault(number, {})
            parts[piece.part] = vector.copy(), piece.num_tokens
            if len(parts) < num_pieces:
                return
            vectors, weights = zip(*self._parts.pop(number).values(), strict=True)
            vector = averaged(vectors, weights)
        if self._vectors is None:
            self._vectors = np.empty((len(self.fitted), len(vector)), np.float32)
        self._vectors[number] = vector
        self._settled()

    def reject(self, number: int, reason: str) -> None:
        """Reject a text: each row that has it is rejected."""
        if self.done.done() or number in self.reasons:
            return
        self.reasons[number] = reason
        self._parts.pop(number, None)
        self._settled()

    def fail(self, error: ProviderError) -> None:
        """Give the order up, because of what is not its texts' fault."""
        if not self.done.done():
            self.done.set_exception(error)

    def answer(self) -> Embeddings:
        """Return the vectors and the rejects of the call's texts, once all are settled."""
        numbers = np.asarray(self.numbers, np.int64)
        rejects = {at: self.reasons[number] for at, number in enumerate(self.numbers) if number in self.reasons}
        if self._vectors is None:
            self._vectors = np.empty((0, 0), np.float32)
            numbers = numbers[:0]
        elif rejects:
            numbers = np.delete(numbers, list(rejects))
        is_plain = np.array_equal(numbers, np.arange(len(self._vectors)))
        self.usage.vectors = self._vectors if is_plain else self._vectors[numbers]
        self.usage.rejects = rejects
        is_lost = ((at, number) for at, number in enumerate(self.numbers) if number in self.lost and at not in rejects)
        self.usage.count_lost({at: self.lost[number] for at, number in is_lost})
        return self.usage

    def _piece(self, number: int, part: int, text: str, num_tokens: int) -> Piece:
        return Piece(self, number, part, text, num_tokens, weight(text, num_tokens))

    def _settled(self) -> None:
        self._missing -= 1
        if not self._missing:
            self.done.set_result(None)


def take(waiting: deque[Piece], *, max_inputs: int, max_weight: float, is_empty: bool = True) -> Group:
    """
    Take a full request from those that wait, in their order; the first of an empty request goes whatever it weighs.

    Where the next one does not fit, some of those behind it may, but they never keep it waiting for another request.
    """
    taken: list[Piece] = []
    passed: list[Piece] = []
    total = 0
    while waiting and len(taken) < max_inputs and len(passed) < LOOK_AHEAD:
        piece = waiting.popleft()
        if piece.order.done.done():
            continue  # it was given up
        if (taken or not is_empty) and total + piece.weight > max_weight:
            passed.append(piece)
            continue
        taken.append(piece)
        total += piece.weight
    waiting.extendleft(reversed(passed))
    return Group(taken)
