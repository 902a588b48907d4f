"""The token budget: how many padded tokens go through a device together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from engine.models.device_queue import Done

logger = logging.getLogger(__name__)

CANDIDATES = {"cpu": (256, 768, 1536), "cuda": (16384, 32768, 65536)}
"""For a core, few enough to stay in its caches, and enough to pay for a call; for a GPU, enough to fill it. A device begins with the middle one."""
TURNS = 2
"""At least, in a call on trial."""
BATCHES_TO_TELL = 8
"""Of each candidate; fewer say nothing."""
WORTH_IT = 1.03
"""Measurements differ by some percent by themselves; no budget is taken for less."""


@dataclass(slots=True)
class _Speed:
    batches: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    fill: float = 1.0
    """Of the padded tokens, those that are not padding, if all texts are packed under this budget."""

    @property
    def tokens_per_s(self) -> float:
        return self.padded_tokens * self.fill / max(self.seconds, 1e-9)


@dataclass(slots=True)
class TokenBudget:
    """
    The budget of one actor, for its life.

    If it is not given, it is found on the job's own first texts: their batches are packed under each candidate in turn, and the
    candidate with the most tokens a second stays. Nothing is computed twice for it, and nothing is kept of it but a number of
    tokens.

    Args:
        kind: Of device: cpu, cuda…
        given: Padded tokens a batch; None to find out.
    """

    kind: str
    given: int | None = None
    value: int = field(init=False)
    _speeds: dict[int, _Speed] = field(init=False, default_factory=dict)
    _is_settled: bool = field(init=False, default=False)
    _on_trial: bool = field(init=False, default=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.value = self.given or self._candidates[1]
        self._is_settled = self.given is not None

    @property
    def _candidates(self) -> tuple[int, ...]:
        return CANDIDATES.get(self.kind, CANDIDATES["cpu"])

    @contextmanager
    def trial(self, num_tokens: int) -> Iterator[tuple[int, ...]]:
        """Give the budgets to pack so many tokens under: the one that holds, or several that are to be compared."""
        least = TURNS * len(self._candidates)
        large_enough = tuple(one for one in self._candidates if one * least <= num_tokens)
        with self._lock:
            is_trial = not self._is_settled and not self._on_trial and len(large_enough) > 1
            self._on_trial |= is_trial  # what comes meanwhile has fuller batches under one budget
        try:
            yield large_enough if is_trial else (self.value,)
        finally:
            if is_trial:
                self._on_trial = False

    def note(self, one: Done) -> None:
        """Note how fast a batch on trial was."""
        with self._lock:
            if self._is_settled or one.vectors is None:
                return
            speed = self._speeds.setdefault(one.batch.budget, _Speed())
            speed.batches += 1
            speed.padded_tokens += one.batch.num_padded_tokens
            speed.seconds += one.seconds

    def compare(self, fills: Mapping[int, float]) -> None:
        """
        Settle for a budget, if enough batches of all of them were noted.

        Args:
            fills: For each budget on trial the share of its padded tokens that are not padding.
        """
        with self._lock:
            if self._is_settled:
                return
            for budget, fill in fills.items():
                self._speeds.setdefault(budget, _Speed()).fill = fill
            if all(speed.batches >= BATCHES_TO_TELL for speed in self._speeds.values()):
                self._settle()

    def halve(self, num_padded_tokens: int) -> None:
        """Stay below what a device had no memory for: a batch of `num_padded_tokens`."""
        with self._lock:
            self._is_settled = True
            if num_padded_tokens // 2 < self.value:
                self.value = max(num_padded_tokens // 2, 1)
                logger.warning(
                    "a batch of %d padded tokens does not fit into the device's memory: %d from now on",
                    num_padded_tokens,
                    self.value,
                )

    def _settle(self) -> None:
        self._is_settled = True
        best = max(self._speeds, key=lambda budget: self._speeds[budget].tokens_per_s)
        own = self._speeds.get(self.value)
        if own is None or self._speeds[best].tokens_per_s > WORTH_IT * own.tokens_per_s:
            self.value = best
        found = ", ".join(f"{budget}: {speed.tokens_per_s:.0f}" for budget, speed in sorted(self._speeds.items()))
        logger.info("batches of up to %d padded tokens; tokens/s of a stream under each budget: %s", self.value, found)
