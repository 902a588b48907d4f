"""A model that costs nothing, so that a benchmark sees only what is around it."""

from __future__ import annotations

import asyncio

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


class SlowModel(ConstantModel):
    """
    The same, after a while: as a device would be waited for.

    Args:
        dimension: Of the vectors.
        ms_per_text: Milliseconds for each text.
    """

    def __init__(self, dimension: int = 8, ms_per_text: float = 1.0) -> None:
        super().__init__(dimension)
        self.ms_per_text = ms_per_text

    async def embed(self, texts: list[str]) -> Vectors:
        """Return ones: shape (len(texts), dimension)."""
        await asyncio.sleep(self.ms_per_text * len(texts) / 1000)
        return await super().embed(texts)
