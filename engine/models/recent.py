"""Recent texts: what a model embedded lately, for texts that come again."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.models.embeddings import Embeddings
from engine.text_hashes import digests

if TYPE_CHECKING:
    from engine.models.embeddings import Ints, Vectors

MAX_BYTES = 128 * 1024**2
"""Of one model: 77,000 texts of 384 dimensions, 30,000 of 1,024."""
TEXT_BYTES = 200
"""Of a text beside its vector: its key, and its place in a table."""
SHORT = -1
"""Lost tokens of a text that the model takes as it is; of a long one it may lose none, if it is chunked."""


class _Known(NamedTuple):
    """Of some texts those that were embedded lately."""

    at: Ints
    """Where they are among the texts, ascending: shape (known,)."""
    vectors: Vectors
    lost: Ints


@dataclass(slots=True)
class _Generation:
    """As many texts as it has room for, each with its vector."""

    vectors: Vectors
    lost: Ints
    places: dict[bytes, int] = field(default_factory=dict)

    @classmethod
    def of(cls, num_texts: int, dimension: int) -> _Generation:
        """Make an empty one; its memory is taken as it fills."""
        return cls(np.empty((num_texts, dimension), np.float32), np.empty(num_texts, np.int64))

    def find(self, keys: Sequence[bytes], ats: Sequence[int]) -> _Known:
        """Look up those of the keys that are at `ats`."""
        found = [(at, self.places[keys[at]]) for at in ats if keys[at] in self.places]
        pairs = np.array(found, np.int64).reshape(-1, 2)
        return _Known(pairs[:, 0], self.vectors[pairs[:, 1]], self.lost[pairs[:, 1]])


class Recent:
    """
    The vectors of the latest texts, in bounded memory. Calls may overlap; a text that comes in two of them at once is embedded twice.

    There are two generations, as in Dominic Tarr's hashlru: new texts go into the younger, with those of the elder that came again; once it
    is full it is the elder, and what was in that is forgotten. Texts are known by their XXH3-128 digests, and are not kept.

    Args:
        max_bytes: Of both generations.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._younger: _Generation | None = None
        self._elder: _Generation | None = None
        self._lock = threading.Lock()

    async def embedded(
        self, texts: Sequence[str], embed: Callable[[Sequence[str]], Awaitable[Embeddings]]
    ) -> Embeddings:
        """
        Answer with the vectors of texts that are known, and have the others embedded.

        Args:
            texts: Of which no two are the same.
            embed: Embeds and checks; what it rejects is not kept, nor are vectors of chunks.
        """
        keys = digests(texts)
        known = self._find(keys)
        new = np.delete(np.arange(len(texts)), known.at)
        if len(new) or not len(texts):
            answer = await embed([texts[at] for at in new.tolist()] if len(known.at) else texts)
            self._keep_new([keys[at] for at in new.tolist()], answer)
        else:
            answer = Embeddings(np.empty((0, known.vectors.shape[1]), np.float32))
        return _joined(known, new, answer) if len(known.at) else answer

    def _find(self, keys: Sequence[bytes]) -> _Known:
        """Look texts up; those of the elder generation become members of the younger."""
        with self._lock:
            if self._younger is None:
                return _Known(np.empty(0, np.int64), np.empty((0, 0), np.float32), np.empty(0, np.int64))
            known = self._younger.find(keys, range(len(keys)))
            if self._elder is None:
                return known
            is_missing = np.ones(len(keys), bool)
            is_missing[known.at] = False
            again = self._elder.find(keys, np.flatnonzero(is_missing).tolist())
            self._keep([keys[at] for at in again.at.tolist()], again.vectors, again.lost)
        at = np.concatenate([known.at, again.at])
        vectors, lost = np.concatenate([known.vectors, again.vectors]), np.concatenate([known.lost, again.lost])
        order = np.argsort(at)
        return _Known(at[order], vectors[order], lost[order])

    def _keep_new(self, keys: Sequence[bytes], answer: Embeddings) -> None:
        if answer.chunks is not None or not len(answer.vectors):
            return
        lost = np.array([answer.lost.get(at, SHORT) for at in range(len(keys))], np.int64)
        good = [key for at, key in enumerate(keys) if at not in answer.rejects]
        with self._lock:
            self._keep(good, answer.vectors, np.delete(lost, sorted(answer.rejects)))

    def _keep(self, keys: Sequence[bytes], vectors: Vectors, lost: Ints) -> None:
        dimension = vectors.shape[1]
        room = self._max_bytes // 2 // (dimension * vectors.itemsize + TEXT_BYTES)
        start = 0
        while start < len(keys) and room:
            if self._younger is None or len(self._younger.places) == room:
                self._elder, self._younger = self._younger, _Generation.of(room, dimension)
            younger = self._younger
            place = len(younger.places)
            stop = min(start + room - place, len(keys))
            # Not what another call has brought meanwhile.
            fresh = [at for at in range(start, stop) if keys[at] not in younger.places]
            end = place + len(fresh)
            younger.vectors[place:end], younger.lost[place:end] = vectors[fresh], lost[fresh]
            younger.places.update(zip((keys[at] for at in fresh), range(place, end), strict=True))
            start = stop


def _joined(known: _Known, new: Ints, answer: Embeddings) -> Embeddings:
    """Return the answer to the new texts as one to all of them."""
    rejects = {int(new[at]): why for at, why in answer.rejects.items()}
    lost = {int(new[at]): num_tokens for at, num_tokens in answer.lost.items()}
    is_long = known.lost != SHORT
    lost |= dict(zip(known.at[is_long].tolist(), known.lost[is_long].tolist(), strict=True))
    order = np.argsort(np.concatenate([known.at, np.delete(new, sorted(answer.rejects))]))
    joined = replace(
        answer,
        vectors=np.concatenate([known.vectors, answer.vectors.reshape(-1, known.vectors.shape[1])])[order],
        rejects=rejects,
        num_duplicates=answer.num_duplicates + len(known.at),
    )
    joined.count_lost(lost)
    return joined
