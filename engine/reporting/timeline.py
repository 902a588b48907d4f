"""
The timeline: how fast an output grew, from when each shard was made.

A shard's rows are spread evenly over the seconds that it took. Only changes of the rate are kept, in slots that become wider as
their number grows: memory is bounded however many shards there are and however many days lie between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

MAX_SLOTS = 4096
IDLE_S = 120
"""Seconds without work that end a session; the plot leaves them out."""
MAX_BARS = 80
SHARDS_A_BAR = 4
"""At least, on average: small shards that went through the model together are done in the same second."""
ROUND_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class _Slot:
    """What changes within a slot: what is done in it beside that at the rate before, and how the rate is another after it."""

    rows: float = 0.0
    tokens: float = 0.0
    row_rate: float = 0.0
    token_rate: float = 0.0
    num_active: int = 0


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of time, and what was done in it."""

    at: datetime
    """When it began, UTC."""
    offset_s: float
    """Seconds of work before it, idle times left out."""
    width_s: float
    rows_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Session:
    """A stretch of work without a long pause."""

    start: datetime
    stop: datetime
    bars: list[Bar]

    @property
    def seconds(self) -> float:
        """How long it was."""
        return (self.stop - self.start).total_seconds()


class Timeline:
    """Takes in shards one by one, in any order, and gives the sessions that they were made in."""

    def __init__(self) -> None:
        self._width = 1.0
        self._slots: dict[int, _Slot] = {}
        self._num_shards = 0
        self.num_undated = 0
        """Shards whose record does not say when they were made."""

    def add(self, created_at: str, took_s: float, num_rows: int, num_tokens: int) -> None:
        """Take in a shard that was done at `created_at` (ISO 8601) after `took_s` seconds."""
        try:
            stop = (datetime.fromisoformat(created_at).astimezone(UTC) - EPOCH).total_seconds()
        except ValueError:
            self.num_undated += 1
            return
        self._num_shards += 1
        took_s = max(took_s, 1.0)  # of a record, times are whole seconds
        row_rate, token_rate = num_rows / took_s, num_tokens / took_s
        self._change(stop - took_s, row_rate, token_rate, 1)
        self._change(stop, -row_rate, -token_rate, -1)
        while len(self._slots) > MAX_SLOTS:
            self._widen()

    def sessions(self) -> list[Session]:
        """Return the sessions in order, each cut into bars of about the same length."""
        spans = list(self._spans())
        total = sum(stop - start for start, stop in spans)
        num_bars = max(1, min(MAX_BARS, self._num_shards // SHARDS_A_BAR))
        width = next((number for number in ROUND_S if number >= total / num_bars), ROUND_S[-1])
        times, done = self._done()
        found: list[Session] = []
        offset = 0.0
        for start, stop in spans:
            edges = np.linspace(start, stop, max(1, round((stop - start) / width)) + 1)
            rows, tokens = (np.diff(np.interp(edges, times, column)) / np.diff(edges) for column in done.T)
            bars = [
                Bar(_moment(edge), offset + edge - start, edges[1] - edges[0], max(a_row, 0.0), max(a_token, 0.0))
                for edge, a_row, a_token in zip(edges, rows.tolist(), tokens.tolist(), strict=False)
            ]
            found.append(Session(_moment(start), _moment(stop), bars))
            offset += stop - start
        return found

    def _change(self, at: float, row_rate: float, token_rate: float, num_active: int) -> None:
        """Let the rates change by so much a second from `at` on."""
        # A stop on the edge of two slots is the former's: else a session would be a slot longer than it was.
        number = math.floor(at / self._width) if num_active > 0 else math.ceil(at / self._width) - 1
        left_s = (number + 1) * self._width - at
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = _Slot()
        slot.rows += row_rate * left_s
        slot.tokens += token_rate * left_s
        slot.row_rate += row_rate
        slot.token_rate += token_rate
        slot.num_active += num_active

    def _widen(self) -> None:
        """Merge slots two by two; what was done in each merged slot stays exact."""
        merged: dict[int, _Slot] = {}
        for number, slot in self._slots.items():
            into = merged.setdefault(number // 2, _Slot())
            after_s = self._width if number % 2 == 0 else 0.0
            into.rows += slot.rows + slot.row_rate * after_s
            into.tokens += slot.tokens + slot.token_rate * after_s
            into.row_rate += slot.row_rate
            into.token_rate += slot.token_rate
            into.num_active += slot.num_active
        self._slots, self._width = merged, self._width * 2

    def _spans(self) -> Iterator[tuple[float, float]]:
        """Yield when each session starts and stops, in seconds since 1970."""
        start: float | None = None
        stop, num_active = 0.0, 0
        for number in sorted(self._slots):
            begins = number * self._width
            if start is not None and not num_active and begins - stop > IDLE_S:
                yield start, stop
                start = None
            start = begins if start is None else start
            stop = begins + self._width
            num_active += self._slots[number].num_active
        if start is not None:
            yield start, stop

    def _done(self) -> tuple[Any, Any]:
        """Return the edges of all slots in seconds since 1970, and the rows and tokens that were done until each, shape (edges, 2)."""
        times: list[float] = []
        done: list[Any] = []
        rate, total, last = np.zeros(2), np.zeros(2), 0.0
        for number in sorted(self._slots):
            slot, begins = self._slots[number], number * self._width
            total = total + rate * (begins - last if times else 0.0)
            last = begins + self._width
            times += [begins, last]
            done += [total, total + rate * self._width + (slot.rows, slot.tokens)]
            total = done[-1]
            rate = rate + np.array([slot.row_rate, slot.token_rate])
        return np.array(times), np.array(done).reshape(-1, 2)


def _moment(seconds: float) -> datetime:
    return EPOCH + timedelta(seconds=float(seconds))
