"""The signs: what a person should know of an output before using it, the worst first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from engine.reporting.health import MIN_ROWS, NEAR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.reporting.facts import Facts
    from engine.reporting.health import Health
    from engine.reporting.sample import Sample
    from engine.survey import Standing

MANY_REJECTS = 0.01
MUCH_PADDING = 0.2
MUCH_WAITING = 0.3
MANY_CONSTANT = 0.1
"""Of the dimensions: a few may be constant in a good model, a tenth are not."""


@dataclass(frozen=True, slots=True)
class Sign:
    """One thing to know."""

    level: Literal["bad", "note"]
    text: str


def signs(facts: Facts, standing: Standing | None, untold: str, sample: Sample, health: Health | None) -> list[Sign]:
    """
    Say what stands out.

    Args:
        facts: Of the output.
        standing: The output against its source; None if that cannot be compared.
        untold: Why it cannot be.
        sample: Of the vectors.
        health: Of the sample; None if it is empty.
    """
    found = [*_of_vectors(sample, health), *_of_rows(facts, standing, untold), *_of_work(facts)]
    return sorted(found, key=lambda sign: sign.level != "bad")


def _of_rows(facts: Facts, standing: Standing | None, untold: str) -> Iterator[Sign]:
    tally = facts.tally
    if standing is None:
        yield Sign("note", f"what is left to do cannot be told: {untold}")
    else:
        for warning in standing.told:
            yield Sign("note", warning)
        if standing.plan.pending:
            yield Sign(
                "note", f"{standing.plan.pending_rows:,} of {standing.plan.num_rows:,} rows are not embedded yet"
            )
    if (total := tally.num_rows + tally.num_rejects) and tally.num_rejects / total > MANY_REJECTS:
        yield Sign("bad", f"{tally.num_rejects / total:.1%} of all rows are rejected: see the reasons below")
    if tally.asked["num_long"]:
        lost = f": {tally.num_lost_tokens:,} tokens were cut off" if tally.num_lost_tokens else ""
        yield Sign(
            "note", f"{_some(tally.asked['num_long'], 'text was', 'texts were')} longer than the model takes{lost}"
        )


def _of_work(facts: Facts) -> Iterator[Sign]:
    last = facts.runs[0] if facts.runs else {}
    if last.get("outcome") in ("failed", "stopped", "interrupted"):
        reason = (last.get("result") or {}).get("stopped") or last.get("error")
        yield Sign(
            "bad" if last["outcome"] == "failed" else "note",
            f"the last run {_ended(last['outcome'])}{f': {reason}' if reason else ''}",
        )
    if facts.num_unreadable_runs:
        yield Sign("note", f"{_some(facts.num_unreadable_runs, 'record of a run', 'records of runs')} cannot be read")
    if (facts.idle_share or 0) > MUCH_WAITING and not facts.tally.asked["num_requests"]:
        yield Sign(
            "note",
            f"devices waited {facts.idle_share:.0%} of their time: reading or tokenizing is what limits the speed",
        )
    if (facts.padding_share or 0) > MUCH_PADDING:
        yield Sign("note", f"{facts.padding_share:.0%} of what devices computed was padding")


def _of_vectors(sample: Sample, health: Health | None) -> Iterator[Sign]:
    if sample.num_unreadable:
        yield Sign(
            "bad",
            f"{_some(sample.num_unreadable, 'part', 'parts')} of the sample cannot be read: `engine verify` says what is wrong",
        )
    if health is None:
        return
    rows, dimensions = sample.vectors.shape
    if health.num_identical:
        text = f"{_some(health.num_identical, 'row', 'rows')} of the {rows:,} sampled {'has' if health.num_identical == 1 else 'have'} the very vector of another row"
        yield Sign("bad" if health.num_identical > rows / 2 and rows >= MIN_ROWS else "note", text)
    if health.num_pairs:
        yield Sign(
            "note",
            f"{_some(health.num_pairs, 'pair', 'pairs')} of sampled vectors {'is' if health.num_pairs == 1 else 'are'} near-duplicates (cosine above {NEAR})",
        )
    if health.odd_norms:
        low, middle, high = health.norm_range
        text = f"{_some(len(health.odd_norms), 'sampled vector has a length that stands', 'sampled vectors have lengths that stand')} out"
        yield Sign("note", f"{text}: the median is {middle:.4g}, the range {low:.4g} to {high:.4g}")
    if number := len(health.constant_dimensions):
        text = (
            f"{number:,} of {dimensions:,} dimensions {'is' if number == 1 else 'are'} the same in all sampled vectors"
        )
        yield Sign("bad" if number > dimensions * MANY_CONSTANT else "note", text)


def _ended(outcome: str) -> str:
    return {"failed": "failed", "stopped": "was stopped"}.get(outcome, "was interrupted")


def _some(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
