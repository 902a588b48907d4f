"""The port to a budget: what is asked of it, and told to it, wherever it lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.errors import ProviderError, RateLimited
from engine.models.api.limits import Limits


@dataclass(frozen=True, slots=True)
class Grant:
    """Leave to send one request now."""

    id: int
    request_tokens: float
    """How large the next request should be, at most: what all are told, as the limits become known."""
    is_own: bool = False
    """Of a worker's own budget, while that of its job is away."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a request."""

    num_tokens: int | None = None
    """That it used; None if that is not known."""
    limits: Limits | None = None
    """That the answer told."""
    is_answer: bool = False
    """The provider answered as it should."""
    refusal: RateLimited | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What the budget knows of a job."""

    limits: Limits
    num_open: int
    """Orders that were admitted, and of which nothing has been heard since."""
    num_done: int
    """Orders that were answered in full, and paid for: what others had a vector for already, or has no text, is in none."""
    stopped_by: ProviderError | None
    """Why no more orders are admitted."""
    quiet_s: float
    """For which nothing was heard of any order or request, though this made nobody wait."""


class BudgetPort(Protocol):
    """A budget, or what stands for one that lives in another process."""

    async def admit(self, num_tokens: int) -> float:
        """
        Take on an order of so many tokens; return how large its requests should be. Raises `Stopped`.

        0 says that it was not taken on, and is to be asked for again: others may cost less than they were admitted for.
        """

    async def dismiss(self, num_tokens: int, paid_tokens: int, *, is_done: bool) -> None:
        """Let go of an order that was admitted for `num_tokens`, when `paid_tokens` were paid."""

    async def acquire(self, num_tokens: float) -> Grant:
        """Wait for leave to send a request of so many tokens. Raises `Stopped`."""

    async def report(self, grant: Grant, report: Report) -> None:
        """Say what became of a request."""

    async def stop(self, error: ProviderError) -> None:
        """Admit no more orders and no more requests, because of `error`."""
