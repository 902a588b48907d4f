"""The terminal: what a person reads of a result, in a few aligned lines, the most wanted first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.text import Text

from engine.progress import duration

if TYPE_CHECKING:
    from rich.console import Console

    from engine.results import Forecast, PlanResult, ProviderUse, RunResult, StatusResult, VerifyResult

LABEL_WIDTH = 10
MAX_FINDINGS = 20
"""Shown of what verification found; `--json` has them all."""


def show_plan(console: Console, result: PlanResult) -> None:
    """Say what a run would do."""
    left = "nothing"
    if result.pending_shards:
        left = (
            f"{_count(result.pending_rows, 'row')} in {_count(result.pending_shards, 'shard')} of "
            f"{_count(result.pending_files, 'file')}, about {_size(result.pending_bytes)} of text"
        )
    lines = {
        "to do": left,
        "done": f"{result.done_rows:,} of {_count(result.num_rows, 'row')}, {result.done_shards:,} of {_count(result.num_shards, 'shard')}",
        "source": f"{_count(result.num_files, 'file')}, cut into shards of about {_count(result.shard_rows, 'row')}",
        **(_forecast(result.forecast) if result.forecast else {}),
        "model": result.model,
        "output": result.output,
    }
    _show(console, lines, result.warnings)


def show_run(console: Console, result: RunResult) -> None:
    """Say what a run did, and what is left."""
    lines = {}
    if result.num_shards:
        tokens = f", {_count(result.num_tokens, 'token')}" if result.num_tokens else ""
        lines["embedded"] = f"{_count(result.num_rows, 'row')}{tokens} in {_count(result.num_shards, 'shard')}"
        lines["rejected"] = _rejects(result.num_rejects, result.reasons)
        lines["speed"] = (
            f"{result.rows_per_s:,.1f} rows/s on {result.num_actors} x {result.device or 'custom model'}"
            f"{f' with {result.backend}' if result.backend else ''}; "
            f"{duration(result.seconds)} in all, {duration(result.start_s)} of them to the first shard"
        )
        if result.device_idle_share is not None:
            padding = "" if result.padding_share is None else f", {result.padding_share:.1%} of its work was padding"
            lines["device"] = f"waited {result.device_idle_share:.1%} of the time{padding}"
    if result.provider is not None:
        lines |= _provider(result.provider)
    if result.done_before_rows:
        lines["before"] = f"{_count(result.done_before_rows, 'row')} were done already"
    lines["left"] = _count(result.pending_rows, "row") if result.pending_rows else "nothing"
    lines["output"] = f"{result.output}/data/*.parquet"
    _show(console, lines, result.warnings)


def show_status(console: Console, result: StatusResult) -> None:
    """Say where an output stands."""
    left = "cannot be told" if result.pending_rows is None else "nothing"
    if result.pending_rows:
        left = f"{_count(result.pending_rows, 'row')} in {_count(result.pending_shards or 0, 'shard')}"
    lines = {
        "left": left,
        "embedded": f"{_count(result.num_rows, 'row')} in {_count(result.num_shards, 'shard')}",
        "rejected": _rejects(result.num_rejects, result.reasons),
        "vectors": f"{result.dimension} dimensions, {_size(result.num_bytes)}",
        "took": f"{_count(result.num_tokens, 'token')}, {duration(result.embed_s)} of model time",
        **(_provider(result.provider) if result.provider else {}),
        "model": result.model,
        "output": f"{result.output}, begun {result.created_at}",
    }
    _show(console, lines, result.warnings)


def show_verify(console: Console, result: VerifyResult) -> None:
    """Say whether an output is right, and what is wrong with it and what to do."""
    verdict = "good" if result.ok else f"{_count(len(result.findings), 'problem')} found"
    lines = {
        "verdict": f"{verdict}, at level {result.level}",
        "looked at": f"{_count(result.num_rows, 'row')} and {_count(result.num_rejects, 'reject')} in {_count(result.num_shards, 'shard')}",
    }
    if result.lowest_cosine is not None:
        lines["again"] = f"lowest cosine of vectors made again: {result.lowest_cosine:.6f}"
    if result.set_aside:
        lines["moved"] = f"{_count(len(result.set_aside), 'file')} to {result.output}/_engine/set-aside"
    _show(console, lines, result.warnings)
    for finding in result.findings[:MAX_FINDINGS]:
        console.print(Text(f"problem: {finding.problem}", style="red"), Text(f"  {finding.advice}"), sep="\n")
    if len(result.findings) > MAX_FINDINGS:
        console.print(f"and {len(result.findings) - MAX_FINDINGS:,} more: --json has them all")


def _forecast(found: Forecast) -> dict[str, str]:
    """Say what a provider will be asked for, and what it will take."""
    kind = "" if found.is_exact else ", by an estimate"
    tokens = f"{_count(found.num_tokens, 'token')}{kind} in {_count(found.num_texts, 'text')}"
    lines = {
        "tokens": tokens + (f"; {_count(found.num_duplicates, 'duplicate')} not sent" if found.num_duplicates else "")
    }
    if found.num_long or found.num_rejects:
        lines["texts"] = f"{_count(found.num_long, 'text')} too long, {_count(found.num_rejects, 'row')} to reject"
    asked = [_count(found.num_requests, "request")]
    if found.cost is not None:
        asked.append(_dollars(found.cost))
    if found.seconds is not None:
        asked.append(f"{duration(found.seconds)} at the limits given")
    return lines | {"provider": ", ".join(asked)}


def _provider(use: ProviderUse) -> dict[str, str]:
    """Say what a provider was asked, what it took, and what a crash would have lost."""
    lines = {
        "provider": f"{_count(use.num_requests, 'request')}, {_count(use.num_refusals, 'refusal')}, "
        f"{_retries(use.num_retries)}{f', {_dollars(use.cost)}' if use.cost is not None else ''}"
    }
    if use.tokens_per_minute is not None:
        limit = "no limit known"
        if use.tokens_per_minute_limit:
            share = use.tokens_per_minute / use.tokens_per_minute_limit
            limit = f"{share:.0%} of the {use.tokens_per_minute_limit:,.0f} that are allowed"
        elif use.requests_per_minute_limit:
            limit = f"{use.requests_per_minute_limit:,.0f} requests are allowed"
        lines["rate"] = f"{use.tokens_per_minute:,.0f} tokens/min, {limit}"
    if use.num_duplicates or use.num_long:
        lines["texts"] = f"{_count(use.num_duplicates, 'duplicate')} not sent, {_count(use.num_long, 'long text')} cut"
    if use.tokens_at_risk:
        cost = f" ({_dollars(use.cost_at_risk)})" if use.cost_at_risk is not None else ""
        lines["risk"] = f"a crash would have lost {_count(use.tokens_at_risk, 'token')}{cost} at most"
    return lines


def _retries(number: int) -> str:
    return "1 retry" if number == 1 else f"{number:,} retries"


def _dollars(amount: float) -> str:
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.3g}"


def _show(console: Console, lines: Mapping[str, str], warnings: Iterable[str]) -> None:
    for label, text in lines.items():
        console.print(Text(label.ljust(LABEL_WIDTH), style="bold") + Text(text))
    for warning in warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _rejects(number: int, reasons: Mapping[str, int]) -> str:
    if not number:
        return "nothing"
    return f"{_count(number, 'row')}: " + ", ".join(f"{count:,} x {reason}" for reason, count in reasons.items())


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
