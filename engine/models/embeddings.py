"""Embeddings: a model's answer to a list of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

ONE_VECTOR = "long_texts: chunk-rows gives a text a vector for each of its chunks, and here each text has one: take chunk, or truncate"
"""Said where no more than one vector for a text can be returned."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Which vectors are whose, where a text has a vector for each of its chunks."""

    counts: Ints
    """Of vectors, for each text that is no reject: shape (texts less rejects,)."""
    starts: Ints
    stops: Ints
    """Of each vector's chunk, in characters of its text: shape (vectors,)."""

    @classmethod
    def joined(cls, several: Sequence[Chunks]) -> Chunks:
        """Return the chunks of several lists of texts as those of one."""
        return cls(*(np.concatenate([getattr(one, name) for one in several]) for name in ("counts", "starts", "stops")))

    @classmethod
    def none(cls) -> Chunks:
        """Return the chunks of no text."""
        return cls(*(np.empty(0, np.int64) for _ in range(3)))

    @property
    def firsts(self) -> Ints:
        """Where each text's vectors begin, and where the last one's end: shape (texts less rejects + 1,)."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def indices(self) -> Ints:
        """The number of each vector's chunk in its text, from 0: shape (vectors,)."""
        return np.arange(len(self.starts)) - np.repeat(self.firsts[:-1], self.counts)

    def taken(self, texts: Ints) -> tuple[Chunks, Ints]:
        """Return the chunks of some texts, by their numbers, and which vectors are theirs."""
        counts = self.counts[texts]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.repeat(self.firsts[texts], counts) + within
        return Chunks(counts, self.starts[rows], self.stops[rows]), rows


@dataclass(slots=True)
class Embeddings:
    """The answer to a list of texts."""

    vectors: Vectors
    """Shape (texts less rejects, dimension), float32, in the order of the texts; with `chunks`, shape (chunks, dimension)."""
    rejects: dict[int, str] = field(default_factory=dict)
    """The reason for each position among the texts that has no vector."""
    num_tokens: int = 0
    """Tokens that went through the model, as the model counts them; 0 if it does not."""
    num_padded_tokens: int = 0
    """The same with padding: what its device computed."""
    held_s: float = 0.0
    """Seconds for which the device was these texts': from the end of the ones before; 0 if the model does not say."""
    busy_s: float = 0.0
    """Of these, the seconds in which the device computed."""
    num_requests: int = 0
    """That were sent to a provider."""
    num_refusals: int = 0
    """Of them, those to which the provider asked to wait."""
    num_retries: int = 0
    """Of them, those that had failed before."""
    num_duplicates: int = 0
    """Texts that did not go through the model, since others are the same."""
    num_long: int = 0
    """Texts that were cut, or embedded in chunks, since they are longer than the model takes."""
    num_lost_tokens: int = 0
    """Of texts that were cut: tokens that are not in their vectors; of very long texts an estimate."""
    lost: dict[int, int] = field(default_factory=dict)
    """Of each long text how many of its tokens are not in its vector, where that is known text by text: both counts above in detail."""
    chunks: Chunks | None = None
    """Of a model that gives each chunk of a text a vector of its own."""

    def count_lost(self, lost: dict[int, int]) -> None:
        """Take down how many tokens of each long text are not in its vector, and both counts of them."""
        self.lost, self.num_long, self.num_lost_tokens = lost, len(lost), sum(lost.values())
