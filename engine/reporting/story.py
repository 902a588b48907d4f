"""The story of a report, told in order: records, a sample, a map, what is wrong, a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.progress import duration
from engine.reporting import figures, page
from engine.reporting.facts import facts_of, reasons_of
from engine.reporting.health import NEAR, health_of
from engine.reporting.projection import map_of
from engine.reporting.sample import sample_of
from engine.reporting.signs import signs
from engine.results import Result
from engine.survey import resurvey, stored_config
from engine.version import __version__

if TYPE_CHECKING:
    from engine.config import JobConfig
    from engine.reporting.facts import Facts
    from engine.reporting.health import Health
    from engine.reporting.projection import Projection
    from engine.reporting.sample import Sample
    from engine.reporting.timeline import Session

REPORT = "_engine/report.html"
SAMPLE_ROWS = 5000
MAX_SAMPLE_ROWS = 20_000
SHOWN_RUNS = 20
SHOWN_PAIRS = 20
SHOWN_SETS = 5
SHOWN_ROWS = 4
"""Of a set of identical vectors."""


@dataclass(frozen=True, slots=True)
class ReportResult(Result):
    """What a report was made of, and where it is."""

    output: str
    report: str
    """The page."""
    num_rows: int
    sampled_rows: int
    projection: str
    """How vectors became points; empty if there were too few."""
    num_bytes: int
    """Of the page."""
    warnings: list[str] = field(default_factory=list)
    """The signs that are at the top of the page."""


def report(
    output: str,
    to: str | None = None,
    *,
    color_by: str | None = None,
    sample_rows: int = SAMPLE_ROWS,
    projection: Projection = "auto",
) -> ReportResult:
    """
    Make a page about an output, and put it in its place whole.

    Args:
        output: The folder.
        to: The file to write; by default `_engine/report.html` of the output.
        color_by: A column of the output whose values colour the map; by default clusters do.
        sample_rows: Vectors to look at, 20,000 at most.
        projection: How vectors become points: `pca`, `tsne`, or `auto`, which takes t-SNE for 5,000 of them or fewer.

    Raises:
        ConfigError: There is no output, no such column, no place to write, or the extra `report` is not installed.
        CorruptOutput: A record of the output cannot be read.
    """
    page.require_libraries()
    if not 1 <= sample_rows <= MAX_SAMPLE_ROWS:
        raise ConfigError(f"sample_rows {sample_rows} is not between 1 and {MAX_SAMPLE_ROWS:,}")
    ledger, job, standing, problem = resurvey(output)
    config = stored_config(job, output)
    _check_column(config, color_by)
    facts = facts_of(ledger)
    sample = sample_of(ledger, config, facts.parts, num_rows=sample_rows, color_by=color_by)
    health = health_of(sample.vectors) if len(sample) else None
    found = None
    if len(sample):
        found = map_of(sample.vectors, sample.texts, sample.colors, color_by=color_by, projection=projection)
    sessions = facts.timeline.sessions()
    told = signs(facts, standing, problem.message if problem else "", sample, health)
    limit = config.tokens_per_minute or facts.tokens_per_minute_limit
    drawn = {
        "throughput": figures.throughput(sessions, limit and limit / 60),
        "lengths": _lengths(facts, sample),
        "map": figures.points(found, sample) if found else None,
    }
    html = page.render(
        {name: figure for name, figure in drawn.items() if figure},
        title=Path(ledger.root).name,
        output=ledger.root,
        model=config.model,
        job=job,
        made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=__version__,
        signs=told,
        tiles=_tiles(facts, standing.plan.pending_rows if standing else None),
        work=_work(facts, sessions, limit),
        runs=[_run(run) for run in facts.runs[:SHOWN_RUNS]],
        num_runs=len(facts.runs),
        num_undated=facts.timeline.num_undated,
        reasons=reasons_of(facts),
        num_rejects=facts.tally.num_rejects,
        lengths=_said_of_lengths(config, sample),
        texts=_texts(facts),
        sample=_said_of_sample(facts, sample),
        how=found.how if found else "",
        colored_by=found.colored_by if found else "",
        color_column=color_by,
        vectors=_vectors(sample, health) if health else None,
    )
    path = Path(to) if to else Path(ledger.root, REPORT)
    page.replace(path, html)
    return ReportResult(
        output=ledger.root,
        report=str(path.absolute()),
        num_rows=facts.tally.num_rows,
        sampled_rows=len(sample),
        projection=found.how if found else "",
        num_bytes=path.stat().st_size,
        warnings=[sign.text for sign in told],
    )


def _check_column(config: JobConfig, color_by: str | None) -> None:
    known = dict.fromkeys([config.id_column or "id", *config.keep])
    if color_by is not None and color_by not in known:
        raise ConfigError(
            f"the output has no column {color_by!r} to colour by; it has {', '.join(known)} (--keep of the run decides)"
        )


def _tiles(facts: Facts, pending_rows: int | None) -> list[tuple[str, str, str]]:
    """Return the numbers that come first: value, name, and what is to be said beside them."""
    tally, count = facts.tally, page.FILTERS["count"]
    left = "" if pending_rows is None else "nothing left to do" if not pending_rows else f"{count(pending_rows)} left"
    total = tally.num_rows + tally.num_rejects
    tiles = [
        (count(tally.num_rows), "rows", left),
        (count(tally.num_rejects), "rejects", f"{tally.num_rejects / total:.2%} of all" if tally.num_rejects else ""),
    ]
    if tally.num_tokens:
        tiles.append(
            (
                page.FILTERS["brief"](tally.num_tokens),
                "tokens",
                f"{tally.num_tokens / max(tally.num_rows, 1):,.1f} a row",
            )
        )
    if tally.cost is not None:
        tiles.append((page.FILTERS["dollars"](tally.cost), "cost", ""))
    tiles += [
        (count(facts.dimension), "dimensions", "float32"),
        (page.FILTERS["size"](facts.num_bytes), "of parts", f"{count(tally.num_shards)} shards"),
    ]
    if facts.runs:
        tiles.append((count(len(facts.runs)), "runs", str(facts.runs[0].get("outcome") or "")))
    return tiles


def _work(facts: Facts, sessions: list[Session], limit: float | None) -> list[tuple[str, str]]:
    """Return what is said of the speed, of devices and of a provider: name and value."""
    tally, count = facts.tally, page.FILTERS["count"]
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
        tokens = f", {count(tally.num_tokens / seconds)} tokens/s" if tally.num_tokens else ""
        rows.append(("mean", f"{tally.num_rows / seconds:,.4g} rows/s{tokens}"))
    if facts.embed_s:
        rows.append(("model time", f"{duration(facts.embed_s)}, added up over actors"))
    where = " with ".join(", ".join(sorted(names - {""})) for names in (tally.devices, tally.backends) if names - {""})
    if where:
        rows.append(("device", where))
    if facts.idle_share is not None:
        rows.append(("device waited", f"{facts.idle_share:.1%} of its time"))
    if facts.padding_share is not None:
        rows.append(("padding", f"{facts.padding_share:.1%} of {count(tally.padded_tokens)} tokens that were computed"))
    return rows + _asked(facts, seconds, limit)


def _asked(facts: Facts, seconds: float, limit: float | None) -> list[tuple[str, str]]:
    """Return what is said of a provider; nothing if none was asked."""
    asked, count = facts.tally.asked, page.FILTERS["count"]
    if not asked["num_requests"]:
        return []
    rows = [
        (
            "provider",
            f"{count(asked['num_requests'])} requests, {count(asked['num_refusals'])} refusals, {count(asked['num_retries'])} retries",
        )
    ]
    rate = facts.tally.num_tokens / max(seconds, 1) * 60
    if limit:
        rows.append(("of the limit", f"{rate / limit:.0%} of {count(limit)} tokens/min, over the time worked"))
    else:
        rows.append(
            ("of the limit", f"{count(rate)} tokens/min; neither the job nor a run's record says what is allowed")
        )
    return rows


def _run(run: dict[str, Any]) -> dict[str, str]:
    """Return what is shown of a run, all of it text: its record may lack anything."""
    result, count = run.get("result") or {}, page.FILTERS["count"]

    def number(name: str) -> str:
        value = result.get(name)
        return count(value) if isinstance(value, (int, float)) else ""

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


def _lengths(facts: Facts, sample: Sample) -> figures.Figure | None:
    if sample.lengths:
        return figures.lengths(figures.character_bins(sample), "characters", "sampled rows")
    return figures.lengths(facts.tokens_a_row, "tokens a row", "rows")


def _said_of_lengths(config: JobConfig, sample: Sample) -> str:
    if sample.lengths:
        return f"Characters of the {len(sample.lengths):,} sampled texts; tokens are not stored row by row."
    return (
        f"Mean tokens a row of each shard, by its rows: the output does not keep the column {config.text_column!r}, and tokens are not "
        f"stored row by row. A run with --keep {config.text_column} shows each text's length."
    )


def _texts(facts: Facts) -> list[tuple[str, str]]:
    """Return what became of texts: name and number."""
    asked, count = facts.tally.asked, page.FILTERS["count"]
    if not asked["num_requests"]:
        return [("cut or chunked, duplicates", "not counted for models that run here")]
    return [
        ("longer than the model takes", count(asked["num_long"])),
        ("duplicates, not sent again", count(asked["num_duplicates"])),
    ]


def _said_of_sample(facts: Facts, sample: Sample) -> str:
    beginnings = ", from their beginnings" if sample.is_beginning else ""
    return f"{len(sample):,} of {facts.tally.num_rows:,} rows, of {sample.num_parts:,} of {facts.tally.num_shards:,} parts{beginnings}; the same ones each time."


def _vectors(sample: Sample, health: Health) -> dict[str, Any]:
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
            (f"{cosine:.4f}", *((sample.ids[row], _line(texts[row]) if texts else "") for row in (one, other)))
            for cosine, one, other in health.pairs[:SHOWN_PAIRS]
        ],
        "num_pairs": health.num_pairs,
        "identical": [
            (len(rows), [sample.ids[row] for row in rows[:SHOWN_ROWS]], _line(texts[rows[0]]) if texts else "")
            for rows in health.identical[:SHOWN_SETS]
        ],
        "odd": [sample.ids[row] for row in health.odd_norms[:SHOWN_PAIRS]],
    }


def _line(text: str) -> str:
    line = " / ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= 90 else line[:89] + "…"
