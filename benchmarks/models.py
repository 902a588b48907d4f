"""A model that costs nothing, so that a benchmark sees only what is around it."""

from __future__ import annotations

import numpy as np

from engine.models.base import BaseEmbeddingModel, Vectors


class ConstantModel(BaseEmbeddingModel):
    """
    The same vector for every text.

    Args:
        dimension: Of the vectors.
    """

    def __init__(self, dimension: int = 8) -> None:
        self.size = dimension

    def slug(self) -> str:
        """Name the dimension, the only thing that decides."""
        return f"constant-{self.size}"

    async def embed(self, texts: list[str]) -> Vectors:
        """Return ones: shape (len(texts), dimension)."""
        return np.ones((len(texts), self.size), np.float32)
