"""Backends for tests that do as they are told: slow, failing, small. They are real backends, of the one interface."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from engine.models.backends.base import Backend, Batch
from engine.models.base import Vectors
from engine.models.tokens import Tokens

PATIENCE_S = 20
"""After which a test that waits for something has failed."""


class Scripted(Backend):
    """
    Gives each text the sum of its token ids as a vector, and keeps the books on who was on the device with whom.

    Args:
        act: Called with each batch, in its stream; what it raises the backend raises.
        num_streams: Batches at a time.
    """

    name = "scripted"
    device = "cpu"

    def __init__(self, act: Callable[[Batch], None] | None = None, num_streams: int = 2) -> None:
        self.act = act
        self.num_streams = num_streams
        self.began: list[Batch] = []
        self.most_at_once = 0
        self.num_relieved = 0
        self.active: list[Batch] = []
        self._lock = threading.Lock()

    def __call__(self, batch: Batch) -> Vectors:
        with self._entered(batch):
            if self.act is not None:
                self.act(batch)
            return self.compute(batch)

    def compute(self, batch: Batch) -> Vectors:
        """Return (sum of the ids, 1), for each text."""
        sums = (batch.input_ids * batch.attention_mask).sum(axis=1)
        return np.stack([sums, np.ones_like(sums)], axis=1).astype(np.float32)

    def relieve(self) -> None:
        with self._lock:
            self.num_relieved += 1

    @contextmanager
    def _entered(self, batch: Batch) -> Iterator[None]:
        with self._lock:
            self.began.append(batch)
            self.active.append(batch)
            self.most_at_once = max(self.most_at_once, len(self.active))
        try:
            yield
        finally:
            with self._lock:
                self.active = [one for one in self.active if one is not batch]


class Lengths:
    """A tokenizer for which a text is the number of its tokens: "5" has five, of which each is 5."""

    pad_id = 0
    pad_left = False

    def __call__(self, texts: list[str]) -> Tokens:
        return Tokens.of([[int(text)] * int(text) for text in texts])


def batch_of(*lengths: int, first: int = 0, budget: int = 512) -> Batch:
    """Make a batch of texts of so many tokens, whose positions begin with `first`."""
    positions = np.arange(first, first + len(lengths))
    ids, mask = Lengths()([str(length) for length in lengths]).padded(np.arange(len(lengths)), pad_id=0, pad_left=False)
    return Batch(positions, ids, mask, budget)


def wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S), "what was waited for has not come"
