"""What the faces return: plain data, that prints well and becomes JSON as it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from engine.provider_use import Forecast, ProviderUse
from engine.result import Result
from engine.wording import count, duration, rejects, repeated_ids, reused, size


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
    output_dtype: str = "float32"
    """What vectors are stored as."""

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
            **({} if self.output_dtype == "float32" else {"vectors": f"stored as {self.output_dtype}"}),
            "model": self.model,
            "output": self.output,
        }


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
    num_repeated_ids: int = 0
    """Rows of this run whose id another row of their shard has before them: they are kept."""
    num_changed_inputs: int = 0
    """Whose new rows took the place of the former ones."""
    num_reused: int = 0
    """Rows of this run whose vector was taken from another part, since their text is the same."""
    num_vectors: int = 0
    """More than `num_rows` if each chunk of a text has one."""
    num_duplicates: int = 0
    """Texts that did not go through the model, since others of their shard are the same."""
    num_long: int = 0
    """Texts that were cut, or embedded in chunks."""
    num_lost_tokens: int = 0
    """Of those that were cut."""

    def lines(self) -> dict[str, str]:
        """Say what a run did, and what is left."""
        lines = {}
        if self.num_shards:
            tokens = f", {count(self.num_tokens, 'token')}" if self.num_tokens else ""
            lines["embedded"] = f"{count(self.num_rows, 'row')}{tokens} in {count(self.num_shards, 'shard')}"
            if self.num_reused:
                lines["reused"] = reused(self.num_reused)
            lines["rejected"] = rejects(self.num_rejects, self.reasons)
            if self.num_repeated_ids:
                lines["ids"] = repeated_ids(self.num_repeated_ids)
            if self.provider is None:
                lines |= texts_lines(self)
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
        if self.num_changed_inputs:
            lines["changed"] = (
                f"the new rows of {count(self.num_changed_inputs, 'input')} took the place of the former ones"
            )
        if self.done_before_rows:
            lines["before"] = f"{count(self.done_before_rows, 'row')} were done already"
        lines["left"] = count(self.pending_rows, "row") if self.pending_rows else "nothing"
        lines["output"] = f"{self.output}/data/*.parquet"
        return lines


def texts_lines(result: RunResult | StatusResult) -> dict[str, str]:
    """Say what became of texts in a model that runs here: the same ones, and those that are longer than it takes."""
    said = []
    if result.num_duplicates:
        said.append(f"{count(result.num_duplicates, 'duplicate')} embedded with others")
    if result.num_long:
        how = "in chunks"
        if result.num_vectors > result.num_rows:
            how = f"in {count(result.num_vectors - result.num_rows + result.num_long, 'chunk')}"
        elif result.num_lost_tokens:
            how = f"cut, {count(result.num_lost_tokens, 'token')} lost"
        said.append(f"{count(result.num_long, 'long text')} {how}")
    return {"texts": "; ".join(said)} if said else {}


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
    output_dtype: str = "float32"
    """What vectors are stored as."""
    num_repeated_ids: int = 0
    """Rows whose id another row of their shard has before them; `verify` at level full counts over all shards."""
    num_reused: int = 0
    """Rows whose vector was taken from another part, since their text is the same."""
    num_vectors: int = 0
    """More than `num_rows` if each chunk of a text has one."""
    num_duplicates: int = 0
    num_long: int = 0
    num_lost_tokens: int = 0

    def lines(self) -> dict[str, str]:
        """Say where an output stands."""
        left = "cannot be told" if self.pending_rows is None else "nothing"
        if self.pending_rows:
            left = f"{count(self.pending_rows, 'row')} in {count(self.pending_shards or 0, 'shard')}"
        stored_as = "" if self.output_dtype == "float32" else f"stored as {self.output_dtype}, "
        return {
            "left": left,
            "embedded": f"{count(self.num_rows, 'row')} in {count(self.num_shards, 'shard')}",
            **({"reused": reused(self.num_reused)} if self.num_reused else {}),
            "rejected": rejects(self.num_rejects, self.reasons),
            **({"ids": repeated_ids(self.num_repeated_ids)} if self.num_repeated_ids else {}),
            **({} if self.provider else texts_lines(self)),
            "vectors": f"{self.dimension} dimensions, {stored_as}{size(self.num_bytes)}",
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
