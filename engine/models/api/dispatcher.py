"""The dispatcher: full requests, one after the other, as the budget allows them, and what is done with those that fail."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

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
from engine.models.api.budget import Grant, Report
from engine.models.api.long_texts import shortened
from engine.models.api.orders import Group, Piece, take
from engine.models.base import MAX_REASON_CHARACTERS, PROBE, BadAnswer, usable

if TYPE_CHECKING:
    from engine.models.api.answers import Reply
    from engine.models.api.budget import BudgetPort
    from engine.models.api.long_texts import LongTexts
    from engine.models.api.orders import Order
    from engine.models.api.tokens import Counter
    from engine.models.base import Vectors

logger = logging.getLogger(__name__)

BACKOFF_S = (0.5, 30.0)
"""Before a request is sent again to a provider that fails: at first, and at most; doubled each time, and spread at random."""
FAILURES_TO_SPLIT = 3
"""In a row, of one request, while others are answered: then one of its texts is at fault."""
UNIT_TOLERANCE = 1e-2
"""Of the length of a vector whose model's vectors have length 1."""
NOT_USABLE = "vectors that are zero, not finite or not of length 1"


@dataclass(frozen=True, slots=True)
class Manners:
    """How requests are made."""

    max_inputs: int
    max_weight: float
    num_concurrent: int
    timeout_s: float
    """For a whole answer."""
    give_up_s: float
    """After which a provider that has answered nothing is given up."""
    long_texts: LongTexts
    counter: Counter


class Dispatcher:
    """
    Sends what waits, in the order in which it came, in requests as full as they may be; on one event loop.

    It owns all retries. A failure is the provider's (wait, and send again), the request's (cut it in two) or a text's (find it by
    halving, and reject it alone).

    Args:
        request: Sends texts once, and returns the answer or raises what it means.
        manners: How.
        budget: Asked before every request.
    """

    def __init__(
        self, request: Callable[[Sequence[str]], Awaitable[Reply]], manners: Manners, budget: BudgetPort
    ) -> None:
        self.budget = budget
        self.dimension: int | None = None
        self._request = request
        self._manners = manners
        self._max_inputs = manners.max_inputs
        self._max_weight = manners.max_weight
        self._budget_weight = float("inf")
        self._waiting: deque[Piece] = deque()
        self._again: deque[Group] = deque()
        self._slots = asyncio.Semaphore(manners.num_concurrent)
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_good = 0.0
        self._trouble_since: float | None = None
        self._is_unit: bool | None = None
        self._dispatching: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[int] | None = None
        self._probed_at = 0.0

    def send(self, order: Order, budget_weight: float) -> None:
        """Take on an order. Its future is done when all its texts are settled."""
        self._budget_weight = budget_weight
        self._waiting.extend(order.pieces())
        self._go()

    async def close(self) -> None:
        """Stop; what waits is not sent."""
        tasks = [*self._tasks, *(task for task in (self._dispatching, self._probing) if task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def probe(self) -> int:
        """Embed a plain sentence; return the dimension of its vector. Raises what the provider answers."""
        grant = await self.budget.acquire(len(PROBE))
        reply = await self._attempt([PROBE], grant)
        self._check(reply, 1)
        if not self._are_good(reply.vectors).all():
            raise BadAnswer(NOT_USABLE)
        return self.dimension or 0

    def _go(self) -> None:
        if self._dispatching is None or self._dispatching.done():
            self._dispatching = asyncio.create_task(self._dispatch())

    async def _dispatch(self) -> None:
        """Send all that waits; it ends when nothing does, and is begun again with the next."""
        while self._waiting or self._again:
            await self._slots.acquire()
            group = self._next()
            if not group.pieces:
                self._slots.release()
                continue
            try:
                grant = await self.budget.acquire(group.weight)
            except ProviderError as error:
                self._slots.release()
                self._fail(group, error)
                continue
            self._budget_weight = grant.request_tokens
            if math.isinf(grant.request_tokens):
                self._fill(group)  # no tokens to ask for, and more may have come meanwhile
            task = asyncio.create_task(self._send(group, grant))
            self._tasks.add(task)
            task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._slots.release()
        self._tasks.discard(task)

    def _fill(self, group: Group) -> None:
        room = self._max_inputs - len(group.pieces)
        if room > 0 and not group.failed_since:
            left = self._max_weight - group.weight
            group.pieces += take(self._waiting, max_inputs=room, max_weight=left, is_empty=False).pieces

    def _next(self) -> Group:
        """Return what to send next: first what failed before. Orders that were given up leave nothing of themselves."""
        if self._again:
            group = self._again.popleft()
            group.pieces = [piece for piece in group.pieces if not piece.order.done.done()]
            return group
        most = min(self._max_weight, self._budget_weight)
        return take(self._waiting, max_inputs=self._max_inputs, max_weight=most)

    async def _send(self, group: Group, grant: Grant) -> None:
        usage = group.pieces[0].order.usage
        usage.num_requests += 1
        usage.num_retries += group.num_failures > 0
        started = time.monotonic()
        try:
            reply = await self._attempt([piece.text for piece in group.pieces], grant)
            self._check(reply, len(group.pieces))
            self._settle(group, reply)
        except Exception as error:
            try:
                await self._failed(group, error, started)
            except Exception as final:
                await self._give_up(group, final)

    async def _attempt(self, texts: list[str], grant: Grant) -> Reply:
        """Send texts once, and tell the budget what became of it."""
        report = Report()
        try:
            async with asyncio.timeout(self._manners.timeout_s):
                reply = await self._request(texts)
        except TimeoutError:
            raise Unavailable(f"the provider did not answer within {self._manners.timeout_s:g} s") from None
        except RateLimited as refusal:
            report = Report(refusal=refusal)
            raise
        except ProviderError as error:
            report = Report(None if isinstance(error, Unavailable) else 0)  # it may have been computed, and billed
            raise
        else:
            report = Report(reply.num_tokens, reply.limits, is_answer=True)
            return reply
        finally:
            await self.budget.report(grant, report)

    def _check(self, reply: Reply, num_texts: int) -> None:
        vectors = reply.vectors
        if len(vectors) != num_texts:
            raise BadAnswer(f"{len(vectors)} vectors for {num_texts} texts")
        if self.dimension is None:
            self.dimension = vectors.shape[1]
        if vectors.shape[1] != self.dimension:
            raise BadAnswer(f"{vectors.shape[1]} dimensions instead of {self.dimension}")

    def _are_good(self, vectors: Vectors) -> npt.NDArray[np.bool_]:
        """Say of each vector whether it is finite, not zero, and of length 1 if the model's are."""
        good = usable(vectors)
        is_unit = np.abs(np.linalg.norm(vectors, axis=1) - 1) < UNIT_TOLERANCE
        if self._is_unit is None and good.all():
            self._is_unit = bool(is_unit.all())
        return good & is_unit if self._is_unit else good

    def _settle(self, group: Group, reply: Reply) -> None:
        """Give each text its vector; those that have none that is usable are sent again, alone."""
        self._bill(group, reply)
        good = self._are_good(reply.vectors)
        if not good.any():
            raise BadAnswer(NOT_USABLE)
        self._good()
        for piece, vector, is_good in zip(group.pieces, reply.vectors, good.tolist(), strict=True):
            if is_good:
                piece.order.settle(piece, vector)
            else:
                self._once_more(Group([piece]))

    def _bill(self, group: Group, reply: Reply) -> None:
        """Divide the tokens of an answer among the orders that it is for."""
        total = sum(piece.num_tokens for piece in group.pieces)
        paid = total if reply.num_tokens is None else reply.num_tokens
        said = given = 0
        for piece in group.pieces:
            said += piece.num_tokens
            share = round(paid * said / total) if total else 0
            piece.order.usage.num_tokens += share - given
            given = share

    async def _failed(self, group: Group, error: Exception, started: float) -> None:
        """Decide what becomes of a request that failed. Raises what ends the orders in it."""
        if isinstance(error, RateLimited):
            group.pieces[0].order.usage.num_refusals += 1
            self._wait_or_raise(error)
            self._once_more(group)
            return
        since = group.failed_since or started
        group.failed()
        if isinstance(error, Unavailable):
            await self._failed_for_now(group, error, started)
        elif isinstance(error, (RequestTooLarge, InputTooLong)):
            await self._failed_for_size(group, error, since, started)
        elif isinstance(error, BadAnswer) and group.num_failures < 2:
            self._once_more(group)
        elif isinstance(error, (InputRejected, BadAnswer)):
            await self._failed_for_a_text(group, error, since, started)
        else:
            raise error

    async def _failed_for_now(self, group: Group, error: Unavailable, started: float) -> None:
        """Wait, and send again; where others are answered meanwhile, again and again, find the text that is at fault."""
        if group.num_failures < FAILURES_TO_SPLIT or not await self._make_sure(error, started, started):
            self._later(group, error)
        elif len(group.pieces) > 1:
            self._split(group, num_failures=FAILURES_TO_SPLIT - 1)  # once is enough for each half
        elif group.num_failures == FAILURES_TO_SPLIT:
            self._later(group, error)
        else:
            self._reject(group.pieces[0], error)

    async def _failed_for_size(self, group: Group, error: ProviderError, since: float, started: float) -> None:
        """Send less at once; cut a text that is too long by itself."""
        if len(group.pieces) > 1:
            if isinstance(error, RequestTooLarge) and error.of == "inputs":  # do not run into it again and again
                self._max_inputs = min(self._max_inputs, max(len(group.pieces) // 2, 1))
            elif isinstance(error, RequestTooLarge):
                self._max_weight = min(self._max_weight, max(group.weight / 2, 1))
        elif isinstance(error, InputTooLong):
            piece = group.pieces[0]
            shorter = shortened(piece.text, counter=self._manners.counter, how=self._manners.long_texts)
            if shorter:
                for again in piece.order.refit(piece, shorter):
                    self._once_more(Group([again]))
                return
        await self._failed_for_a_text(group, error, since, started)

    async def _failed_for_a_text(self, group: Group, error: Exception, since: float, started: float) -> None:
        """Find the text by halving, and reject it alone: but only where others pass."""
        is_alone = len(group.pieces) == 1
        if not await self._make_sure(error, started if is_alone else since, started):
            self._later(group, error)
        elif is_alone:
            self._reject(group.pieces[0], error)
        else:
            self._split(group)

    def _reject(self, piece: Piece, error: Exception) -> None:
        reason = error.message if isinstance(error, ProviderError) else f"the provider's answer is bad: {error}"
        piece.order.reject(piece.text_number, reason[:MAX_REASON_CHARACTERS])

    async def _make_sure(self, error: Exception, since: float, started: float) -> bool:
        """
        Say whether others pass: one did since then, or a plain sentence does now. Where not even this is known, only time can tell.

        Raises:
            ProviderError: If the provider fails whatever the text.
        """
        if self._last_good > since:
            return True
        try:
            await self._probed(started)
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
        self._good()
        return True

    async def _probed(self, since: float) -> None:
        """Send a plain sentence: one for all requests that were on their way together."""
        if self._probing is None or (self._probing.done() and self._probed_at <= since):
            self._probed_at = time.monotonic()
            self._probing = asyncio.create_task(self.probe())
        await asyncio.shield(self._probing)

    def _later(self, group: Group, error: Exception) -> None:
        """Send a request again after a while, which is longer after each failure. Raises when that has gone on for too long."""
        self._wait_or_raise(error)
        least, most = BACKOFF_S
        wait_s = min(least * 2 ** (group.num_failures - 1), most) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        asked_s = (isinstance(error, Unavailable) and error.wait_s) or 0.0
        wait_s = max(wait_s, min(asked_s, self._manners.give_up_s / 2))
        asyncio.get_running_loop().call_later(wait_s, self._once_more, group)

    def _wait_or_raise(self, error: Exception) -> None:
        now = time.monotonic()
        self._trouble_since = self._trouble_since or now
        if now - self._trouble_since > self._manners.give_up_s:
            raise ProviderError(
                f"the provider has answered nothing for {self._manners.give_up_s:g} s ({_said(error)}): what was committed is "
                "kept; run the same command again when it is back"
            )

    def _good(self) -> None:
        self._last_good = time.monotonic()
        self._trouble_since = None

    def _split(self, group: Group, num_failures: int = 0) -> None:
        for half in group.halves():
            half.num_failures = num_failures
            self._once_more(half)

    def _once_more(self, group: Group) -> None:
        self._again.append(group)
        self._go()

    async def _give_up(self, group: Group, error: Exception) -> None:
        """End the job for what is no text's fault."""
        if not isinstance(error, ProviderError):
            error = ProviderError(f"the model's library failed: {type(error).__name__}; what was committed is kept")
        if not isinstance(error, Stopped):
            await self.budget.stop(error)
        self._fail(group, error)

    def _fail(self, group: Group, error: ProviderError) -> None:
        for order in {piece.order for piece in group.pieces}:
            order.fail(error)


def _said(error: Exception) -> str:
    """Return what an error says; no text is in it."""
    return error.message if isinstance(error, ProviderError) else f"bad answer, {error}"
