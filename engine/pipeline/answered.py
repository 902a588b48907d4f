"""What there is of the texts of all shards that an actor embeds together, and each shard's share of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.models.embeddings import Embeddings
from engine.pipeline.part_rows import UNFIT, fitting
from engine.quantization import VectorFormat, quantize
from engine.stored_vectors import Found, StoredVectors

COUNTS = (
    "num_tokens", "num_padded_tokens", "num_requests", "num_refusals", "num_retries", "num_duplicates", "num_long",
    "num_lost_tokens",
)  # fmt: skip
"""Of an answer, that are divided among its shards."""


@dataclass(frozen=True)
class Answered:
    """The vectors of some texts, former ones and new ones, and why others have none."""

    texts: list[str]
    hashes: pa.Array
    former: Found
    answer: Embeddings
    """To the texts that had no vector yet."""
    failed: dict[int, str]
    """The reason for each text that has no vector now either."""
    stored: StoredVectors
    """Of the others."""
    kind: VectorFormat
    """How these are stored."""

    @classmethod
    def of(cls, texts: list[str], hashes: pa.Array, former: Found, answer: Embeddings, kind: VectorFormat) -> Self:
        """
        Put a model's answer between what was found in former parts, and reject what cannot be stored.

        Raises:
            ConfigError: If none of several vectors can be stored so.
        """
        failed = {int(former.missing[at]): why for at, why in answer.rejects.items()}
        stored = former.with_new(StoredVectors(quantize(answer.vectors, kind), answer.chunks), sorted(failed))
        fits = fitting(stored, kind)
        if not fits.all():
            good = np.delete(np.arange(len(texts)), sorted(failed))
            failed |= dict.fromkeys(good[~fits].tolist(), UNFIT.format(dtype=kind.dtype))
            stored = stored.taken(np.flatnonzero(fits))
        return cls(texts, hashes, former, answer, failed, stored, kind)

    @cached_property
    def is_good(self) -> npt.NDArray[np.bool_]:
        """Whether a text has a vector: shape (texts,)."""
        is_good = np.ones(len(self.texts), bool)
        is_good[list(self.failed)] = False
        return is_good

    @cached_property
    def places(self) -> npt.NDArray[np.int64]:
        """Of each text that has one, among those: shape (texts,)."""
        return np.cumsum(self.is_good) - 1

    def counts(self, span: slice) -> tuple[dict[str, int], float]:
        """Return a shard's share of each count of the answer, and its share of the texts that went through the model."""
        is_new = ~self.former.is_there
        first, stop, num_texts = (int(np.count_nonzero(is_new[:at])) for at in (span.start, span.stop, len(is_new)))
        before, after = first / max(num_texts, 1), stop / max(num_texts, 1)
        counts = {name: _share(getattr(self.answer, name), before, after) for name in COUNTS}
        if self.answer.lost:  # text by text
            lost = [num_tokens for at, num_tokens in self.answer.lost.items() if first <= at < stop]
            counts |= {"num_long": len(lost), "num_lost_tokens": sum(lost)}
        return counts, after - before


def _share(total: int, before: float, after: float) -> int:
    """Return a shard's part of a count of several: the parts add up exactly."""
    return round(total * after) - round(total * before)
