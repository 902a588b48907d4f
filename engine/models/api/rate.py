"""A rate: one limit per minute, spent evenly, so that no window of a minute ever holds more than it allows."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from aiolimiter import AsyncLimiter

PACE = 0.98
"""Of the limit. The rest is for clocks that differ, and for what is on its way."""
BURST_S = 0.2
"""What may be spent at once. Less, and a timer that fires late loses what had leaked meanwhile."""
WINDOW_S = 60.5
"""A minute, and what requests may differ in their way to the server."""
CREDIT_S = 10.0
"""What is given back is worth this long, at most: a burst of more would be one over the limit."""
CHECK_S = 1.0
SLOWER = 0.7
SLOWEST = 0.05
RECOVERY_PER_S = 0.01
"""Of the limit, and second: it takes half a minute to recover from one refusal."""


@dataclass(slots=True, eq=False)
class Spent:
    """An amount that was taken."""

    at: float
    amount: float
    is_recent: bool = True


class Rate:
    """
    Requests, or tokens, per minute. `take` is for one caller at a time, who holds the turn of its budget.

    aiolimiter's leaky bucket makes the pace. It lets a burst of its capacity through, so that is a fifth of a second's worth, and
    larger amounts are taken in slices; and a log of the last minute makes sure of the whole.
    """

    def __init__(self) -> None:
        self.limit: float | None = None
        """Per minute; None for none."""
        self._is_guess = False
        self._limiter: AsyncLimiter | None = None
        self._log: deque[Spent] = deque()
        self._recent = 0.0
        self._credit = 0.0
        self._factor = 1.0
        self._factor_at = 0.0
        self._began = time.monotonic()
        self._refused_at = -math.inf

    def set(self, limit: float | None) -> None:
        """Go by a limit that is known; None leaves what there is."""
        if not limit or limit == self.limit:
            return
        self._is_guess = False
        self._adopt(limit)

    async def take(self, amount: float, check: Callable[[], None] = lambda: None) -> Spent:
        """
        Wait until `amount` may be spent, and spend it; what is returned is for `correct`.

        Args:
            amount: Requests, or tokens.
            check: Called now and then while it waits; what it raises ends the wait.
        """
        if self.limit is not None:
            while (wait_s := self._wait_s(amount)) > 0:
                check()
                await asyncio.sleep(min(wait_s, CHECK_S))
            left = amount - self._credit
            self._credit = max(-left, 0.0)
            while left > 0 and self._limiter is not None:
                capacity = self._limiter.max_rate
                piece = min(left, capacity * self._present_factor())
                check()
                await self._limiter.acquire(min(piece / self._present_factor(), capacity))
                left -= piece
        spent = Spent(time.monotonic(), amount)
        self._log.append(spent)
        self._recent += amount
        self._forget()
        return spent

    def correct(self, spent: Spent, amount: float) -> None:
        """Say what was really spent: what was taken too much is given back, and what was taken too little is owed."""
        self._credit += spent.amount - amount
        if self.limit is not None:
            self._credit = min(self._credit, self.limit / 60 * CREDIT_S)
        else:
            self._credit = 0.0
        if spent.is_recent:
            self._recent += amount - spent.amount
        spent.amount = amount

    def slow_down(self) -> None:
        """
        Be slower for a while: the provider has refused.

        Without a limit, a single refusal says nothing of one (a busy server has passing ones); with a second in a minute, what was
        taken in the last minute becomes the limit.
        """
        now = time.monotonic()
        if self.limit is None and now - self._refused_at < WINDOW_S and self._recent > 0:
            self._is_guess = True
            self._factor_at = now  # a guess becomes faster from now on, and not since the machine began
            self._adopt(
                self._recent / (1 + min(now - self._began, WINDOW_S) / WINDOW_S)
            )  # a full bucket gave as much more
        self._refused_at = now
        if self.limit is not None:
            self._factor = max(self._present_factor() * SLOWER, SLOWEST)
            self._factor_at = now

    def _adopt(self, limit: float) -> None:
        self.limit = limit
        pace = limit / 60 * PACE
        capacity = max(pace * BURST_S, min(1.0, limit))
        self._limiter = AsyncLimiter(capacity, capacity / pace)

    def _present_factor(self) -> float:
        """Return by how much slower than its pace it goes now. A guess may turn out to have been too low."""
        factor = self._factor
        if factor < 1 or self._is_guess:
            factor += (time.monotonic() - self._factor_at) * RECOVERY_PER_S
        return factor if self._is_guess else min(factor, 1.0)

    def _wait_s(self, amount: float) -> float:
        """Return how long the last minute still holds too much for `amount`; what is more than a minute's worth goes alone."""
        self._forget()
        allowed = (self.limit or 0.0) * max(self._present_factor(), 1.0) * (1 + 1e-9)
        surplus = self._recent + amount - max(allowed, amount)
        if surplus <= 0:
            return 0.0
        now = time.monotonic()
        for spent in self._log:
            surplus -= spent.amount
            if surplus <= 0:
                return max(spent.at + WINDOW_S - now, 0.001)
        return 0.0

    def _forget(self) -> None:
        before = time.monotonic() - WINDOW_S
        while self._log and self._log[0].at < before:
            spent = self._log.popleft()
            spent.is_recent = False
            self._recent -= spent.amount
