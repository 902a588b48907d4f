"""The dispatcher: full requests, one after the other, as the budget allows them."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.errors import (
    ProviderError,
    RateLimited,
    Stopped,
    Unavailable,
)
from engine.models.api.orders import Group, Piece, take
from engine.models.api.port import Grant, Report
from engine.models.api.recovery import Recovery, TimedOut
from engine.models.base import PROBE, BadAnswer, usable

if TYPE_CHECKING:
    from engine.models.api.answers import Reply
    from engine.models.api.manners import Manners
    from engine.models.api.orders import Order
    from engine.models.api.port import BudgetPort
    from engine.models.base import Embeddings, Vectors

UNIT_TOLERANCE = 1e-2
"""Of the length of a vector whose model's vectors have length 1."""
NOT_USABLE = "vectors that are zero, not finite or not of length 1"


class Dispatcher:
    """
    Sends what waits, in the order in which it came, in requests as full as they may be; on one event loop.

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
        self._recovery = Recovery(manners, self._once_more, self.probe)
        self._budget_weight = float("inf")
        self._waiting: deque[Piece] = deque()
        self._again: deque[Group] = deque()
        self._slots = asyncio.Semaphore(manners.num_concurrent)
        self._orders: set[Order] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_unit: bool | None = None
        self._dispatching: asyncio.Task[None] | None = None

    def send(self, order: Order, budget_weight: float) -> None:
        """Take on an order. Its future is done when all its texts are settled."""
        self._budget_weight = budget_weight
        if not self._orders:
            self._recovery.begin()
        self._orders.add(order)
        order.done.add_done_callback(lambda _: self._orders.discard(order))
        self._waiting.extend(order.pieces())
        self._go()

    async def close(self) -> None:
        """Stop; what waits is not sent."""
        tasks = [*self._tasks, *([self._dispatching] if self._dispatching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._recovery.close()

    async def probe(self, usage: Embeddings | None = None) -> int:
        """Embed a plain sentence on the bill of `usage`; return the dimension of its vector. Raises what the provider answers."""
        grant = await self.budget.acquire(len(PROBE))
        reply = await self._attempt([PROBE], grant)
        if usage is not None:
            usage.num_requests += 1
            usage.num_tokens += reply.num_tokens or 0
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
            group = self._cut(group)
            task = asyncio.create_task(self._send(group, grant))
            self._tasks.add(task)
            task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._slots.release()
        self._tasks.discard(task)

    def _fill(self, group: Group) -> None:
        room = self._recovery.max_inputs - len(group.pieces)
        if room > 0 and not group.failed_since:
            left = self._recovery.max_weight - group.weight
            group.pieces += take(self._waiting, max_inputs=room, max_weight=left, is_empty=False).pieces

    def _next(self) -> Group:
        """Return what to send next: first what failed before. Orders that were given up leave nothing of themselves."""
        if self._again:
            group = self._again.popleft()
            group.pieces = [piece for piece in group.pieces if not piece.order.done.done()]
            return self._cut(group)
        most = min(self._recovery.max_weight, self._budget_weight)
        return take(self._waiting, max_inputs=self._recovery.max_inputs, max_weight=most)

    def _cut(self, group: Group) -> Group:
        """Return what may be sent at once of a request that was put together before smaller ones were found to be better."""
        known = self._recovery
        while len(group.pieces) > 1 and (len(group.pieces) > known.max_inputs or group.weight > known.max_weight):
            group, rest = group.halves()
            self._again.appendleft(rest)
        return group

    async def _send(self, group: Group, grant: Grant) -> None:
        usage = group.pieces[0].order.usage
        usage.num_requests += 1
        usage.num_retries += group.num_failures > 0
        started = time.monotonic()
        try:
            reply = await self._attempt([piece.text for piece in group.pieces], grant)
            self._bill(group, reply.num_tokens)  # before it is judged: a bad answer is paid too
            self._check(reply, len(group.pieces))
            self._settle(group, reply, started)
        except Exception as error:
            if isinstance(error, BadAnswer) and error.num_tokens is not None:  # it was judged as it was decoded
                self._bill(group, error.num_tokens)
            try:
                await self._recovery.failed(group, error, started)
            except Exception as final:
                await self._give_up(group, final)

    async def _attempt(self, texts: list[str], grant: Grant) -> Reply:
        """Send texts once, and tell the budget what became of it."""
        report = Report()
        try:
            async with asyncio.timeout(self._manners.timeout_s):
                reply = await self._request(texts)
        except TimeoutError:
            raise TimedOut(f"the provider did not answer within {self._manners.timeout_s:g} s") from None
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

    def _settle(self, group: Group, reply: Reply, started: float) -> None:
        """Give each text its vector; those that have none that is usable are sent again, alone."""
        good = self._are_good(reply.vectors)
        if not good.any():
            raise BadAnswer(NOT_USABLE)
        self._recovery.passed(group, started)
        for piece, vector, is_good in zip(group.pieces, reply.vectors, good.tolist(), strict=True):
            if is_good:
                piece.order.settle(piece, vector)
            else:
                self._once_more(Group([piece]))

    def _bill(self, group: Group, num_tokens: int | None) -> None:
        """Divide the tokens of an answer among the orders that it is for."""
        total = sum(piece.num_tokens for piece in group.pieces)
        paid = total if num_tokens is None else num_tokens
        said = given = 0
        for piece in group.pieces:
            said += piece.num_tokens
            share = round(paid * said / total) if total else 0
            piece.order.usage.num_tokens += share - given
            given = share

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
