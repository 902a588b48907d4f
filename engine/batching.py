"""Batching: pack texts under a budget of padded tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]

ALIKE = 0.92
"""Of the longest text's tokens: a text with fewer begins a batch of its own kind, if the one before is full enough."""
FULL_ENOUGH = 0.25
"""Of the rows that a batch may have. Fewer would make its call dear, and save little padding."""


def pack(lengths: npt.NDArray[Any], *, max_tokens: int, max_rows: int | None = None) -> list[Positions]:
    """
    Group texts of near-equal length into batches.

    Args:
        lengths: Tokens of each text, shape (texts,).
        max_tokens: Padded tokens a batch: its rows times its longest text. A longer text is a batch of its own.
        max_rows: Texts a batch.

    Returns:
        Positions into `lengths`, each exactly once. The longest texts come first, so that memory peaks in the first batch and
        the last ones, which end a shard, are short. A batch that is full enough ends where texts get much shorter,
        since each of those would be padded to its longest.
    """
    return [batch for _, batch in pack_in_turns(lengths, [max_tokens], max_rows=max_rows)]


def pack_in_turns(
    lengths: npt.NDArray[Any], budgets: Sequence[int], *, max_rows: int | None = None
) -> list[tuple[int, Positions]]:
    """
    Pack under several budgets that take turns, as `pack` does under one, so that they can be compared.

    Each has as many padded tokens of a turn as the largest, and all of them see texts of all lengths; a batch is as full as
    it would be under its budget alone.

    Returns:
        The batches, longest first, each with its budget.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    falling = -lengths[order]
    turns = cycle([budget for budget in budgets for _ in range(max(budgets) // budget)])
    batches = []
    start = 0
    while start < len(order):
        budget = next(turns)
        rows = max(budget // max(-int(falling[start]), 1), 1)
        if max_rows is not None:
            rows = min(rows, max_rows)
        alike = int(np.searchsorted(falling[start : start + rows], ALIKE * falling[start], side="right"))
        rows = max(alike, round(FULL_ENOUGH * rows), 1)
        batches.append((budget, order[start : start + rows]))
        start += rows
    return batches
