"""Progress, as a person watches it: a live line on a terminal and in notebooks, plain lines at a sane pace elsewhere."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from engine.events import PoolStarted, RunPlanned, ShardDone
from engine.wording import duration

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

WINDOW = 32
"""Shards over which a rate is taken: as many as smooth it, few enough to follow a pool that grows."""
SAME_MOMENT_S = 0.5
CELL_EVERY_S = 0.5
FIRST_MINUTE_S = 60.0
LINE_EVERY_S = (10.0, 60.0)
"""Between two plain lines: in the first minute, and later. A day's log has some 1,500 of them."""


@dataclass(slots=True)
class Meter:
    """How far a run is, and how fast."""

    pending_rows: int = 0
    rows: int = 0
    """Done in this run, the rejected among them."""
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    _marks: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _moment: float = 0.0
    """When the first of the shards came that are counted together with the last one."""

    def start(self) -> None:
        """Begin to count the time."""
        self.started = time.monotonic()
        self._marks.append((self.started, 0, 0))

    def add(self, event: ShardDone) -> None:
        """Count a shard."""
        self.rows += event.num_rows + event.num_rejects
        self.tokens += event.num_tokens
        now = time.monotonic()
        if len(self._marks) > 1 and now - self._moment < SAME_MOMENT_S:
            self._marks.pop()  # shards that travel together arrive together
        else:
            self._moment = now
        self._marks.append((now, self.rows, self.tokens))
        if len(self._marks) == 3 and self._marks[0][1] == 0:
            self._marks.popleft()  # the first shard carries the cold start

    @property
    def share(self) -> float:
        """Of what was pending, what is done: 0 to 1."""
        return self.rows / self.pending_rows if self.pending_rows else 1.0

    @property
    def rates(self) -> tuple[float, float]:
        """Rows and tokens per second over the last shards; zeros until one is done."""
        if len(self._marks) < 2:
            return 0.0, 0.0
        (then, rows, tokens), (now, more_rows, more_tokens) = self._marks[0], self._marks[-1]
        seconds = max(now - then, 1e-9)
        return (more_rows - rows) / seconds, (more_tokens - tokens) / seconds

    @property
    def left_s(self) -> float | None:
        """Seconds that are left; None as long as nothing tells."""
        rows_per_s, _ = self.rates
        if not rows_per_s:
            return None
        since_last = time.monotonic() - self._marks[-1][0]
        return max((self.pending_rows - self.rows) / rows_per_s - since_last, 0.0)


class Progress:
    """
    Shows the events of a run; a context manager, and the callable that `engine.runner.run` calls.

    Args:
        console: Where; on stderr, since stdout is for results.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._meter = Meter()
        self._next_line = 0.0
        self._bar: Bar | None = None
        self._cell = Cell() if console.is_jupyter else None
        if console.is_terminal and not self._cell:
            self._bar = Bar(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                _Facts(self._meter),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("planning", total=None)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, event: RunPlanned | PoolStarted | ShardDone) -> None:
        """Show what the event changes."""
        if isinstance(event, RunPlanned):
            self._meter.pending_rows = event.pending_rows
            done = event.num_rows - event.pending_rows
            kept = f"; {done:,} are done" if done else ""
            self._say("starting Ray", f"{event.pending_rows:,} rows in {event.pending_shards:,} shards to embed{kept}")
        elif isinstance(event, PoolStarted):
            self._meter.start()
            actors = f"{event.num_actors} {event.device} actor{'s' if event.num_actors != 1 else ''}"
            self._say("starting actors", f"starting {actors}")
        else:
            self._meter.add(event)
            if self._bar:
                self._bar.update(self._task, description="", total=self._meter.pending_rows, completed=self._meter.rows)
            elif self._cell:
                self._cell.show(f"{self._meter.share:4.0%}  {facts(self._meter)}", self._meter.share)
            elif time.monotonic() >= self._next_line or self._meter.rows >= self._meter.pending_rows:
                self._line(f"{self._meter.share:4.0%}  {facts(self._meter)}")
                is_young = time.monotonic() - self._meter.started < FIRST_MINUTE_S
                self._next_line = time.monotonic() + LINE_EVERY_S[0 if is_young else 1]

    def _say(self, description: str, line: str) -> None:
        if self._bar:
            self._bar.update(self._task, description=description)
        elif self._cell:
            self._cell.show(line)
        else:
            self._line(line)

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


class Cell:
    """
    A line below a notebook's cell that changes while the cell runs.

    It is plain HTML, updated by its display id: Jupyter and VS Code both show that, and keep it with the notebook. Rich's own live
    display needs widgets, which VS Code fetches over the network and many servers do not have.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._next = 0.0

    def show(self, text: str, share: float | None = None) -> None:
        """Replace the line, not more often than a person can read; the last one is always shown."""
        now = time.monotonic()
        if share is not None and share < 1 and now < self._next:
            return
        self._next = now + CELL_EVERY_S
        bar = "" if share is None else f'<progress value="{share:.4f}" max="1" style="width:12em"></progress> '
        shown = {"text/plain": text, "text/html": f"<div>{bar}<code>{escape(text)}</code></div>"}
        if self._handle is None:
            from IPython.display import display

            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


class _Facts(ProgressColumn):
    """What a run's live line says beside its bar; the time left goes on between shards."""

    max_refresh = 0.5

    def __init__(self, meter: Meter) -> None:
        super().__init__(Column(no_wrap=True))
        self._meter = meter

    def render(self, task: Task) -> Text:  # noqa: ARG002 - rich's interface
        """Return the facts, once there are any."""
        return Text(f"{self._meter.share:.0%}  {facts(self._meter)}" if self._meter.rows else "")


def facts(meter: Meter) -> str:
    """Return how far and how fast, on half a line."""
    rows_per_s, tokens_per_s = meter.rates
    said = [f"{_short(meter.rows)}/{_short(meter.pending_rows)} rows", f"{_rounded(rows_per_s)} rows/s"]
    if tokens_per_s:
        said.append(f"{_rounded(tokens_per_s)} tok/s")
    if meter.left_s is not None and meter.rows < meter.pending_rows:
        said.append(f"{duration(meter.left_s)} left")
    return "  ".join(said)


def _rounded(rate: float) -> str:
    return _short(rate) if rate >= 10 else f"{rate:.2g}"


def _short(number: float) -> str:
    """Return a number of at most six characters."""
    if number < 100_000:
        return f"{number:,.0f}"
    unit, size = next((unit, size) for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)) if number >= size)
    amount = number / size
    return f"{amount:,.{0 if amount >= 100 else 1 if amount >= 10 else 2}f}{unit}"
