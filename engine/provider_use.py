"""The use of a provider: what it was asked and took, and what pending texts will cost."""

from __future__ import annotations

from dataclasses import dataclass

from engine.result import Result
from engine.wording import count, dollars, duration, retries


@dataclass(frozen=True, slots=True)
class Forecast(Result):
    """What the pending texts will cost a provider's customer."""

    num_texts: int
    """That will be sent, without duplicates."""
    num_duplicates: int
    """Texts that are not sent, since others of their shard are the same."""
    num_rejects: int
    """Rows that will be rejected, as far as can be told without the provider."""
    num_long: int
    """Texts that are longer than the model takes."""
    num_tokens: int
    is_exact: bool
    """The tokens are the provider's own, of all texts; else an upper bound, or an estimate from a sample."""
    num_requests: int
    cost: float | None
    """Dollars; None if nobody knows the price."""
    seconds: float | None
    """That the limits allow it to be done in; None if they were not given."""
    num_reused: int = 0
    """Rows whose text has a vector already, in former parts or in outputs that are reused: not sent, and in none of the other numbers."""

    def lines(self) -> dict[str, str]:
        """Say what a provider will be asked for, and what it will take."""
        kind = "" if self.is_exact else ", by an estimate"
        tokens = f"{count(self.num_tokens, 'token')}{kind} in {count(self.num_texts, 'text')}"
        lines = (
            {"reused": f"{count(self.num_reused, 'row')}, whose vectors are there already"} if self.num_reused else {}
        )
        lines |= {
            "tokens": tokens + (f"; {count(self.num_duplicates, 'duplicate')} not sent" if self.num_duplicates else "")
        }
        if self.num_long or self.num_rejects:
            lines["texts"] = f"{count(self.num_long, 'text')} too long, {count(self.num_rejects, 'row')} to reject"
        asked = [count(self.num_requests, "request")]
        if self.cost is not None:
            asked.append(dollars(self.cost))
        if self.seconds is not None:
            asked.append(f"{duration(self.seconds)} at the limits given")
        return lines | {"provider": ", ".join(asked)}


@dataclass(frozen=True, slots=True)
class ProviderUse(Result):
    """What a provider was asked, and what it took."""

    num_requests: int
    num_refusals: int
    """Requests to which the provider asked to wait."""
    num_retries: int
    """Requests that were sent again since they had failed."""
    num_duplicates: int
    """Texts that were not sent, since others of their shard are the same."""
    num_long: int
    """Texts that were cut, or embedded in chunks."""
    cost: float | None
    """Dollars; None if nobody knows the price."""
    tokens_per_minute: float | None = None
    """After the first shard."""
    tokens_per_minute_limit: float | None = None
    requests_per_minute_limit: float | None = None
    tokens_at_risk: int | None = None
    """That a crash would have made to be paid again, at most: of the parcels in flight."""
    cost_at_risk: float | None = None

    def lines(self) -> dict[str, str]:
        """Say what a provider was asked, what it took, and what a crash would have lost."""
        lines = {
            "provider": f"{count(self.num_requests, 'request')}, {count(self.num_refusals, 'refusal')}, "
            f"{retries(self.num_retries)}{f', {dollars(self.cost)}' if self.cost is not None else ''}"
        }
        if self.tokens_per_minute is not None:
            limit = "no limit known"
            if self.tokens_per_minute_limit:
                share = self.tokens_per_minute / self.tokens_per_minute_limit
                limit = f"{share:.0%} of the {self.tokens_per_minute_limit:,.0f} that are allowed"
            elif self.requests_per_minute_limit:
                limit = f"{self.requests_per_minute_limit:,.0f} requests are allowed"
            lines["rate"] = f"{self.tokens_per_minute:,.0f} tokens/min, {limit}"
        if self.num_duplicates or self.num_long:
            lines["texts"] = (
                f"{count(self.num_duplicates, 'duplicate')} not sent, {count(self.num_long, 'long text')} cut"
            )
        if self.tokens_at_risk:
            cost = f" ({dollars(self.cost_at_risk)})" if self.cost_at_risk is not None else ""
            lines["risk"] = f"a crash would have lost {count(self.tokens_at_risk, 'token')}{cost} at most"
        return lines
