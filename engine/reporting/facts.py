"""The facts: what the records, the rejects and the run records of an output say. All are streamed, and only sums are kept."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from engine.commits import OTHER_REASONS, Receipt, idle_share, padding_share
from engine.costs import Costs
from engine.errors import CorruptOutput, EngineError
from engine.history import last_runs
from engine.ledger import REJECTS
from engine.reporting.timeline import Timeline
from engine.tally import Tally

if TYPE_CHECKING:
    from engine.commits import CommitRecord
    from engine.ledger import Ledger

SAMPLED_PARTS = 64
"""That vectors are sampled from."""
REJECT_FILES = 200
REJECT_LINES = 10_000
"""Of one file that are read for examples."""
EXAMPLES = 5
"""Of each reason that are shown."""
STEPS = 4
"""Bins to each doubling of a length."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row that was rejected."""

    path: str
    """Of the input file, below the source's folder; empty if its record is gone."""
    source_row: int
    id: str


@dataclass(slots=True)
class Facts:
    """What the records of an output add up to."""

    tally: Tally = field(default_factory=Tally)
    timeline: Timeline = field(default_factory=Timeline)
    num_bytes: int = 0
    dimension: int = 0
    embed_s: float = 0.0
    cost: float | None = None
    """Dollars of all runs together, for what is no more too; None if nobody knows the price."""
    tokens_a_row: Counter[int] = field(default_factory=Counter)
    """Rows by `bin_of` the mean tokens a row of their shard."""
    parts: list[tuple[str, int]] = field(default_factory=list)
    """Shard ids, and rows, of up to `SAMPLED_PARTS` parts with rows. Ids are hashes: the smallest are a fair sample, always the same."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    """The last first."""
    num_unreadable_runs: int = 0

    @property
    def padding_share(self) -> float | None:
        """Of the tokens that devices computed, those that were padding."""
        return padding_share(self.tally.known_tokens, self.tally.padded_tokens)

    @property
    def idle_share(self) -> float | None:
        """Of the devices' time, that in which they waited."""
        return idle_share(self.tally.busy_s, self.tally.held_s)

    @property
    def tokens_per_minute_limit(self) -> float | None:
        """The provider's, as the last run knew it that knew one."""
        providers = ((run.get("result") or {}).get("provider") for run in self.runs)
        limits = (use.get("tokens_per_minute_limit") for use in providers if isinstance(use, dict))
        return next((float(limit) for limit in limits if isinstance(limit, (int, float)) and limit > 0), None)

    def add(self, record: CommitRecord) -> None:
        """Count one record. Records come in the order of their ids."""
        usage = record.usage
        self.tally.add(Receipt.of(record, "committed"))
        self.timeline.add(usage.created_at, usage.embed_s, record.num_rows, usage.num_tokens)
        self.num_bytes += record.num_bytes
        self.embed_s += usage.embed_s
        self.dimension = record.dimension or self.dimension
        if record.num_rows and usage.num_tokens:
            self.tokens_a_row[bin_of(usage.num_tokens / record.num_rows)] += record.num_rows
        if record.num_rows and len(self.parts) < SAMPLED_PARTS:
            self.parts.append((record.shard_id, record.num_vectors))


def facts_of(ledger: Ledger) -> Facts:
    """
    Read all records of an output, some of its rejects, and the records of its runs.

    Raises:
        CorruptOutput: If a commit record cannot be read.
    """
    facts, costs = Facts(), Costs(ledger)
    for record in ledger.records():
        facts.add(record)
        costs.add(record)
    facts.cost = costs.total()
    if facts.tally.num_rejects:
        facts.examples = _examples(ledger)
    facts.runs, facts.num_unreadable_runs = last_runs(ledger.storage)
    return facts


def bin_of(length: float) -> int:
    """Return the bin of a length: bins are a quarter of a doubling wide, and `2 ** (bin / STEPS)` is where one begins."""
    return math.floor(math.log2(max(length, 1)) * STEPS + 1e-9)


def _examples(ledger: Ledger) -> dict[str, list[Example]]:
    """Find a few rows for each reason, in a bounded number of rejects files."""
    found: dict[str, list[Example]] = {}
    names = ledger.storage.names(REJECTS)
    for name in heapq.nsmallest(REJECT_FILES, (name for name in names if name.endswith(".jsonl"))):
        path = _path_of(ledger, name.removesuffix(".jsonl"))
        try:
            with ledger.storage.open(f"{REJECTS}/{name}") as file:
                for line in islice(file, REJECT_LINES):
                    reject = json.loads(line)
                    some = found.setdefault(str(reject["reason"]), []) if len(found) < 100 else []
                    if len(some) < EXAMPLES:
                        some.append(Example(path, int(reject["source_row"]), str(reject["id"])[:200]))
        except (EngineError, OSError, ValueError, TypeError, KeyError):
            continue  # `verify` says what is wrong with it; here it is one example less
    return found


def _path_of(ledger: Ledger, shard_id: str) -> str:
    try:
        return ledger.record(shard_id).path
    except CorruptOutput:
        return ""


def reasons_of(facts: Facts) -> list[tuple[str, int, list[Example]]]:
    """Return each reason with its number of rows and a few of them, the most frequent first."""
    named = set(facts.tally.reasons)
    others = [example for reason, some in facts.examples.items() if reason not in named for example in some]
    return [
        (reason, count, facts.examples.get(reason, others[:EXAMPLES] if reason == OTHER_REASONS else []))
        for reason, count in facts.tally.reasons.most_common()
    ]
