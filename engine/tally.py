"""The tally: what has become of a run so far, counted receipt by receipt."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.commits import OTHER_REASONS, idle_share, padding_share
from engine.models.api.limits import Limits
from engine.provider_use import ProviderUse
from engine.results import RunResult

if TYPE_CHECKING:
    from engine.commits import Receipt, Usage
    from engine.survey import Survey


SAME_PARCEL_S = 0.05
"""Receipts this close came in one parcel."""
MAX_REASONS = 100
ASKED = ("num_requests", "num_refusals", "num_retries", "num_duplicates", "num_long")
"""What is counted of a provider; the last two of local models too."""


@dataclass(slots=True)
class Tally:
    """What has become of a run so far. The driver holds this, and never a vector."""

    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    first_rows: int = 0
    num_rows: int = 0
    num_rejects: int = 0
    num_tokens: int = 0
    num_lost_tokens: int = 0
    num_vectors: int = 0
    num_shards: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    devices: set[str] = field(default_factory=set)
    backends: set[str] = field(default_factory=set)
    known_tokens: int = 0
    """Of shards whose padding is known."""
    padded_tokens: int = 0
    held_s: float = 0.0
    """Of shards of which it is known how long their device was busy."""
    busy_s: float = 0.0
    done_before_rows: int = 0
    num_actors: int = 0
    interrupted: bool = False
    stopped: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    """Of a provider: requests, refusals, retries; of any model: duplicates, long texts."""
    cost: float | None = None
    limits: Limits = field(default_factory=Limits)
    num_repeated_ids: int = 0
    """Rows whose id another row of their shard has before them."""
    num_reused: int = 0
    """Rows whose vector was taken from another part."""
    rows_at_risk: int = 0
    """In flight at once, at most: what a crash would have lost."""
    num_changed_inputs: int = 0

    def add(self, receipt: Receipt) -> None:
        """Count one shard."""
        self.num_rows += receipt.num_rows
        self.num_rejects += receipt.num_rejects
        self.num_tokens += receipt.num_tokens
        self.num_lost_tokens += receipt.num_lost_tokens
        self.num_vectors += receipt.num_vectors
        self.num_shards += 1
        self.num_repeated_ids += receipt.num_repeated_ids
        self.num_reused += receipt.num_reused
        for reason, count in json.loads(receipt.reasons).items():
            is_known = reason in self.reasons or len(self.reasons) < MAX_REASONS
            self.reasons[reason if is_known else OTHER_REASONS] += count
        self.add_use(receipt)
        self.devices.add(receipt.device)
        self.backends.add(receipt.backend)
        if receipt.padding_share is not None:
            self.known_tokens += receipt.num_tokens
            self.padded_tokens += receipt.num_padded_tokens
        if receipt.device_idle_share is not None:
            self.held_s += receipt.embed_s
            self.busy_s += receipt.busy_s

    def add_use(self, used: Receipt | Usage) -> None:
        """Count what a provider was asked, for a shard or for a sample of the job."""
        for name in ASKED:
            self.asked[name] += getattr(used, name)
        if used.cost is not None:
            self.cost = (self.cost or 0.0) + used.cost

    def add_streamed(self, receipt: Receipt) -> None:
        """Count one shard that Ray brought, and the time."""
        self.add(receipt)
        self.last = time.perf_counter()
        if self.first is None:
            self.first = self.last
        if self.last - self.first < SAME_PARCEL_S:
            self.first_rows = self.num_rows

    @property
    def rows_per_s(self) -> float:
        """Rows per second after the first shard, which carries the cold start; of the whole if there is only one."""
        if self.first is None or self.last is None:
            return 0.0
        if self.num_rows > self.first_rows:
            return (self.num_rows - self.first_rows) / (self.last - self.first)
        return self.first_rows / max(self.last - self.started, 1e-9)

    def result(self, asked: Survey) -> RunResult:
        """Sum up a run of what was asked for."""
        config = asked.config
        total_rejects = None
        if config.max_rejects is not None:
            total_rejects = sum(record.num_rejects for record in asked.ledger.records())
        end = self.last or time.perf_counter()
        num_done = self.done_before_rows + self.num_rows + self.num_rejects
        return RunResult(
            output=asked.ledger.root,
            model=config.model,
            num_rows=self.num_rows,
            num_rejects=self.num_rejects,
            reasons=dict(self.reasons.most_common()),
            num_tokens=self.num_tokens,
            num_shards=self.num_shards,
            done_before_rows=self.done_before_rows,
            pending_rows=max(asked.standing.plan.num_rows - num_done, 0),
            seconds=round(end - self.started, 3),
            start_s=round((self.first or end) - self.started, 3),
            rows_per_s=round(self.rows_per_s, 3),
            num_actors=self.num_actors,
            device=", ".join(sorted(self.devices - {""})),
            backend=", ".join(sorted(self.backends - {""})),
            padding_share=padding_share(self.known_tokens, self.padded_tokens),
            device_idle_share=idle_share(self.busy_s, self.held_s),
            interrupted=self.interrupted,
            stopped=self.stopped,
            total_rejects=total_rejects,
            num_changed_inputs=self.num_changed_inputs,
            provider=self._provider_use(),
            num_repeated_ids=self.num_repeated_ids,
            num_reused=self.num_reused,
            num_vectors=self.num_vectors,
            num_duplicates=self.asked["num_duplicates"],
            num_long=self.asked["num_long"],
            num_lost_tokens=self.num_lost_tokens,
            warnings=list(asked.standing.warnings) if self.num_changed_inputs else asked.standing.told,
        )

    def _provider_use(self) -> ProviderUse | None:
        if not self.asked["num_requests"]:
            return None
        a_row = self.num_tokens / max(self.num_rows, 1)
        num_all = self.num_rows + self.num_rejects
        at_risk = round(self.num_tokens * min(self.rows_at_risk / max(num_all, 1), 1.0))
        return ProviderUse(
            **{name: self.asked[name] for name in ASKED},
            cost=self.cost,
            tokens_per_minute=round(self.rows_per_s * a_row * 60, 1),
            tokens_per_minute_limit=self.limits.tokens,
            requests_per_minute_limit=self.limits.requests,
            tokens_at_risk=at_risk,
            cost_at_risk=None if self.cost is None else round(self.cost * at_risk / max(self.num_tokens, 1), 6),
        )
