"""The budget of a job: one named Ray actor that all embedding actors ask before they ask the provider."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.commits import LEFT
from engine.errors import EngineError, ProviderError, Stopped
from engine.models.api.budget import LOST_S, Budget
from engine.models.api.limits import Limits
from engine.models.api.port import Grant, Report, Standing

if TYPE_CHECKING:
    from engine.commits import Receipt
    from engine.model_config import ModelConfig
    from engine.models.base import BaseEmbeddingModel

logger = logging.getLogger(__name__)

MAX_CALLS = 10_000
"""Of the actor at once: each request that waits for its turn is one."""
AWAY_S = 5.0
"""For which a worker that has lost the actor goes on at its share, before it looks for it again."""
ASK_S = 30.0
ASK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Shared:
    """What a worker has to know of its job's budget."""

    actor: Any
    limits: Limits
    share: float
    """Of the limits, for a worker that has lost the actor."""
    lost_s: float
    """Of silence, after which what was begun is not waited for."""


@contextmanager
def shared(config: ModelConfig, num_actors: int, max_tokens: float | None) -> Iterator[Shared]:
    """
    Have a budget for as long as a run takes. It is an actor beside the driver, and dies with it.

    Args:
        config: Of the model.
        num_actors: That will ask.
        max_tokens: Of all orders together.
    """
    limits = Limits(config.requests_per_minute, config.tokens_per_minute)
    lost_s = LOST_S + (config.request_timeout_s or 0.0)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = (
        ray.remote(Budget)
        .options(
            name=f"engine-budget-{uuid.uuid4().hex}",
            num_cpus=0,
            max_concurrency=MAX_CALLS,
            max_restarts=-1,
            scheduling_strategy=here,
        )
        .remote(limits, 1.0, max_tokens, lost_s=lost_s)
    )
    try:
        yield Shared(actor, limits, 1 / num_actors, lost_s)
    finally:
        with suppress(RayError):
            ray.kill(actor)


def standing(budget: Shared) -> Standing | None:
    """Return what the budget knows; None if it cannot be asked now."""
    try:
        found: Standing = ray.get(budget.actor.standing.remote(), timeout=ASK_S)
    except (RayError, TimeoutError):
        return None
    return found


class Drain:
    """
    Sees a run to its end that its budget has stopped: what was begun is paid for, and is waited for.

    Args:
        budget: Of the run; None if it has none.
        was_used: There were orders before the run's first parcel: a sample.
    """

    def __init__(self, budget: Shared | None, *, was_used: bool = False) -> None:
        self._budget = budget
        self._lost_s = budget.lost_s if budget else LOST_S
        before = standing(budget) if budget and was_used else None
        self._num_done = before.num_done if before else 0
        self._is_stopping = False
        self._asked_at = 0.0
        self._last_done = time.monotonic()

    def add(self, receipts: Sequence[Receipt]) -> None:
        """Count a parcel, if it was paid for, as the budget counts orders: one whose vectors were all reused has had none."""
        if any(receipt.outcome == LEFT for receipt in receipts):
            self._is_stopping = True
        else:
            self._num_done += any(receipt.num_tokens for receipt in receipts)
            self._last_done = time.monotonic()

    def is_empty(self) -> bool:
        """Say whether the run is stopping, and all orders that were begun have come back."""
        now = time.monotonic()
        if not self._is_stopping or now - self._asked_at < ASK_EVERY_S:
            return False
        self._asked_at = now
        found = standing(self._budget) if self._budget else None
        if found is None or (found.num_open <= 0 and self._num_done >= found.num_done):
            return True
        return min(now - self._last_done, found.quiet_s) > self._lost_s  # an actor died with what it had begun

    def raise_if_stopped(self) -> None:
        """Raise what has stopped the run, if anything has."""
        if self._is_stopping:
            found = standing(self._budget) if self._budget else None
            raise (found and found.stopped_by) or ProviderError(
                "the run was stopped, and its budget is gone; what was committed is kept: run the same command again"
            )


def join(model: BaseEmbeddingModel, budget: Shared) -> None:
    """Let a model go by its job's budget."""
    model.share(BudgetClient(budget))


class BudgetClient:
    """
    The budget as a worker sees it: the actor, and while that is away a budget of its own at its share.

    It keeps the books on what it has committed, so that an actor that was begun again hears of it.
    """

    def __init__(self, budget: Shared) -> None:
        self._actor = budget.actor
        self._own = Budget(budget.limits, budget.share)
        self._id = uuid.uuid4().hex
        self._committed = 0.0
        self._admitting = asyncio.Lock()
        self._away_until = 0.0

    async def admit(self, num_tokens: int) -> float:
        """Take on an order of so many tokens; return how large its requests should be, 0 if it has to wait. Raises `Stopped`."""
        async with self._admitting:  # one by one: the books that are sent have no order in them that may have to wait
            committed = self._committed
            self._committed += num_tokens
            try:
                weight = await self._ask("admit", num_tokens, client=self._id, committed=committed)
            except Stopped:
                self._committed -= num_tokens
                raise
            if weight == 0:
                self._committed -= num_tokens
        return float(self._own.request_tokens if weight is None else weight)

    async def dismiss(self, num_tokens: int, paid_tokens: int, *, is_done: bool) -> None:
        """Let go of an order that was admitted for `num_tokens`, when `paid_tokens` were paid."""
        self._committed += paid_tokens - num_tokens
        await self._ask("dismiss", num_tokens, paid_tokens, is_done=is_done, client=self._id)

    async def acquire(self, num_tokens: float) -> Grant:
        """Wait for leave to send a request of so many tokens. Raises `Stopped`."""
        grant: Grant | None = await self._ask("acquire", num_tokens)
        if grant is None:
            grant = replace(await self._own.acquire(num_tokens), is_own=True)
        return grant

    async def report(self, grant: Grant, report: Report) -> None:
        """Say what became of a request."""
        if grant.is_own:
            await self._own.report(grant, report)
            return
        if report.limits is not None:
            self._own.learn(report.limits)
        await self._ask("report", grant, report)

    async def stop(self, error: ProviderError) -> None:
        """Admit no more orders and no more requests, because of `error`."""
        await self._own.stop(error)
        await self._ask("stop", error)

    async def _ask(self, method: str, *given: Any, **named: Any) -> Any:
        """Call the actor; return None while it is away."""
        if time.monotonic() < self._away_until:
            return None
        try:
            return await getattr(self._actor, method).remote(*given, **named)
        except RayError as error:
            if isinstance(cause := getattr(error, "cause", None), EngineError):
                raise cause from None
            logger.warning("the budget's actor is away (%s): going on at this actor's share", type(error).__name__)
            self._away_until = time.monotonic() + AWAY_S
            return None
