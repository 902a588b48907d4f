"""Recovery: what is done with a request that failed, so that only what nobody can embed is rejected."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from engine.errors import (
    AuthenticationFailed,
    InputRejected,
    InputTooLong,
    ProviderError,
    QuotaExhausted,
    RateLimited,
    RequestTooLarge,
    Stopped,
    Unavailable,
)
from engine.models.api.answers import Malformed
from engine.models.api.long_texts import shortened
from engine.models.api.orders import Group, Piece
from engine.models.base import MAX_REASON_CHARACTERS, BadAnswer

if TYPE_CHECKING:
    from engine.models.api.manners import Manners
    from engine.models.base import Embeddings

BACKOFF_S = (0.5, 30.0)
"""Before a request is sent again to a provider that fails: at first, and at most; doubled each time, and spread at random."""
FAILURES_TO_DOUBT = 3
"""Of one request: from then on a plain sentence is sent after each, to see whether the request is at fault or the provider."""
FAILURES_TO_SPLIT = 3
"""In a row, of one request, after each of which the sentence passed: then one of its texts is at fault. Where a provider fails on a
share of all requests, whatever is in them, that happens to one in 50 (a share of a half) or fewer."""
FAILURES_TO_REJECT = 6
"""The same, of a text alone: where half of all requests fail, that happens to one in 10,000 that are sent alone."""
QUICK = 1 / 4
"""Of the time-out: a request that took no longer may be twice as large. All that are on their way together should take about that."""

LEAST_WEIGHT = 512
"""Of a request, below which the time of the first answer says nothing."""


class TimedOut(Unavailable):
    """The provider did not answer in time: it may hang, or be slow."""


class Recovery:
    """
    Owns all retries. A failure is the provider's (wait, and send again), the request's (cut it in two) or a text's (find it by halving,
    and reject it alone).

    Args:
        manners: How requests are made.
        send_again: Takes a request that is to be sent once more.
        probe: Embeds a plain sentence on a bill, or raises what the provider answers.
    """

    def __init__(
        self,
        manners: Manners,
        send_again: Callable[[Group], None],
        probe: Callable[[Embeddings], Coroutine[Any, Any, int]],
    ) -> None:
        self.max_inputs = manners.max_inputs
        """Of a request: less than the provider's terms say, once it has refused so many."""
        self._weight_taken = manners.max_weight
        self._weight_in_time = math.inf
        self._num_timeouts = 0
        """Since the last answer."""
        self._manners = manners
        self._send_again = send_again
        self._probe = probe
        self._last_good = 0.0
        self._trouble_since: float | None = None
        self._probing: asyncio.Task[int] | None = None
        self._probed_at = 0.0

    async def close(self) -> None:
        """End a probe that is on its way."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    def begin(self) -> None:
        """Note that nobody waits for an answer: a trouble that was given up, or came long ago, is not the next order's."""
        self._trouble_since = None

    @property
    def max_weight(self) -> float:
        """Of a request: less than the provider's terms say, once it has refused so much, or not answered to it in time."""
        return min(self._weight_taken, self._weight_in_time)

    def good(self) -> None:
        """Note that the provider has answered as it should."""
        self._last_good = time.monotonic()
        self._trouble_since = None
        self._num_timeouts = 0

    def passed(self, group: Group, started: float) -> None:
        """Note that a request was answered as it should be: the first tells how large others may be, and quick ones let them grow."""
        is_first = not self._last_good
        self.good()
        took_s, quick_s = max(self._last_good - started, 1e-3), self._manners.timeout_s * QUICK
        if is_first:
            self._weight_in_time = max(group.weight * quick_s / took_s / self._manners.num_concurrent, LEAST_WEIGHT)
        elif took_s <= quick_s and group.weight > self._weight_in_time / 2:
            self._weight_in_time *= 2

    async def failed(self, group: Group, error: Exception, started: float) -> None:
        """Decide what becomes of a request that failed. Raises what ends the orders in it."""
        if isinstance(error, RateLimited):
            group.pieces[0].order.usage.num_refusals += 1
            self._wait_or_raise(error)
            self._send_again(group)
            return
        since = group.failed_since or started
        group.failed()
        if isinstance(error, Unavailable):
            await self._failed_for_now(group, error, started)
        elif isinstance(error, (RequestTooLarge, InputTooLong)):
            await self._failed_for_size(group, error, since, started)
        elif isinstance(error, BadAnswer) and group.num_failures < 2:
            self._send_again(group)
        elif isinstance(error, (InputRejected, BadAnswer)):
            await self._failed_for_a_text(group, error, since, started)
        else:
            raise error

    async def _failed_for_now(self, group: Group, error: Unavailable, started: float) -> None:
        """Wait, and send again; where a plain sentence passes each time that this fails, find the text that is at fault."""
        is_alone = len(group.pieces) == 1
        if isinstance(error, TimedOut) and not is_alone:
            self._failed_for_slowness(group, error)
            return
        if group.num_failures >= FAILURES_TO_DOUBT:  # others that pass are no sign: many do where a share of all fails
            is_sure = await self._make_sure(group, error, math.inf, started)
            group.num_blamed = group.num_blamed + 1 if is_sure else 0
        if group.num_blamed < (FAILURES_TO_REJECT if is_alone else FAILURES_TO_SPLIT):
            self._later(group, error)
        elif is_alone:
            self._reject(group.pieces[0], error)
        else:
            self._split_later(group, error)

    def _failed_for_slowness(self, group: Group, error: TimedOut) -> None:
        """Send again what may have hung by chance; what is too slow, in smaller requests from now on."""
        group.num_timeouts += 1
        self._num_timeouts += 1
        if max(group.num_timeouts, self._num_timeouts) > 1:
            self._weight_in_time = min(self._weight_in_time, max(group.weight / 2, 1))
            self._split_later(group, error)
        else:
            self._later(group, error)

    async def _failed_for_size(self, group: Group, error: ProviderError, since: float, started: float) -> None:
        """Send less at once; cut a text that is too long by itself."""
        if len(group.pieces) > 1:
            if isinstance(error, RequestTooLarge) and error.of == "inputs":  # do not run into it again and again
                self.max_inputs = min(self.max_inputs, max(len(group.pieces) // 2, 1))
            elif isinstance(error, RequestTooLarge):
                self._weight_taken = min(self._weight_taken, max(group.weight / 2, 1))
            else:
                group.pieces.sort(key=lambda piece: piece.weight)  # so that one half may pass as it is
        elif isinstance(error, InputTooLong):
            piece = group.pieces[0]
            how, counter = self._manners.long_texts, self._manners.counter
            shorter = shortened(piece.text, counter=counter, how=how, share=error.share)
            if shorter:
                for again in piece.order.refit(piece, shorter):
                    self._send_again(Group([again]))
                return
        await self._failed_for_a_text(group, error, since, started)

    async def _failed_for_a_text(self, group: Group, error: Exception, since: float, started: float) -> None:
        """Find the text by halving, and reject it alone: but only where others pass."""
        is_alone = len(group.pieces) == 1
        if not await self._make_sure(group, error, started if is_alone else since, started):
            self._later(group, error)
        elif is_alone:
            self._reject(group.pieces[0], error)
        else:
            self._split(group)

    def _reject(self, piece: Piece, error: Exception) -> None:
        reason = error.message if isinstance(error, ProviderError) else f"the provider's answer is bad: {error}"
        piece.order.reject(piece.text_number, reason[:MAX_REASON_CHARACTERS])

    async def _make_sure(self, group: Group, error: Exception, since: float, started: float) -> bool:
        """
        Say whether others pass: one did since then, or a plain sentence does now. Where not even this is known, only time can tell.

        Raises:
            ProviderError: If the provider fails whatever the text.
        """
        if self._last_good > since:
            return True
        try:
            await self._probed(group, started)
        except (RateLimited, Unavailable):
            return False
        except (AuthenticationFailed, QuotaExhausted, Stopped):
            raise
        except (ProviderError, BadAnswer) as again:
            if isinstance(again, Malformed) and self._last_good:
                return False  # it did better before
            raise ProviderError(
                f"the provider fails on every text: {_said(error)} (on a plain English sentence too: {type(again).__name__}). Mend the "
                "settings, then run the same command again; what was committed is kept"
            ) from None
        self.good()
        return True

    async def _probed(self, group: Group, since: float) -> None:
        """Send a plain sentence: one for all requests that were on their way together."""
        if self._probing is None or (self._probing.done() and self._probed_at <= since):
            self._probed_at = time.monotonic()
            self._probing = asyncio.create_task(self._probe(group.pieces[0].order.usage))
        await asyncio.shield(self._probing)

    def _later(self, group: Group, error: Exception) -> None:
        """Send a request again after a while, which is longer after each failure. Raises when that has gone on for too long."""
        self._wait_or_raise(error)
        least, most = BACKOFF_S
        wait_s = min(least * 2 ** (group.num_failures - 1), most) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        asked_s = (isinstance(error, Unavailable) and error.wait_s) or 0.0
        wait_s = max(wait_s, min(asked_s, self._manners.give_up_s / 2))
        asyncio.get_running_loop().call_later(wait_s, self._send_again, group)

    def _wait_or_raise(self, error: Exception) -> None:
        now = time.monotonic()
        self._trouble_since = self._trouble_since or now
        if now - self._trouble_since > self._manners.give_up_s:
            raise ProviderError(
                f"the provider has answered nothing for {self._manners.give_up_s:g} s ({_said(error)}): what was committed is "
                "kept; run the same command again when it is back"
            )

    def _split(self, group: Group) -> None:
        for half in group.halves():
            half.num_failures = 0
            self._send_again(half)

    def _split_later(self, group: Group, error: Exception) -> None:
        """Send halves after a while. Of each, one more failure is enough: it inherits the doubt."""
        for half in group.halves():
            half.num_failures = FAILURES_TO_DOUBT - 1
            half.num_blamed = min(group.num_blamed, FAILURES_TO_SPLIT - 1)
            self._later(half, error)


def _said(error: Exception) -> str:
    """Return what an error says; no text is in it."""
    return error.message if isinstance(error, ProviderError) else f"bad answer, {error}"
