"""Batching: pack texts under a budget of padded tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]

ALIKE = 0.92
"""Of the longest text's tokens: a text with fewer begins a batch of its own kind, if the one before is full enough."""
FULL_ENOUGH = 0.25
"""Of the rows that a batch may have. Fewer would make its call dear, and save little padding."""
SMALLER = 0.85
"""Of a budget: the next one that is tried, to spread few texts over streams."""
SHARED = 0.7
"""Of its speed, what a core keeps that computes a batch together with others, which wake up for it, and wait for each other."""


def pack(
    lengths: npt.NDArray[Any], *, max_tokens: int, max_rows: int | None = None, full_enough: float = FULL_ENOUGH
) -> list[Positions]:
    """
    Group texts of near-equal length into batches.

    Args:
        lengths: Tokens of each text, shape (texts,).
        max_tokens: Padded tokens a batch: its rows times its longest text. A longer text is a batch of its own.
        max_rows: Texts a batch.
        full_enough: Of the rows that a batch may have, those from which on it may end early; with 1, none does.

    Returns:
        Positions into `lengths`, each exactly once. The longest texts come first, so that memory peaks in the first batch and
        the last ones, which end a shard, are short. A batch that is full enough ends where texts get much shorter,
        since each of those would be padded to its longest.
    """
    packed = pack_in_turns(lengths, [max_tokens], max_rows=max_rows, full_enough=full_enough)
    return [batch for _, batch in packed]


def pack_in_turns(
    lengths: npt.NDArray[Any], budgets: Sequence[int], *, max_rows: int | None = None, full_enough: float = FULL_ENOUGH
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
        rows = max(alike, round(full_enough * rows), 1)
        batches.append((budget, order[start : start + rows]))
        start += rows
    return batches


def pack_for_streams(
    lengths: npt.NDArray[Any],
    *,
    max_tokens: int,
    num_streams: int,
    call_tokens: int,
    can_share: bool,
    max_rows: int | None = None,
) -> list[Positions]:
    """
    Pack few texts so that several streams, each with cores of its own, are done with all of them soonest.

    Under one budget few texts make one batch, for which one stream computes and the others wait; or two, of which the second is
    small. So smaller budgets are tried too, and for each is counted when the last stream would be done. Of more texts than fill a
    batch for each stream the rest weighs little, and they are packed as by `pack`.

    Args:
        lengths: Tokens of each text, shape (texts,).
        max_tokens: Padded tokens a batch.
        num_streams: That take batches, one after the other.
        call_tokens: What a call costs, beside its padded tokens, in tokens.
        can_share: Whether streams without a batch of their own lend their cores to the others.
        max_rows: Texts a batch.

    Returns:
        As of `pack`.
    """
    lengths = np.asarray(lengths, np.int64)
    if num_streams == 1 or len(lengths) < 2 or int(lengths.sum()) > num_streams * max_tokens:
        return pack(lengths, max_tokens=max_tokens, max_rows=max_rows)
    longest = max(int(lengths.max()), 1)
    budget = min(max_tokens, len(lengths) * longest)
    soonest, best = float("inf"), list[Positions]()
    while True:
        batches = pack(lengths, max_tokens=budget, max_rows=max_rows, full_enough=1)
        num_shares = max(num_streams // len(batches), 1) if can_share else 1
        speed = num_shares * SHARED if num_shares > 1 else 1
        done = [0.0] * num_streams
        for batch in batches:
            heapreplace(done, done[0] + len(batch) * int(lengths[batch[0]]) / speed + call_tokens)
        end = max(*done, len(batches) * call_tokens / 2)  # half of a call is Python's, which makes one at a time
        if end < soonest:
            soonest, best = end, batches
        if budget <= longest:
            return best
        budget = max(int(budget * SMALLER), longest)
