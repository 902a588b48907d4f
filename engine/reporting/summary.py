"""The summary: what the page says in words and numbers, beside what it draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.reporting import figures
from engine.reporting.health import NEAR
from engine.reporting.page import brief, grouped
from engine.wording import dollars, duration, size, snippet

if TYPE_CHECKING:
    from engine.config import JobConfig
    from engine.reporting.facts import Facts
    from engine.reporting.health import Health
    from engine.reporting.sample import Sample
    from engine.reporting.timeline import Session

SHOWN_PAIRS = 20
SHOWN_SETS = 5
LINE_WIDTH = 90
SHOWN_ROWS = 4
"""Of a set of identical vectors."""


def tiles_of(facts: Facts, pending_rows: int | None, output_dtype: str = "float32") -> list[tuple[str, str, str]]:
    """Return the numbers that come first: value, name, and what is to be said beside them."""
    tally = facts.tally
    left = "" if pending_rows is None else "nothing left to do" if not pending_rows else f"{grouped(pending_rows)} left"
    total = tally.num_rows + tally.num_rejects
    tiles = [
        (grouped(tally.num_rows), "rows", left),
        (grouped(tally.num_rejects), "rejects", f"{tally.num_rejects / total:.2%} of all" if tally.num_rejects else ""),
    ]
    if tally.num_tokens:
        tiles.append(
            (
                brief(tally.num_tokens),
                "tokens",
                f"{tally.num_tokens / max(tally.num_rows, 1):,.1f} a row",
            )
        )
    if facts.cost is not None:
        tiles.append((dollars(facts.cost), "cost", ""))
    tiles += [
        (grouped(facts.dimension), "dimensions", output_dtype),
        (size(facts.num_bytes), "of parts", f"{grouped(tally.num_shards)} shards"),
    ]
    if facts.runs:
        tiles.append((grouped(len(facts.runs)), "runs", str(facts.runs[0].get("outcome") or "")))
    return tiles


def work_of(facts: Facts, sessions: list[Session], limit: float | None) -> list[tuple[str, str]]:
    """Return what is said of the speed, of devices and of a provider: name and value."""
    tally = facts.tally
    seconds = sum(session.seconds for session in sessions)
    rows: list[tuple[str, str]] = []
    if seconds:
        pauses = (
            f", in {len(sessions)} sessions; pauses of more than two minutes are left out" if len(sessions) > 1 else ""
        )
        rows.append(
            (
                "worked",
                f"{duration(seconds)}, {sessions[0].start:%Y-%m-%d %H:%M} to {sessions[-1].stop:%Y-%m-%d %H:%M} UTC{pauses}",
            )
        )
        tokens = f", {grouped(tally.num_tokens / seconds)} tokens/s" if tally.num_tokens else ""
        rows.append(("mean", f"{tally.num_rows / seconds:,.4g} rows/s{tokens}"))
    if facts.embed_s:
        rows.append(("model time", f"{duration(facts.embed_s)}, added up over actors"))
    where = " with ".join(", ".join(sorted(names - {""})) for names in (tally.devices, tally.backends) if names - {""})
    if where:
        rows.append(("device", where))
    if facts.idle_share is not None:
        rows.append(("device waited", f"{facts.idle_share:.1%} of its time"))
    if facts.padding_share is not None:
        rows.append(
            ("padding", f"{facts.padding_share:.1%} of {grouped(tally.padded_tokens)} tokens that were computed")
        )
    return rows + _asked(facts, seconds, limit)


def _asked(facts: Facts, seconds: float, limit: float | None) -> list[tuple[str, str]]:
    """Return what is said of a provider; nothing if none was asked."""
    asked = facts.tally.asked
    if not asked["num_requests"]:
        return []
    rows = [
        (
            "provider",
            f"{grouped(asked['num_requests'])} requests, {grouped(asked['num_refusals'])} refusals, {grouped(asked['num_retries'])} retries",
        )
    ]
    rate = facts.tally.num_tokens / max(seconds, 1) * 60
    if limit:
        rows.append(("of the limit", f"{rate / limit:.0%} of {grouped(limit)} tokens/min, over the time worked"))
    else:
        rows.append(
            ("of the limit", f"{grouped(rate)} tokens/min; neither the job nor a run's record says what is allowed")
        )
    return rows


def run_of(run: dict[str, Any]) -> dict[str, str]:
    """Return what is shown of a run, all of it text: its record may lack anything."""
    result = run.get("result") or {}

    def number(name: str) -> str:
        value = result.get(name)
        return grouped(value) if isinstance(value, (int, float)) else ""

    seconds, rate = result.get("seconds"), result.get("rows_per_s")
    return {
        "started": str(run.get("started_at") or "")[:19].replace("T", " "),
        "outcome": str(run.get("outcome") or "unknown"),
        "rows": number("num_rows"),
        "rejects": number("num_rejects"),
        "rate": f"{rate:,.4g}" if isinstance(rate, (int, float)) else "",
        "took": duration(seconds) if isinstance(seconds, (int, float)) else "",
        "where": f"{run.get('user') or ''}@{run.get('host') or ''}".strip("@"),
        "error": str(result.get("stopped") or run.get("error") or ""),
    }


def lengths_of(facts: Facts, sample: Sample) -> figures.Figure | None:
    """Return the figure of how long texts are: of the sample, if it has texts, else of the records."""
    if sample.lengths:
        return figures.lengths(figures.character_bins(sample), "characters", "sampled rows")
    return figures.lengths(facts.tokens_a_row, "tokens a row", "rows")


def said_of_lengths(config: JobConfig, sample: Sample) -> str:
    """Say which lengths these are, and why not others."""
    if sample.lengths:
        return f"Characters of the {len(sample.lengths):,} sampled texts; tokens are not stored row by row."
    if config.text_template is not None:
        return "Mean tokens a row of each shard, by its rows: texts made of several columns, and tokens row by row, are not stored."
    return (
        f"Mean tokens a row of each shard, by its rows: the output does not keep the column {config.text_column!r}, and tokens are not "
        f"stored row by row. A run with --keep {config.text_column} shows each text's length."
    )


def texts_of(facts: Facts) -> list[tuple[str, str]]:
    """Return what became of texts: name and number."""
    tally = facts.tally
    is_counted = tally.asked["num_long"] or tally.asked["num_requests"] or tally.backends - {"", "encode"}
    said = [
        ("longer than the model takes", grouped(tally.asked["num_long"]) if is_counted else "not counted by this model")
    ]
    if tally.num_lost_tokens:
        said.append(("tokens that were cut off", grouped(tally.num_lost_tokens)))
    if tally.num_vectors > tally.num_rows:
        said.append(("vectors, one for each chunk", grouped(tally.num_vectors)))
    again = "sent" if tally.asked["num_requests"] else "embedded"
    return [*said, (f"duplicates, not {again} again", grouped(tally.asked["num_duplicates"]))]


def said_of_sample(facts: Facts, sample: Sample) -> str:
    """Say how many rows were sampled, and from where."""
    beginnings = ", from their beginnings" if sample.is_beginning else ""
    return f"{len(sample):,} of {max(facts.tally.num_rows, facts.tally.num_vectors):,} rows, of {sample.num_parts:,} of {facts.tally.num_shards:,} parts{beginnings}; the same ones each time."


def vectors_of(sample: Sample, health: Health) -> dict[str, Any]:
    """Return what is shown of the health of the sampled vectors."""
    low, middle, high = health.norm_range
    facts = [
        ("length of a vector", f"median {middle:.4g}, {low:.4g} to {high:.4g}; {len(health.odd_norms):,} stand out"),
        ("constant dimensions", f"{len(health.constant_dimensions):,} of {sample.vectors.shape[1]:,}"),
        ("identical vectors", f"{health.num_identical:,} repeat the vector of a row before them"),
        ("near-duplicates", f"{health.num_pairs:,} pairs of different vectors with a cosine above {NEAR}"),
    ]
    texts = sample.texts
    return {
        "facts": facts,
        "has_texts": texts is not None,
        "pairs": [
            (
                f"{cosine:.4f}",
                *((sample.ids[row], snippet(texts[row], LINE_WIDTH) if texts else "") for row in (one, other)),
            )
            for cosine, one, other in health.pairs[:SHOWN_PAIRS]
        ],
        "num_pairs": health.num_pairs,
        "identical": [
            (
                len(rows),
                [sample.ids[row] for row in rows[:SHOWN_ROWS]],
                snippet(texts[rows[0]], LINE_WIDTH) if texts else "",
            )
            for rows in health.identical[:SHOWN_SETS]
        ],
        "odd": [sample.ids[row] for row in health.odd_norms[:SHOWN_PAIRS]],
    }
