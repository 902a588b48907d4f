"""Duplicates: texts of one call that are the same go through a model once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from engine.models.base import Embeddings


@dataclass(frozen=True, slots=True)
class Distinct:
    """The distinct texts of a call, in the order in which they first come."""

    texts: Sequence[str]
    numbers: Sequence[int]
    """For each text of the call, the number of its distinct text."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Distinct:
        """Find them; texts of which no two are the same are left as they are."""
        found: dict[str, int] = {}
        numbers = [found.setdefault(text, len(found)) for text in texts]
        return cls(texts if len(found) == len(texts) else list(found), numbers)

    @property
    def num_duplicates(self) -> int:
        """Texts of the call that are the same as one before them."""
        return len(self.numbers) - len(self.texts)

    def spread(self, answer: Embeddings) -> Embeddings:
        """Return the answer to the distinct texts as one to all texts of the call: of each duplicate what its like has."""
        answer.num_duplicates += self.num_duplicates
        if not self.num_duplicates:
            return answer
        has_vector = np.ones(len(self.texts), bool)
        has_vector[list(answer.rejects)] = False
        rank = np.cumsum(has_vector) - 1  # of a distinct text among those that have vectors
        numbers = np.asarray(self.numbers, np.int64)
        if answer.lost:
            answer.count_lost(
                {at: answer.lost[number] for at, number in enumerate(self.numbers) if number in answer.lost}
            )
        kept = rank[numbers[has_vector[numbers]]]
        answer.rejects = {
            at: answer.rejects[number] for at, number in enumerate(self.numbers) if number in answer.rejects
        }
        if answer.chunks is None:
            answer.vectors = answer.vectors[kept]
        else:
            answer.chunks, rows = answer.chunks.taken(kept)
            answer.vectors = answer.vectors[rows]
        return answer
