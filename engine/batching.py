"""Batching: pack texts under a budget of padded tokens. Pure."""

from __future__ import annotations

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
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        rows = max(max_tokens // longest, 1)
        if max_rows is not None:
            rows = min(rows, max_rows)
        batches.append(order[start : start + rows])
        start += rows
    return batches
