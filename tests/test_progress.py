"""Progress: what a person sees of a run while it goes on."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from engine.events import PoolStarted, RunPlanned, ShardDone
from engine.progress import Meter, Progress
from engine.wording import duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr("engine.progress.time.monotonic", lambda: Clock.now)
    return Clock


def shown(events, clock, *, is_terminal: bool = False, seconds: float = 1.0) -> str:
    """Show events, one every `seconds`; return what is on the screen."""
    screen = io.StringIO()
    with Progress(Console(file=screen, force_terminal=is_terminal, width=80, color_system=None)) as progress:
        for event in events:
            progress(event)
            clock.now += seconds
    return screen.getvalue()


def run_of(num_shards: int):
    yield RunPlanned(
        pending_rows=100 * num_shards, pending_shards=num_shards, num_rows=100 * num_shards + 50, output="out"
    )
    yield PoolStarted(2, "GPU")
    for _ in range(num_shards):
        yield ShardDone(num_rows=98, num_rejects=2, num_tokens=1500, num_bytes=1)


def test_plain_lines_come_at_a_sane_pace(clock):
    """Where nobody can see a live line: one at once, then every ten seconds, then every minute, and one at the end."""
    lines = shown(run_of(600), clock).splitlines()
    assert lines[:2] == ["60,000 rows in 600 shards to embed; 50 are done", "starting 2 GPU actors"]
    shares = [int(line.split("%")[0]) for line in lines[2:]]
    assert 13 <= len(shares) <= 18
    assert shares == sorted(shares)
    assert shares[-1] == 100


def test_a_line_has_rows_tokens_rates_and_the_time_left(clock):
    """Rates without the cold start: the first shard took long, and does not count any more."""
    meter = Meter(pending_rows=1000)
    meter.start()
    clock.now += 60
    for _ in range(4):
        meter.add(ShardDone(100, 0, 2000, 1))
        clock.now += 2
    assert meter.share == 0.4
    assert meter.rates == (50, 1000)
    assert meter.left_s == pytest.approx(600 / 50 - 2)
    line = shown(run_of(10), clock).splitlines()[-1]
    assert re.fullmatch(r"100%  1,000/1,000 rows  100 rows/s  1,500 tok/s", line)


@pytest.mark.parametrize("gap_s", [0.05, 0.3, 0.45])
def test_of_shards_that_come_fast_the_rate_is_that_of_the_last_ones(clock, gap_s):
    """Many GPUs, or an API: the start does not count for ever, nor do the first minutes of a pool that has grown."""
    meter = Meter(pending_rows=10**6)
    meter.start()
    clock.now += 60
    for speed in (1, 2):
        for _ in range(int(60 / gap_s)):
            meter.add(ShardDone(100 * speed, 0, 2000, 1))
            clock.now += gap_s
        assert meter.rates[0] == pytest.approx(100 * speed / gap_s, rel=0.05)


def test_before_the_first_shard_nothing_is_claimed(clock):
    """No rate and no time left out of thin air."""
    meter = Meter(pending_rows=1000)
    meter.start()
    assert (meter.rates, meter.left_s) == ((0, 0), None)


def test_on_a_terminal_there_is_one_live_line(clock):
    """It fits 80 columns, is redrawn in place, and is gone at the end."""
    screen = shown(run_of(20), clock, is_terminal=True)
    assert "100%  2,000/2,000 rows" in screen
    assert screen.endswith("\x1b[2K")  # the line is cleared, not left behind
    drawn = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen))
    assert max(len(line) for line in drawn) <= 80


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.4, "59 s"), (125, "2:05 min"), (11_400, "3:10 h"), (353_000, "4 d 2 h")]
)
def test_durations_are_said_as_people_do(seconds, said):
    """In the two units that matter."""
    assert duration(seconds) == said


def test_a_live_line_of_a_large_job_fits_80_columns(clock):
    """A billion rows, thousands a second, days to go."""
    events = [
        RunPlanned(pending_rows=1_234_567_890, pending_shards=75_352, num_rows=1_234_567_890, output="out"),
        PoolStarted(8, "GPU"),
        *[ShardDone(num_rows=16_384, num_rejects=0, num_tokens=3_276_800, num_bytes=1)] * 8,
    ]
    screen = shown(events, clock, is_terminal=True)
    drawn = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen))
    assert any(line.rstrip().endswith("left") for line in drawn)
    assert max(len(line) for line in drawn) <= 80
