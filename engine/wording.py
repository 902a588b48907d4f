"""Wording: numbers as people say them, on a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal


def count(number: int, noun: str) -> str:
    """Return a number with its noun: 1 row, 2,000 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rejects(number: int, reasons: Mapping[str, int]) -> str:
    """Return how many rows were rejected, and why."""
    if not number:
        return "nothing"
    return f"{count(number, 'row')}: " + ", ".join(f"{times:,} x {reason}" for reason, times in reasons.items())


def repeated_ids(number: int) -> str:
    """Return how many rows repeat an id of their shard."""
    return f"{count(number, 'row')} repeat{'s' if number == 1 else ''} an id of the same shard, and {'is' if number == 1 else 'are'} kept"


def size(num_bytes: float) -> str:
    """Return bytes as people say them: 512 bytes, 1.2 kB, 34 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def dollars(amount: float) -> str:
    """Return an amount of money, small ones to three digits."""
    return f"${amount:,.2f}" if amount >= 1 else f"${Decimal(f'{amount:.3g}'):f}"


def retries(number: int) -> str:
    """Return 1 retry, 2 retries."""
    return "1 retry" if number == 1 else f"{number:,} retries"


def reused(number: int) -> str:
    """Say of how many rows the vectors were there already."""
    return f"{count(number, 'row')} of them: their vectors were there already"


def snippet(text: str, width: int) -> str:
    """Return the beginning of a text on one line of `width` characters at most."""
    line = " / ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= width else line[: width - 1] + "…"


def duration(seconds: float) -> str:
    """Return seconds as people say them: 9 s, 2:05 min, 3:10 h, 4 d 2 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
