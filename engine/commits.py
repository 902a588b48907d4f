"""What is recorded of a shard: what it cost, that it is committed, and what became of it in a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from engine.errors import CorruptOutput
from engine.schema import Reject, Shard, canonical_json

MAX_REASONS = 20
"""That a record tells apart."""
OTHER_REASONS = "other reasons"
LEFT = "left"
"""Outcome of a shard that was not embedded, since the run is ending."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a shard cost the model. It travels in the part, and is the same for whoever reads it."""

    num_tokens: int = 0
    num_padded_tokens: int = 0
    """With padding: what the device computed; 0 if the model does not say."""
    embed_s: float = 0.0
    """Seconds for which the actor's device was this shard's: since the shard before it, or since its own start."""
    busy_s: float = 0.0
    """Of these, the seconds in which the device computed; 0 if the model does not say."""
    num_requests: int = 0
    """To a provider, that the shard's first text began, or that it shared."""
    num_refusals: int = 0
    num_retries: int = 0
    num_duplicates: int = 0
    """Texts that did not go through the model, since others of the shard are the same."""
    num_long: int = 0
    """Texts that were cut, or embedded in chunks."""
    num_repeated_ids: int = 0
    """Rows whose id another row of the shard has before them."""
    num_reused: int = 0
    """Rows whose vector was taken from another part: their texts are the same."""
    num_lost_tokens: int = 0
    """Of the texts that were cut: tokens that are not in their vectors. Those of very long texts are estimated; 0 for APIs."""
    num_vectors: int = 0
    """Of a shard with a row for each chunk of a text: its rows in the part; 0 where each text has one."""
    cost: float | None = None
    """Dollars; None if nobody knows the price."""
    device: str = ""
    backend: str = ""
    """What ran the model there."""
    slug: str = ""
    """Of a custom model, whose class and arguments may not tell all that decides its vectors."""
    created_at: str = ""


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """
    What became of one shard. It is a pure function of the part's bytes.

    So whoever publishes a shard, or adopts a part that has no record yet, writes the same bytes; a record that differs
    is a conflict, never a matter of timing.
    """

    shard_id: str
    fingerprint: str
    path: str
    size: int
    version: str
    start: int
    stop: int
    num_rows: int
    """Of the source, that have a vector, or several: see `num_vectors`."""
    num_rejects: int
    reasons: dict[str, int]
    dimension: int
    num_bytes: int
    checksum: str
    usage: Usage

    @property
    def num_vectors(self) -> int:
        """Rows of the part: more than `num_rows` where each chunk of a text has one."""
        return self.usage.num_vectors or self.num_rows

    def to_bytes(self) -> bytes:
        """Return the record as it is stored."""
        return (canonical_json(asdict(self)) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> CommitRecord:
        """
        Read what `to_bytes` wrote.

        Raises:
            CorruptOutput: If it is not that; `name` says which file.
        """
        try:
            fields = json.loads(data)
            return cls(**fields | {"usage": Usage(**fields["usage"])})
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptOutput(
                f"the commit record {name} cannot be read ({type(error).__name__}); "
                "`engine verify OUT --set-aside` moves it away, and the next run makes its shard again"
            ) from None


@dataclass(frozen=True, slots=True)
class Receipt:
    """One row that says what became of a shard in this run; the driver sees nothing else of it."""

    shard_id: str
    num_rows: int
    num_rejects: int
    num_tokens: int
    num_padded_tokens: int
    embed_s: float
    busy_s: float
    num_bytes: int
    outcome: str
    """`committed` by this run, `adopted` from a part that had no record, `present`: another run was first; or `left`: the run is
    ending, and the shard was not embedded."""
    reasons: str
    """JSON: how many rows were rejected for each reason."""
    device: str
    backend: str
    num_requests: int = 0
    num_refusals: int = 0
    num_retries: int = 0
    num_duplicates: int = 0
    num_long: int = 0
    cost: float | None = None
    """Dollars; None if nobody knows the price."""
    num_repeated_ids: int = 0
    num_reused: int = 0
    num_lost_tokens: int = 0
    num_vectors: int = 0
    """Rows of the part."""

    @classmethod
    def of(cls, record: CommitRecord, outcome: str) -> Receipt:
        """Make the receipt for a shard whose record is stored."""
        return cls(
            shard_id=record.shard_id,
            num_rows=record.num_rows,
            num_rejects=record.num_rejects,
            num_tokens=record.usage.num_tokens,
            num_padded_tokens=record.usage.num_padded_tokens,
            embed_s=record.usage.embed_s,
            busy_s=record.usage.busy_s,
            num_bytes=record.num_bytes,
            outcome=outcome,
            reasons=canonical_json(record.reasons),
            device=record.usage.device,
            backend=record.usage.backend,
            num_requests=record.usage.num_requests,
            num_refusals=record.usage.num_refusals,
            num_retries=record.usage.num_retries,
            num_duplicates=record.usage.num_duplicates,
            num_long=record.usage.num_long,
            cost=record.usage.cost,
            num_repeated_ids=record.usage.num_repeated_ids,
            num_reused=record.usage.num_reused,
            num_lost_tokens=record.usage.num_lost_tokens,
            num_vectors=record.num_vectors,
        )

    @classmethod
    def left(cls, shard: Shard) -> Receipt:
        """Make the receipt for a shard that was not embedded."""
        return cls(shard.id, 0, 0, 0, 0, 0.0, 0.0, 0, LEFT, "{}", "", "")

    @property
    def padding_share(self) -> float | None:
        """Of the tokens that the device computed, those that were padding; None if the model does not say."""
        return padding_share(self.num_tokens, self.num_padded_tokens)

    @property
    def device_idle_share(self) -> float | None:
        """Of the time that the device was this shard's, that in which it waited; None if the model does not say."""
        return idle_share(self.busy_s, self.embed_s)


def padding_share(num_tokens: int, num_padded_tokens: int) -> float | None:
    """Return which share of the tokens that a device computed was padding; None if it is not known."""
    return round(1 - num_tokens / num_padded_tokens, 4) if num_padded_tokens else None


def idle_share(busy_s: float, embed_s: float) -> float | None:
    """Return for which share of its time a device waited; None if it is not known."""
    return round(max(1 - busy_s / embed_s, 0.0), 4) if busy_s and embed_s else None


def count_reasons(rejects: Iterable[Reject]) -> dict[str, int]:
    """Count rejects by reason, the most frequent first; rare ones are added up, since providers may word each anew."""
    counts = Counter(reject.reason for reject in rejects).most_common()
    rare = sum(count for _, count in counts[MAX_REASONS:])
    return dict(counts[:MAX_REASONS]) | ({OTHER_REASONS: rare} if rare else {})
