"""Manners: how requests to a provider are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.model_config import LongTexts
    from engine.models.api.tokens import Counter


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
