"""The story of a report, told in order: records, a sample, a map, what is wrong, a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from engine.buckets.place import is_bucket
from engine.disk import expanded
from engine.errors import ConfigError
from engine.reporting import figures, page, summary
from engine.reporting.facts import facts_of, reasons_of
from engine.reporting.health import health_of
from engine.reporting.projection import Projection, map_of
from engine.reporting.sample import sample_of
from engine.reporting.signs import signs
from engine.result import Result
from engine.survey import resurvey, stored_config
from engine.version import __version__
from engine.wording import size

if TYPE_CHECKING:
    from engine.config import JobConfig
    from engine.ledger import Ledger

REPORT = "_engine/report.html"
SAMPLE_ROWS = 5000
MAX_SAMPLE_ROWS = 20_000
SHOWN_RUNS = 20


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

    def lines(self) -> dict[str, str]:
        """Say where the page is."""
        return {"report": f"{self.report}, {size(self.num_bytes)}"}


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
    if to is not None and "://" in to:
        raise ConfigError(
            f"--to {to}: --to names a file on this machine; without it, the page goes beside an output, in a bucket too"
        )
    path = None if to is None else expanded(to)  # now, and not after all the work
    if not 1 <= sample_rows <= MAX_SAMPLE_ROWS:
        raise ConfigError(f"sample_rows {sample_rows} is not between 1 and {MAX_SAMPLE_ROWS:,}")
    if projection not in get_args(Projection):
        raise ConfigError(f"projection {projection!r}: there are {', '.join(get_args(Projection))}")
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
        "lengths": summary.lengths_of(facts, sample),
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
        tiles=summary.tiles_of(facts, standing.plan.pending_rows if standing else None, config.output_dtype),
        work=summary.work_of(facts, sessions, limit),
        runs=[summary.run_of(run) for run in facts.runs[:SHOWN_RUNS]],
        num_runs=len(facts.runs),
        num_undated=facts.timeline.num_undated,
        reasons=reasons_of(facts),
        num_rejects=facts.tally.num_rejects,
        lengths=summary.said_of_lengths(config, sample),
        texts=summary.texts_of(facts),
        sample=summary.said_of_sample(facts, sample),
        how=found.how if found else "",
        colored_by=found.colored_by if found else "",
        color_column=color_by,
        vectors=summary.vectors_of(sample, health) if health else None,
    )
    report, num_bytes = _put(ledger, path, html)
    return ReportResult(
        output=ledger.root,
        report=report,
        num_rows=facts.tally.num_rows,
        sampled_rows=len(sample),
        projection=found.how if found else "",
        num_bytes=num_bytes,
        warnings=[sign.text for sign in told],
    )


def _put(ledger: Ledger, to: Path | None, html: str) -> tuple[str, int]:
    """Put the page in its place; return where that is, and its size in bytes."""
    if to is None and is_bucket(ledger.root):
        data = html.encode("utf-8", "replace")
        ledger.storage.replace(REPORT, data)
        return f"{ledger.root}/{REPORT}", len(data)
    path = to or Path(ledger.root, REPORT)
    page.replace(path, html)
    return str(path.absolute()), path.stat().st_size


def _check_column(config: JobConfig, color_by: str | None) -> None:
    known = dict.fromkeys([config.id_column or "id", *config.keep])
    if color_by is not None and color_by not in known:
        raise ConfigError(
            f"the output has no column {color_by!r} to colour by; it has {', '.join(known)} (--keep of the run decides)"
        )
