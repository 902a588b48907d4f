"""The figures: what Plotly is asked to draw, as plain data. Colours of text and grid are the page's, which knows light from dark."""

from __future__ import annotations

import html
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from engine.reporting.facts import STEPS, bin_of
from engine.reporting.projection import OTHER
from engine.reporting.sample import shown

if TYPE_CHECKING:
    from engine.reporting.projection import Map
    from engine.reporting.sample import Sample
    from engine.reporting.timeline import Session

Figure = dict[str, Any]

PALETTE = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d", "#ff9da6", "#79706e")
GREY = "#9aa0a6"
HOVER_WIDTH = 44
"""Characters to a line: what a narrow window has room for."""
UNITS = ((172_800, 86_400, "days"), (7200, 3600, "hours"), (300, 60, "minutes"), (0, 1, "seconds"))
"""From how many seconds on, seconds in one, name."""
MAX_MARKS = 6
"""Sessions that are told apart by lines."""


def throughput(sessions: Sequence[Session], tokens_per_s_limit: float | None) -> Figure | None:
    """Draw rows and tokens a second over the time that was worked."""
    bars = [bar for session in sessions for bar in session.bars]
    total = sum(session.seconds for session in sessions)
    if not bars:
        return None
    scale, unit = next((seconds, name) for least, seconds, name in UNITS if total >= least)
    place = {
        "type": "bar",
        "x": [_short((bar.offset_s + bar.width_s / 2) / scale) for bar in bars],
        "width": [_short(bar.width_s / scale) for bar in bars],
        "text": [f"{bar.at:%Y-%m-%d %H:%M:%S} UTC" for bar in bars],
        "textposition": "none",
        "showlegend": False,
    }
    rows = place | {
        "y": [_short(bar.rows_per_s) for bar in bars],
        "marker": {"color": PALETTE[0]},
        "hovertemplate": "%{text}<br>%{y:,.4~g} rows/s<extra></extra>",
    }
    has_tokens = any(bar.tokens_per_s for bar in bars)
    layout: Figure = {
        "bargap": 0,
        "height": 420 if has_tokens else 260,
        "xaxis": {
            "title": {"text": f"{unit} of work"},
            "range": [0, total / scale],
            "anchor": "y2" if has_tokens else "y",
        },
        "yaxis": {"title": {"text": "rows/s"}, "rangemode": "tozero", "domain": [0.55, 1] if has_tokens else [0, 1]},
        "shapes": [],
    }
    data = [rows]
    if has_tokens:
        data.append(
            place
            | {
                "y": [_short(bar.tokens_per_s) for bar in bars],
                "marker": {"color": PALETTE[1]},
                "yaxis": "y2",
                "hovertemplate": "%{text}<br>%{y:,.4~g} tokens/s<extra></extra>",
            }
        )
        layout["yaxis2"] = {"title": {"text": "tokens/s"}, "rangemode": "tozero", "domain": [0, 0.45]}
    if has_tokens and tokens_per_s_limit:
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y2", "y0": tokens_per_s_limit}
        layout["shapes"].append(
            line | {"y1": tokens_per_s_limit, "line": {"dash": "dash", "width": 1.5, "color": PALETTE[3]}}
        )
        layout["yaxis2"]["range"] = [0, max(tokens_per_s_limit, *(bar.tokens_per_s for bar in bars)) * 1.08]
    if 1 < len(sessions) <= MAX_MARKS:
        layout["shapes"] += [_mark(session.bars[0].offset_s / scale) for session in sessions[1:]]
    return {"data": data, "layout": layout}


def lengths(bins: Mapping[int, int], unit: str, rows: str) -> Figure | None:
    """Draw how many rows have texts of which length, on a scale on which each step doubles."""
    if not bins:
        return None
    first, last = min(bins), max(bins)
    numbers = list(range(first, last + 1))
    edges = [2 ** (number / STEPS) for number in [*numbers, last + 1]]
    ticks = range(
        math.floor(first / STEPS), math.ceil((last + 1) / STEPS) + 1, max(1, (last - first) // STEPS // 7 + 1)
    )
    bars = {
        "type": "bar",
        "x": [number / STEPS + 0.5 / STEPS for number in numbers],
        "y": [bins.get(number, 0) for number in numbers],
        "width": 1 / STEPS,
        "text": [
            f"{math.ceil(low):,} to {max(math.ceil(low), math.ceil(high) - 1):,} {unit}"
            for low, high in pairwise(edges)
        ],
        "textposition": "none",
        "marker": {"color": PALETTE[2]},
        "hovertemplate": f"%{{text}}<br>%{{y:,}} {rows}<extra></extra>",
    }
    axis = {"title": {"text": unit}, "tickvals": list(ticks), "ticktext": [f"{2**tick:,}" for tick in ticks]}
    layout = {"bargap": 0.05, "height": 260, "xaxis": axis, "yaxis": {"title": {"text": rows}, "rangemode": "tozero"}}
    return {"data": [bars], "layout": layout}


def character_bins(sample: Sample) -> Counter[int]:
    """Count the sampled texts by the bin of their length in characters."""
    return Counter(bin_of(length) for length in sample.lengths if length)


def points(found: Map, sample: Sample) -> Figure:
    """Draw the map: a point a row, its text or its id on hover."""
    hover = [_hover(sample, row) for row in range(len(sample))]
    axis = {"showgrid": False, "zeroline": False, "showticklabels": False, "showline": False, "title": {"text": ""}}
    layout: Figure = {
        "height": 620,
        "hovermode": "closest",
        "xaxis": axis,
        "yaxis": axis | {"scaleanchor": "x"},
        "legend": {
            "title": {"text": html.escape(found.colored_by, quote=False), "side": "top"},
            "itemsizing": "constant",
        },
        "margin": {"l": 4, "r": 4, "t": 34, "b": 4},
    }
    if found.numbers is not None:
        marker = {
            "color": found.numbers,
            "colorscale": "Viridis",
            "showscale": True,
            "colorbar": _colorbar(found.colored_by),
        }
        return {"data": [_cloud(found, range(len(sample)), hover, marker)], "layout": layout}
    groups = found.groups or []
    counts = Counter(groups)
    order = sorted(counts, key=lambda group: (group == OTHER, -counts[group], group))
    data = []
    for number, group in enumerate(order):
        rows = [row for row, own in enumerate(groups) if own == group]
        color = GREY if group == OTHER else PALETTE[number % len(PALETTE)]
        name = html.escape(textwrap.shorten(group, 40, placeholder="…") or "(empty)", quote=False)
        data.append(_cloud(found, rows, hover, {"color": color}) | {"name": f"{name} ({counts[group]:,})"})
    layout["showlegend"] = len(order) > 1
    return {"data": data, "layout": layout}


def _cloud(found: Map, rows: Sequence[int], hover: Sequence[str], marker: Figure) -> Figure:
    size = 4 if len(hover) > 2000 else 6 if len(hover) > 300 else 8
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [round(float(found.points[row, 0]), 4) for row in rows],
        "y": [round(float(found.points[row, 1]), 4) for row in rows],
        "text": [hover[row] for row in rows],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": marker | {"size": size, "opacity": 0.75},
    }


def _hover(sample: Sample, row: int) -> str:
    """Return what Plotly shows over a point: it knows a few tags of HTML, so all that is not ours is escaped."""
    lines = [f"<b>{html.escape(textwrap.shorten(sample.ids[row], HOVER_WIDTH, placeholder='…'), quote=False)}</b>"]
    if sample.texts is not None:
        lines += [html.escape(line, quote=False) for line in textwrap.wrap(sample.texts[row], HOVER_WIDTH)]
    if sample.colors is not None:
        lines.append(f"<i>{html.escape(shown(sample.colors[row])[:HOVER_WIDTH], quote=False)}</i>")
    return "<br>".join(lines)


def _colorbar(title: str) -> Figure:
    return {
        "title": {"text": html.escape(title, quote=False), "side": "top"},
        "orientation": "h",
        "thickness": 12,
        "y": -0.02,
        "yanchor": "top",
        "outlinewidth": 0,
    }


def _mark(at: float) -> Figure:
    return {
        "type": "line",
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "x0": at,
        "x1": at,
        "line": {"dash": "dot", "width": 1, "color": GREY},
    }


def _short(number: float) -> float:
    return float(f"{number:.6g}")
