"""The batch size at which something is fastest, found by trying sizes, and sizes beyond them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def searched(rate_of: Callable[[int], float], sizes: Sequence[int], most: int) -> dict[int, float]:
    """
    Measure batch sizes; while the best of them is the largest or the smallest, the next size too.

    Args:
        rate_of: Measures a size once; 0 if it is too large.
        sizes: To begin with; those beyond `most` are left out.
        most: Texts that there are.

    Returns:
        The best rate of each size: each had two turns, the best sizes more.
    """
    rates: dict[int, float] = {}

    def take_turns(some: Sequence[int]) -> None:
        for size in (*some, *some):
            rates[size] = max(rates.get(size, 0.0), rate_of(size))

    take_turns([size for size in sizes if size <= most] or [min(sizes)])
    while (beyond := next_size(rates, most)) is not None:
        take_turns([best_size(rates), beyond])
    return rates


def best_size(rates: dict[int, float]) -> int:
    """Return the fastest size."""
    return max(rates, key=lambda size: rates[size])


def next_size(rates: dict[int, float], most: int) -> int | None:
    """Return the size to try next: twice the largest or half of the smallest, if that is the best so far; None at a peak."""
    best = best_size(rates)
    if best == max(rates) and 2 * best <= most:
        return 2 * best
    if best == min(rates) and best > 1:
        return best // 2
    return None
