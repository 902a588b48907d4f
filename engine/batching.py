"""Batching: pack texts under a budget of padded tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


def pack(lengths: npt.NDArray[Any], *, max_tokens: int, max_rows: int | None = None) -> list[Positions]:
    """
    Group texts of near-equal length into batches.

    Args:
        lengths: Tokens of each text, shape (texts,).
        max_tokens: Padded tokens a batch: its rows times its longest text. A longer text is a batch of its own.
        max_rows: Texts a batch.

    Returns:
        Positions into `lengths`, each exactly once. The longest texts come first, so that memory peaks in the first batch and
        the last ones, which end a shard, are short.
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
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    turns = cycle([budget for budget in budgets for _ in range(max(budgets) // budget)])
    batches = []
    start = 0
    while start < len(order):
        budget = next(turns)
        rows = max(budget // max(int(lengths[order[start]]), 1), 1)
        if max_rows is not None:
            rows = min(rows, max_rows)
        batches.append((budget, order[start : start + rows]))
        start += rows
    return batches
