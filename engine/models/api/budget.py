"""The budget: how fast a provider may be asked, and for how many tokens in all. One for all who share a key in a job."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import count

from engine.errors import ProviderError, RateLimited, Stopped
from engine.models.api.limits import Limits
from engine.models.api.port import Grant, Report, Standing
from engine.models.api.rate import Rate, Spent

PROBE_TOKENS = 4096
"""Of the first request, as long as the limits are not known."""
PROBE_S = 30.0
"""For which all others wait for the first answer, which tells the limits."""
REQUESTS_IN_A_MINUTE = 30
"""Into which the tokens of a minute are cut: few enough to be full, enough to be spread evenly."""
REQUESTS_KEPT_BACK = 1.5
"""Of the requests that are allowed, those that are planned for: some are not full, and some are sent twice."""
DEFAULT_PAUSE_S = 2.0
MAX_PAUSE_S = 300.0
"""A provider that asks for more is asked again after that: it may have been wrong, or have been given more quota."""
LOST_S = 120.0
"""Longer than any request takes."""
MAX_OPEN_GRANTS = 10_000
"""Of which no report has come: of actors that died."""


@dataclass(slots=True)
class _Open:
    """A grant that was not reported yet."""

    tokens: Spent
    since: float


@dataclass(slots=True)
class Budget:
    """
    Requests and tokens a minute, spent evenly and first come, first served; one pause for all when the provider asks for it.

    Args:
        given: Limits that the user gave; those that are None are learned from the provider.
        share: Of the limits, what this budget may spend.
        max_tokens: Of all orders together; None for no limit.
        is_resident: It is of a model that somebody keeps, and not of a job: what stopped it ends the orders of that time, not later ones.
        lost_s: Of silence, after which orders that were admitted are not waited for: whoever had them died.
    """

    given: Limits = field(default_factory=Limits)
    share: float = 1.0
    max_tokens: float | None = None
    is_resident: bool = False
    lost_s: float = LOST_S
    _requests: Rate = field(init=False)
    _tokens: Rate = field(init=False)
    _turn: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    _heard: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _has_heard: bool = field(init=False, default=False)
    _is_probing: bool = field(init=False, default=False)
    _paused_until: float = field(init=False, default=0.0)
    _slowed_at: float = field(init=False, default=-1.0)
    _open: dict[int, _Open] = field(init=False, default_factory=dict)
    _ids: count[int] = field(init=False, default_factory=count)
    _committed: dict[str, float] = field(init=False, default_factory=dict)
    _num_open: int = field(init=False, default=0)
    _num_done: int = field(init=False, default=0)
    _stopped_by: ProviderError | None = field(init=False, default=None)
    _is_spent: bool = field(init=False, default=False)
    _heard_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._requests, self._tokens = Rate(), Rate()
        self._heard_at = time.monotonic()
        self._set(self.given)
        self._has_heard = self.given.is_known

    async def admit(self, num_tokens: int, client: str = "", committed: float | None = None) -> float:
        """
        Take on an order; return how large its requests should be, or 0 if it has to wait for what those before it really cost.

        Args:
            num_tokens: Of the order.
            client: Whose it is.
            committed: Tokens that this client is admitted for, or has paid, by its own books and without this order. They count if
                this budget has none of that client, because it began again: what is sent to another process may come in any order.

        Raises:
            Stopped: If no more orders are taken.
        """
        if committed is not None:
            self._committed.setdefault(client, committed)
        if self._stopped_by is None and self.max_tokens is not None:
            total = sum(self._committed.values())
            if total + num_tokens > self.max_tokens:
                if self._num_open > 0 and self._quiet_s() <= self.lost_s:
                    return 0.0
                self._is_spent = True
                self._stopped_by = Stopped("what is left to do may cost more than --max-cost allows")
        self._check()
        self._committed[client] = self._committed.get(client, 0.0) + num_tokens
        self._num_open += 1
        self._heard_at = time.monotonic()
        return self.request_tokens

    async def dismiss(self, num_tokens: int, paid_tokens: int, *, is_done: bool, client: str = "") -> None:
        """Let go of an order that was admitted for `num_tokens`, when `paid_tokens` were paid."""
        if client in self._committed:  # or it was admitted before this budget began, and is in what its client will say
            self._committed[client] += paid_tokens - num_tokens
        self._num_open -= 1
        self._num_done += is_done and paid_tokens > 0
        self._heard_at = time.monotonic()
        if self.is_resident and not self._num_open:
            self._stopped_by = None

    async def acquire(self, num_tokens: float) -> Grant:
        """
        Wait for leave to send a request of so many tokens.

        Raises:
            Stopped: If no more requests are to be sent.
        """
        async with self._turn:  # asyncio.Lock is fair: nobody overtakes, so a large request does not starve
            await self._hear()
            await self._pause()
            await self._requests.take(1, self._check_fatal)
            tokens = await self._tokens.take(num_tokens, self._check_fatal)
            await self._pause()  # somebody may have been refused meanwhile
            self._check_fatal()
            grant = Grant(next(self._ids), self.request_tokens)
            self._heard_at = time.monotonic()
            self._open[grant.id] = _Open(tokens, self._heard_at)
            if len(self._open) > MAX_OPEN_GRANTS:
                del self._open[next(iter(self._open))]
            return grant

    async def report(self, grant: Grant, report: Report) -> None:
        """Say what became of a request."""
        self._heard_at = time.monotonic()
        opened = self._open.pop(grant.id, None)
        if report.limits is not None:
            self.learn(report.limits)
        if report.is_answer:
            self._has_heard = True
        self._is_probing = False
        self._heard.set()
        if opened is None:
            return
        if report.refusal is not None:
            self._slow_down(report.refusal, opened.since)
        elif report.num_tokens is not None:
            self._tokens.correct(opened.tokens, report.num_tokens)

    def learn(self, limits: Limits) -> None:
        """Go by limits that the provider tells, where the user gave none."""
        self._set(self.given.over(limits))
        self._has_heard = True

    async def stop(self, error: ProviderError) -> None:
        """Admit no more orders and no more requests, because of `error`."""
        if self._stopped_by is None or self._is_spent:
            self._stopped_by, self._is_spent = error, False

    async def standing(self) -> Standing:
        """Say what is known of the job."""
        limits = Limits(self._requests.limit, self._tokens.limit)
        return Standing(limits, self._num_open, self._num_done, self._stopped_by, self._quiet_s())

    @property
    def request_tokens(self) -> float:
        """How large a request should be, at most: an even share of a minute's tokens."""
        if not self._has_heard:
            return PROBE_TOKENS
        if self._tokens.limit is None:
            return float("inf")
        requests = REQUESTS_IN_A_MINUTE
        if self._requests.limit is not None:
            requests = min(requests, max(int(self._requests.limit / REQUESTS_KEPT_BACK), 1))
        return self._tokens.limit / requests

    def _quiet_s(self) -> float:
        if self._turn.locked():
            return 0.0
        return max(0.0, time.monotonic() - max(self._heard_at, self._paused_until))

    def _set(self, limits: Limits) -> None:
        self._requests.set(limits.requests and limits.requests * self.share)
        self._tokens.set(limits.tokens and limits.tokens * self.share)

    def _check(self) -> None:
        if self._stopped_by is not None:
            raise Stopped(self._stopped_by.message)

    def _check_fatal(self) -> None:
        """Raise for a stop that ends what was begun too: all but spent money."""
        if not self._is_spent:
            self._check()

    async def _hear(self) -> None:
        """Let one request go ahead, until an answer tells the limits, or that there are none."""
        while not self._has_heard:
            self._check_fatal()
            if not self._is_probing:
                self._is_probing = True
                self._heard.clear()
                return
            try:
                async with asyncio.timeout(PROBE_S):
                    await self._heard.wait()
            except TimeoutError:
                self._is_probing = False  # it was lost: the next goes ahead

    async def _pause(self) -> None:
        while True:
            self._check_fatal()
            left_s = self._paused_until - time.monotonic()
            if left_s <= 0:
                return
            await asyncio.sleep(min(left_s, 1.0))

    def _slow_down(self, refusal: RateLimited, sent_at: float) -> None:
        """Pause for all; and be slower afterwards, once for all requests that were on their way together."""
        wait_s = min(DEFAULT_PAUSE_S if refusal.wait_s is None else refusal.wait_s, MAX_PAUSE_S)
        now = time.monotonic()
        self._paused_until = max(self._paused_until, now + wait_s)
        if sent_at <= self._slowed_at:
            return
        self._slowed_at = now
        rates = {"requests": self._requests, "tokens": self._tokens}
        if not refusal.of and any(rate.limit for rate in rates.values()):  # nothing is guessed where a limit is known
            rates = {name: rate for name, rate in rates.items() if rate.limit}
        for name, rate in rates.items():
            if refusal.of in ("", name):
                if rate.limit is None and refusal.of == name and refusal.limit:
                    rate.set(refusal.limit * self.share)
                rate.slow_down()
