"""Where an output stands, by its records."""

from __future__ import annotations

from collections import Counter

from engine.calibration import stored_calibration
from engine.costs import Costs
from engine.errors import EngineError
from engine.provider_use import ProviderUse
from engine.results import StatusResult
from engine.survey import resurvey
from engine.tally import ASKED


def status(output: str) -> StatusResult:
    """Say where an output stands, by its records; and what is pending, if its source can be read from here."""
    ledger, job, standing, problem = resurvey(output)
    reasons: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    embed_s, dimension = 0.0, 0
    costs = Costs(ledger)
    for record in ledger.records():
        totals["shards"] += 1
        totals["rows"] += record.num_rows
        totals["rejects"] += record.num_rejects
        totals["tokens"] += record.usage.num_tokens
        totals["lost"] += record.usage.num_lost_tokens
        totals["vectors"] += record.num_vectors
        totals["bytes"] += record.num_bytes
        totals["repeated_ids"] += record.usage.num_repeated_ids
        totals["reused"] += record.usage.num_reused
        reasons.update(record.reasons)
        totals.update({name: getattr(record.usage, name) for name in ASKED})
        costs.add(record)
        embed_s += record.usage.embed_s
        dimension = record.dimension
    if (sampled := stored_calibration(ledger.storage)) and sampled.usage:
        totals.update({name: getattr(sampled.usage, name) for name in ASKED})
    cost = costs.total()
    was_asked = totals["num_requests"] or cost
    return StatusResult(
        output=ledger.root,
        model=str(job.config.get("model")),
        fingerprint=job.fingerprint,
        created_at=job.created_at,
        num_shards=totals["shards"],
        num_rows=totals["rows"],
        num_rejects=totals["rejects"],
        reasons=dict(reasons.most_common()),
        num_tokens=totals["tokens"],
        num_bytes=totals["bytes"],
        dimension=dimension,
        embed_s=round(embed_s, 3),
        pending_shards=len(standing.plan.pending) if standing else None,
        pending_rows=standing.plan.pending_rows if standing else None,
        warnings=standing.told if standing else [untold(problem)],
        provider=ProviderUse(**{name: totals[name] for name in ASKED}, cost=cost) if was_asked else None,
        output_dtype=str(job.config.get("output_dtype", "float32")),
        num_repeated_ids=totals["repeated_ids"],
        num_reused=totals["reused"],
        num_vectors=totals["vectors"],
        num_duplicates=totals["num_duplicates"],
        num_long=totals["num_long"],
        num_lost_tokens=totals["lost"],
    )


def untold(problem: EngineError | None) -> str:
    """Say why what is left to do cannot be told."""
    return f"what is left to do cannot be told: {problem.message if problem else ''}"
