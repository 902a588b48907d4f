"""What the faces return: plain data, that prints well and becomes JSON as it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from engine.wording import count, dollars, duration, rejects, retries, size


class Result:
    """Gives every result the forms in which it is shown: `--json`, a few aligned lines, a table in a notebook."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)  # type: ignore[call-overload,no-any-return] # every subclass is a dataclass

    def lines(self) -> dict[str, str]:
        """Return what a person reads of it, by label, the most wanted first."""
        return {name: str(value) for name, value in self.as_json().items()}

    def _repr_html_(self) -> str:
        """Show the lines as a table: notebooks call this."""
        rows = [
            f"<tr><th style='text-align:left'>{escape(label)}</th><td style='text-align:left'>{escape(text)}</td></tr>"
            for label, text in self.lines().items()
        ]
        notes = [f"<div>warning: {escape(text)}</div>" for text in getattr(self, "warnings", [])]
        notes += [f"<div>problem: {escape(found.problem)}</div>" for found in getattr(self, "findings", [])]
        return f"<table>{''.join(rows)}</table>{''.join(notes)}"


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

    def lines(self) -> dict[str, str]:
        """Say what a provider will be asked for, and what it will take."""
        kind = "" if self.is_exact else ", by an estimate"
        tokens = f"{count(self.num_tokens, 'token')}{kind} in {count(self.num_texts, 'text')}"
        lines = {
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

    def lines(self) -> dict[str, str]:
        """Say what a run would do."""
        left = "nothing"
        if self.pending_shards:
            left = (
                f"{count(self.pending_rows, 'row')} in {count(self.pending_shards, 'shard')} of "
                f"{count(self.pending_files, 'file')}, about {size(self.pending_bytes)} of text"
            )
        return {
            "to do": left,
            "done": f"{self.done_rows:,} of {count(self.num_rows, 'row')}, {self.done_shards:,} of {count(self.num_shards, 'shard')}",
            "source": f"{count(self.num_files, 'file')}, cut into shards of about {count(self.shard_rows, 'row')}",
            **(self.forecast.lines() if self.forecast else {}),
            "model": self.model,
            "output": self.output,
        }


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

    def lines(self) -> dict[str, str]:
        """Say what a run did, and what is left."""
        lines = {}
        if self.num_shards:
            tokens = f", {count(self.num_tokens, 'token')}" if self.num_tokens else ""
            lines["embedded"] = f"{count(self.num_rows, 'row')}{tokens} in {count(self.num_shards, 'shard')}"
            lines["rejected"] = rejects(self.num_rejects, self.reasons)
            lines["speed"] = (
                f"{self.rows_per_s:,.1f} rows/s on {self.num_actors} x {self.device or 'custom model'}"
                f"{f' with {self.backend}' if self.backend else ''}; "
                f"{duration(self.seconds)} in all, {duration(self.start_s)} of them to the first shard"
            )
            if self.device_idle_share is not None:
                padding = "" if self.padding_share is None else f", {self.padding_share:.1%} of its work was padding"
                lines["device"] = f"waited {self.device_idle_share:.1%} of the time{padding}"
        if self.provider is not None:
            lines |= self.provider.lines()
        if self.done_before_rows:
            lines["before"] = f"{count(self.done_before_rows, 'row')} were done already"
        lines["left"] = count(self.pending_rows, "row") if self.pending_rows else "nothing"
        lines["output"] = f"{self.output}/data/*.parquet"
        return lines


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

    def lines(self) -> dict[str, str]:
        """Say where an output stands."""
        left = "cannot be told" if self.pending_rows is None else "nothing"
        if self.pending_rows:
            left = f"{count(self.pending_rows, 'row')} in {count(self.pending_shards or 0, 'shard')}"
        return {
            "left": left,
            "embedded": f"{count(self.num_rows, 'row')} in {count(self.num_shards, 'shard')}",
            "rejected": rejects(self.num_rejects, self.reasons),
            "vectors": f"{self.dimension} dimensions, {size(self.num_bytes)}",
            "took": f"{count(self.num_tokens, 'token')}, {duration(self.embed_s)} of model time",
            **(self.provider.lines() if self.provider else {}),
            "model": self.model,
            "output": f"{self.output}, begun {self.created_at}",
        }


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

    def lines(self) -> dict[str, str]:
        """Say whether an output is right, and what is wrong with it and what to do."""
        verdict = "good" if self.ok else f"{count(len(self.findings), 'problem')} found"
        lines = {
            "verdict": f"{verdict}, at level {self.level}",
            "looked at": f"{count(self.num_rows, 'row')} and {count(self.num_rejects, 'reject')} in {count(self.num_shards, 'shard')}",
        }
        if self.lowest_cosine is not None:
            lines["again"] = f"lowest cosine of vectors made again: {self.lowest_cosine:.6f}"
        if self.set_aside:
            lines["moved"] = f"{count(len(self.set_aside), 'file')} to {self.output}/_engine/set-aside"
        return lines
