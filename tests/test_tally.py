"""The tally: what is counted of a run, and how fast it is said to be."""

from __future__ import annotations

import pytest

from engine.commits import OTHER_REASONS, Receipt
from engine.tally import MAX_REASONS, Tally


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""

    class Clock:
        now = 100.0

    monkeypatch.setattr("engine.tally.time.perf_counter", lambda: Clock.now)
    return Clock


def receipt(num_rows: int = 100, reasons: str = "{}") -> Receipt:
    return Receipt(
        shard_id="x",
        num_rows=num_rows,
        num_rejects=0,
        num_tokens=0,
        num_padded_tokens=0,
        embed_s=0.0,
        busy_s=0.0,
        num_bytes=0,
        outcome="committed",
        reasons=reasons,
        device="cpu",
        backend="",
    )


def tally_of(clock, times: list[float]) -> Tally:
    tally = Tally(started=0.0)
    for clock.now in times:
        tally.add_streamed(receipt())
    return tally


@pytest.mark.parametrize(
    ("times", "rows_per_s"),
    [
        ([50, 60, 70], 10),  # after the first, which carries the cold start
        ([50, 50.001, 60], 10),  # two that came together count as the first
        ([50], 2),  # a single one: of the whole run
        ([50, 50.001, 50.002], 6),  # all together: of the whole run too
    ],
)
def test_the_rate_leaves_the_cold_start_out_if_it_can(clock, times, rows_per_s):
    """Rows per second between the first moment with a shard and the last."""
    assert tally_of(clock, times).rows_per_s == pytest.approx(rows_per_s, rel=0.01)


def test_reasons_that_are_all_different_are_added_up():
    """A provider may word each anew: the driver's memory does not grow with them."""
    tally = Tally()
    for number in range(2 * MAX_REASONS):
        tally.add(receipt(reasons=f'{{"reason {number}": 1}}'))
    assert len(tally.reasons) == MAX_REASONS + 1
    assert tally.reasons[OTHER_REASONS] == MAX_REASONS
