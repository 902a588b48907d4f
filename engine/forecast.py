"""The forecast: what the texts that are left to do will cost at a provider, counted before any is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.former_vectors import FormerVectors
from engine.models import registry
from engine.models.api.budget import Budget
from engine.models.api.limits import MINUTE_S, Limits
from engine.models.api.model import ApiEmbeddingModel
from engine.models.api.prices import dollars, price_of
from engine.models.api.rate import PACE
from engine.models.api.tokens import weight
from engine.planning import parcels
from engine.provider_use import Forecast
from engine.sources import texts as text_checks
from engine.sources.formats import read_shards
from engine.sources.rows import Selection
from engine.text_hashes import numbers_of, text_hashes

if TYPE_CHECKING:
    from engine.config import JobConfig
    from engine.planning import Plan
    from engine.reuse import ReuseIndex
    from engine.schema import Shard

SAMPLE_BYTES = 2_000_000_000
"""Of text that is read at most: about a minute and a half on one core. Of more, shards are drawn evenly."""


def forecast(config: JobConfig, plan: Plan, index: Callable[[], ReuseIndex | None]) -> Forecast | None:
    """
    Count what a run would send; None if the model is not behind an API.

    Reads the pending texts, up to `SAMPLE_BYTES` of them. Duplicates, long texts, and those that have a vector already are found as a
    run finds them.

    Args:
        config: Of the job.
        plan: What is left to do.
        index: Builds the index of the vectors that a run would reuse; called if it is needed.
    """
    model = registry.model_class(config)
    if not issubclass(model, ApiEmbeddingModel):
        return None
    terms = model.terms_of(config)
    limits = Limits(config.requests_per_minute, config.tokens_per_minute)
    groups = list(parcels(plan.pending, plan.shard_rows))
    every = -(-plan.pending_bytes // SAMPLE_BYTES) or 1
    sample = groups[::every]
    request = _Request(
        min(config.batch_size or terms.max_inputs, terms.max_inputs),
        min(terms.max_request_tokens, Budget(limits).request_tokens if limits.is_known else float("inf")),
    )
    found = _Found()
    former = FormerVectors(reused) if sample and (reused := index()) else None
    for texts, num_rejects in _texts(config, sample):
        new = texts if former is None else _unknown(texts, former)
        found.num_reused += len(texts) - len(new)
        numbers, pieces, _ = terms.prepared(new, config.prompt or "", config.long_texts)
        found.num_rejects += num_rejects
        found.num_texts += len(pieces)
        found.num_duplicates += len(numbers) - len(pieces)
        for text, sent in pieces.items():
            found.num_long += not sent or sent[0][0] != (config.prompt or "") + text
            for piece, num_tokens in sent or ():
                found.num_tokens += num_tokens
                request.add(weight(piece, num_tokens))
    scale = len(plan.pending) / max(sum(map(len, sample)), 1)
    num_tokens = round(found.num_tokens * scale)
    num_requests = round(request.num_full * scale) + bool(request.num_inputs)
    price = price_of(config)
    return Forecast(
        num_texts=round(found.num_texts * scale),
        num_duplicates=round(found.num_duplicates * scale),
        num_rejects=round(found.num_rejects * scale),
        num_long=round(found.num_long * scale),
        num_tokens=num_tokens,
        is_exact=terms.counter.is_exact and every == 1,
        num_requests=num_requests,
        cost=None if price is None else round(dollars(num_tokens, price), 6),
        seconds=_seconds(limits, num_tokens, num_requests),
        num_reused=round(found.num_reused * scale),
    )


@dataclass(slots=True)
class _Found:
    num_texts: int = 0
    num_duplicates: int = 0
    num_rejects: int = 0
    num_long: int = 0
    num_tokens: int = 0
    num_reused: int = 0


@dataclass(slots=True)
class _Request:
    """The request that is being filled."""

    max_inputs: int
    max_weight: float
    num_full: int = 0
    num_inputs: int = 0
    weight: float = 0.0

    def add(self, piece: int) -> None:
        if self.num_inputs and (self.num_inputs >= self.max_inputs or self.weight + piece > self.max_weight):
            self.num_full += 1
            self.num_inputs, self.weight = 0, 0.0
        self.num_inputs += 1
        self.weight += piece


def _unknown(texts: list[str], former: FormerVectors) -> list[str]:
    """Return the texts that have no vector yet."""
    is_known = former.knows(numbers_of(text_hashes(texts)))
    return [text for text, is_there in zip(texts, is_known.tolist(), strict=True) if not is_there]


def _texts(config: JobConfig, groups: Sequence[Sequence[Shard]]) -> Iterator[tuple[list[str], int]]:
    """Yield the texts of each group, and how many rows of it have none that can be embedded; each file is read once."""
    rows = read_shards((shard for group in groups for shard in group), replace(Selection.of(config), kept=()))
    for group in groups:
        texts: list[str] = []
        num_rejects = 0
        for _ in group:
            found, _, reasons = text_checks.texts_in(next(rows))
            texts += found
            num_rejects += len(reasons)
        yield texts, num_rejects


def _seconds(limits: Limits, num_tokens: int, num_requests: int) -> float | None:
    pairs = ((limits.tokens, num_tokens), (limits.requests, num_requests))
    known = [amount / limit for limit, amount in pairs if limit]
    return round(max(known) * MINUTE_S / PACE, 1) if known else None
