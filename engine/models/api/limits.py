"""A provider's limits: what its headers tell of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MINUTE_S = 60.0
LONGEST_PERIOD_S = 600.0
"""Of a limit that is taken for one per minute. Free tiers have limits per day too, which cannot be paced: they are met when they are."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be asked of a provider in a minute; None where that is not known."""

    requests: float | None = None
    tokens: float | None = None

    @property
    def is_known(self) -> bool:
        """At least one of them is."""
        return self.requests is not None or self.tokens is not None

    def over(self, others: Limits) -> Limits:
        """Return these, and `others` where these are not known."""
        return Limits(
            others.requests if self.requests is None else self.requests,
            others.tokens if self.tokens is None else self.tokens,
        )


def limits_of(headers: Mapping[str, str]) -> Limits | None:
    """Return what OpenAI's `x-ratelimit-*` headers say (Azure's and many servers' too); None if they say nothing."""
    found = Limits(_limit(headers, "requests"), _limit(headers, "tokens"))
    return found if found.is_known else None


def seconds_of(duration: str) -> float | None:
    """Return the seconds of a duration as Go writes it, such as 6m0s, 1.5s or 120ms; None if it is not one."""
    parts = _DURATION.findall(duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration.strip():
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _limit(headers: Mapping[str, str], of: str) -> float | None:
    """Return a limit per minute. How long it takes to refill what was used tells one per minute from one per day."""
    limit = _number(headers.get(f"x-ratelimit-limit-{of}"))
    if not limit:
        return None
    remaining = _number(headers.get(f"x-ratelimit-remaining-{of}"))
    reset_s = seconds_of(headers.get(f"x-ratelimit-reset-{of}", ""))
    if remaining is None or reset_s is None or remaining >= limit:
        return limit
    return limit if reset_s * limit / (limit - remaining) <= LONGEST_PERIOD_S else None


def _number(value: str | None) -> float | None:
    try:
        return float(value) if value is not None else None
    except ValueError:
        return None
