"""Stored vectors: of a list of texts, as a part has them: one for each text, or one for each of its chunks. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.models.embeddings import Chunks, Ints
from engine.quantization import Stored


@dataclass(frozen=True, slots=True)
class StoredVectors:
    """The vectors of texts, in the order of the texts."""

    rows: Stored
    """Shape (texts, numbers of a vector); with `chunks`, shape (chunks, numbers of a vector)."""
    chunks: Chunks | None = None
    """Where each chunk of a text has a vector."""

    @classmethod
    def joined(cls, several: Sequence[StoredVectors]) -> StoredVectors:
        """Return those of several lists of texts, of which either all or none have chunks, as those of one."""
        chunks = [one.chunks for one in several if one.chunks is not None]
        return cls(np.concatenate([one.rows for one in several]), Chunks.joined(chunks) if chunks else None)

    def taken(self, texts: Ints) -> StoredVectors:
        """Return those of some texts, by their numbers."""
        if self.chunks is None:
            return StoredVectors(self.rows[texts])
        chunks, of_vectors = self.chunks.taken(texts)
        return StoredVectors(self.rows[of_vectors], chunks)


@dataclass(frozen=True, slots=True)
class Found:
    """Which of some texts have vectors already."""

    is_there: npt.NDArray[np.bool_]
    """Shape (texts,)."""
    stored: StoredVectors
    """Of the texts that have some."""

    @classmethod
    def nothing(cls, num_texts: int) -> Found:
        """Return what there is where nothing can be reused."""
        return cls(np.zeros(num_texts, bool), StoredVectors(np.empty((0, 0))))

    @property
    def num_texts(self) -> int:
        """How many texts have some."""
        return int(np.count_nonzero(self.is_there))

    @property
    def missing(self) -> Ints:
        """The positions of the others."""
        return np.flatnonzero(~self.is_there)

    def with_new(self, new: StoredVectors, failed: list[int]) -> StoredVectors:
        """
        Put new vectors between the former ones, in the order of the texts.

        Args:
            new: Of the texts that had none.
            failed: Positions of the texts that are rejected, and have none now either.
        """
        if not self.is_there.any():
            return new
        is_former = np.delete(self.is_there, failed)
        places = np.argsort(np.concatenate([np.flatnonzero(is_former), np.flatnonzero(~is_former)]))
        return StoredVectors.joined([self.stored, new]).taken(places)
