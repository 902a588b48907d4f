"""What `local.py` makes of its measurements: medians, shares of the peak, ratios with their targets, and tables."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.peak import best

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.local_texts import Row, TextSet
    from benchmarks.peak import Found

PEAK = "matrix multiply peak"


@dataclass(frozen=True, slots=True)
class Ratio:
    """One way's rate over another's, or its share of the peak."""

    over: str
    under: str
    targets: tuple[float, float] | None = None
    """On short texts and on long ones."""
    everywhere: bool = False
    """The targets are for GPUs too."""


RATIOS = (
    Ratio("end to end float32", "encode float32", (3.2, 2.2)),
    Ratio("end to end bfloat16", "encode float32", (5.5, 3.7)),
    Ratio("end to end bfloat16", "encode bfloat16", (2.3, 1.6)),
    Ratio("end to end float16", "encode float16"),
    Ratio("end to end float32", "encode pool float32"),
    Ratio("end to end float32", "Ray recipe float32", (6, 4)),
    Ratio("end to end float32", "Ray recipe tuned float32"),
    Ratio("end to end float32", "Daft float32"),
    Ratio("end to end bfloat16", PEAK, (0.55, 0.50)),
    Ratio("end to end float32", "bare loop float32", (0.95, 0.95), everywhere=True),
    Ratio("end to end bfloat16", "bare loop bfloat16", (0.95, 0.95), everywhere=True),
    Ratio("end to end float16", "bare loop float16"),
)


def summary(texts: TextSet, measured: dict[str, list[Row]], peaks: Sequence[Found]) -> dict[str, Any]:
    """Sum up the rounds of all ways over one set of texts."""
    peak = {dtype: statistics.median(rates) for dtype, rates in _peaks(peaks).items()}
    return {
        "rows": len(texts.texts),
        "shard_rows": texts.shard_rows,
        "tokens_per_text": texts.tokens_per_text,
        "flops_per_text": texts.flops_per_text,
        "ways": {
            way: _summed_up(rounds, texts.flops_per_text, peak.get(way.rpartition(" ")[2]))
            for way, rounds in measured.items()
            if rounds
        },
    }


def _summed_up(rounds: list[Row], flops_per_text: float, peak: float | None) -> Row:
    rates = [one["texts_per_s"] for one in rounds]
    median = statistics.median(rates)
    computed = _median(one.get("computed") for one in rounds)
    return {
        "texts_per_s": rates,
        "median": median,
        "lowest": min(rates),
        "highest": max(rates),
        "computed_share": computed,
        "share_of_peak": median * flops_per_text * (computed or 1) / peak if peak else None,
        "lowest_cosine": min(one["cosine"] for one in rounds),
        "padding_share": _median(one.get("padding") for one in rounds),
        "device_idle_share": _median(one.get("device_idle") for one in rounds),
        "backend": ", ".join(sorted({one.get("backend", "") for one in rounds})),
        "said_rows_per_s": _median(one.get("said_rows_per_s") for one in rounds),
        "start_s": _median(one.get("start_s") for one in rounds),
    }


def _peaks(peaks: Sequence[Found]) -> dict[str, list[float]]:
    """Return the best FLOP/s of each round, for each dtype."""
    return {dtype: [best(one[dtype])[1] for one in peaks] for dtype in (peaks[0] if peaks else {})}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratios(sets: dict[str, dict[str, Any]], device: str) -> list[Row]:
    """Return the ratios of medians for which both ways were measured, with targets where there are some."""
    rows = []
    for ratio in RATIOS:
        row: Row = {"over": ratio.over, "under": ratio.under}
        for name, target in zip(("short", "long"), ratio.targets or (None, None), strict=True):
            value = _value(ratio, sets.get(name, {}).get("ways", {}))
            if value is not None:
                has_target = target is not None and (ratio.everywhere or device == "cpu")
                row[name] = {"value": value, "target": target} if has_target else {"value": value}
        if len(row) > 2:
            rows.append(row)
    return rows


def _value(ratio: Ratio, ways: dict[str, Row]) -> float | None:
    if ratio.over not in ways:
        return None
    if ratio.under == PEAK:
        share: float | None = ways[ratio.over]["share_of_peak"]
        return share
    under = ways.get(ratio.under, {}).get("median")
    return ways[ratio.over]["median"] / under if under else None


def show(results: dict[str, Any]) -> None:
    """Print all results as tables."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in ("rates", "topology"):
        for name, one in results.get(part, {}).items():
            console.print(_ways_table(f"{part}: {name} texts", one))
    if results.get("peak_flops_per_s"):
        console.print(_peak_line(results["peak_flops_per_s"]))
    if results.get("batch_rates"):
        console.print(_batches_line(results["batch_rates"]))
    if results.get("ratios"):
        console.print(_ratios_table(results["ratios"]))
    if "cold" in results:
        console.print(_cold_line(results["cold"]))
    if "inline" in results:
        console.print(_inline_table(results["inline"]))
    for line in (*results["skipped"], *results["failed"]):
        console.print(line)


def _ways_table(title: str, one: dict[str, Any]) -> Table:
    about = f"{one['rows']:,} in shards of {one['shard_rows']:,}, {one['tokens_per_text']:.1f} tokens a text; texts/s"
    columns = ["median", "lowest", "highest", "computed", "of peak", "cosine", "padding", "idle", "backend"]
    table = _table(f"{title} ({about})", "way", *columns)
    for way, row in one["ways"].items():
        table.add_row(
            way,
            *(f"{row[name]:,.1f}" for name in ("median", "lowest", "highest")),
            _percent(row["computed_share"]),
            _percent(row["share_of_peak"]),
            f"{row['lowest_cosine']:.7f}",
            _percent(row["padding_share"]),
            _percent(row["device_idle_share"]),
            row["backend"],
        )
    return table


def _ratios_table(rows: list[Row]) -> Table:
    names = [name for name in ("short", "long") if any(name in row for row in rows)]
    table = _table("ratios of medians", "ratio", *(word for name in names for word in (name, "target", "")))
    for row in rows:
        cells = [cell for name in names for cell in _ratio_cells(row.get(name), row["under"] == PEAK)]
        table.add_row(f"{row['over']} / {row['under']}", *cells)
    return table


def _ratio_cells(one: Row | None, is_share: bool) -> tuple[str, str, str]:
    if one is None:
        return "", "", ""
    shown = f"{one['value']:.1%}" if is_share else f"{one['value']:.2f}"
    if "target" not in one:
        return shown, "", ""
    wanted = f"{one['target']:.0%}" if is_share else f"{one['target']:g}"
    return shown, wanted, "met" if one["value"] >= one["target"] else "MISSED"


def _peak_line(peaks: list[Found]) -> str:
    said = (
        f"{dtype} {statistics.median(rates) / 1e9:,.0f} GFLOP/s ({min(rates) / 1e9:,.0f} to {max(rates) / 1e9:,.0f}), by {_best_ways(peaks, dtype)}"
        for dtype, rates in _peaks(peaks).items()
    )
    return f"{PEAK}, median of the rounds: {'; '.join(said)}"


def _best_ways(peaks: list[Found], dtype: str) -> str:
    """Name what was at the peak, and what else each library came to at best."""
    ways = ", ".join(dict.fromkeys(best(one[dtype])[0] for one in peaks))
    of_torch = statistics.median(
        max(rate for way, rate in one[dtype].items() if way.startswith("torch")) for one in peaks
    )
    return f"{ways} (torch's best {of_torch / 1e9:,.0f})"


def _batches_line(found: dict[str, dict[str, dict[str, float]]]) -> str:
    said = (
        f"{name} {dtype}: " + ", ".join(f"{size}: {rate:,.1f}" for size, rate in rates.items())
        for name, of_dtypes in found.items()
        for dtype, rates in of_dtypes.items()
    )
    return f"encode's texts/s by batch size, on a sample. {'; '.join(said)}"


def _cold_line(cold: Row) -> str:
    ours, theirs = (statistics.median(cold[name] or [float("nan")]) for name in ("engine_s", "encode_s"))
    return (
        f"cold start, {cold['texts']:,} short texts, Parquet to Parquet, all included: engine {ours:.1f} s, "
        f"encode {theirs:.1f} s, engine / encode {ours / theirs:.2f}"
    )


def _inline_table(rows: list[Row]) -> Table:
    table = _table("engine.embed beside encode, warm, ms a call", "texts", "engine", "encode", "encode / engine")
    for row in rows:
        ours, theirs = row["engine_s"] * 1000, row["encode_s"] * 1000
        table.add_row(f"{row['texts']:,}", f"{ours:,.1f}", f"{theirs:,.1f}", f"{theirs / ours:.2f}")
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
