"""What the faces return: plain data, that prints well and becomes JSON as it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


class Result:
    """Gives every result the one form in which `--json` prints it."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)  # type: ignore[call-overload,no-any-return] # every subclass is a dataclass


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


@dataclass(frozen=True, slots=True)
class PlanResult(Result):
    """What a run would do. Nothing was written for it, and no model loaded."""

    output: str
    model: str
    fingerprint: str
    num_files: int
    num_rows: int
    num_bytes: int
    """Text, decoded."""
    num_shards: int
    shard_rows: int
    done_shards: int
    done_rows: int
    pending_files: int
    pending_shards: int
    pending_rows: int
    pending_bytes: int
    warnings: list[str] = field(default_factory=list)
    forecast: Forecast | None = None
    """Of what a provider will be asked for; None for models that run here."""


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
    """That a crash would have made to be paid again, at most: of the shards in flight."""
    cost_at_risk: float | None = None


@dataclass(frozen=True, slots=True)
class RunResult(Result):
    """What a run did, and what is left."""

    output: str
    model: str
    num_rows: int
    """Rows that got a vector in this run."""
    num_rejects: int
    reasons: dict[str, int]
    """How many rows this run rejected for each reason."""
    num_tokens: int
    num_shards: int
    done_before_rows: int
    """Rows that former runs had committed, the rejected among them."""
    pending_rows: int
    """Rows that are left: 0 unless the run was interrupted."""
    seconds: float
    """From the call to the last receipt."""
    start_s: float
    """Of those, until the first shard was committed: starting Ray, loading the model, embedding one shard."""
    rows_per_s: float
    """After the first shard; of the whole run if there was only one."""
    num_actors: int
    device: str
    backend: str
    """What ran the model on the device."""
    padding_share: float | None
    """Of the tokens that devices computed, those that were padding; None if the model does not say."""
    device_idle_share: float | None
    """Of the devices' time after the first batch, that in which they waited; None if the model does not say."""
    interrupted: bool = False
    stopped: str = ""
    """Why the run ended before all was done, if it was no error: its money was spent."""
    total_rejects: int | None = None
    """Rejects of all runs, counted only if `max_rejects` was given."""
    provider: ProviderUse | None = None
    """What a provider was asked; None for models that run here."""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StatusResult(Result):
    """Where an output stands, by its records."""

    output: str
    model: str
    fingerprint: str
    created_at: str
    num_shards: int
    num_rows: int
    num_rejects: int
    reasons: dict[str, int]
    num_tokens: int
    num_bytes: int
    """Of all parts."""
    dimension: int
    embed_s: float
    """Seconds of model time, added up over actors."""
    pending_shards: int | None
    """None if the source cannot be read from here."""
    pending_rows: int | None
    warnings: list[str] = field(default_factory=list)
    provider: ProviderUse | None = None
    """What a provider was asked in all runs; None for models that run here."""


@dataclass(frozen=True, slots=True)
class Finding(Result):
    """One thing that verification found wrong."""

    shard_id: str
    problem: str
    advice: str


@dataclass(frozen=True, slots=True)
class VerifyResult(Result):
    """What verification looked at, and what it found."""

    output: str
    level: str
    num_shards: int
    num_rows: int
    num_rejects: int
    pending_rows: int | None
    findings: list[Finding]
    set_aside: list[str] = field(default_factory=list)
    """Files that were moved away, because it was asked for."""
    lowest_cosine: float | None = None
    """Of vectors made again, at level `sample`."""
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON types, and `ok`."""
        return asdict(self) | {"ok": self.ok}


@dataclass(frozen=True, slots=True)
class RunPlanned:
    """Event: it is known what is left to do; Ray is joined or started next."""

    pending_rows: int
    pending_shards: int
    num_rows: int
    output: str


@dataclass(frozen=True, slots=True)
class PoolStarted:
    """Event: the actors begin to load the model."""

    num_actors: int
    device: str


@dataclass(frozen=True, slots=True)
class ShardDone:
    """Event: a shard is committed."""

    num_rows: int
    num_rejects: int
    num_tokens: int
    num_bytes: int
