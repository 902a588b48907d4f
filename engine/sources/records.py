"""Records: where lines, and the records of CSV, begin and end in bytes, found a buffer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from engine.schema import START, Place

MIB = 1024**2
READ_BYTES = MIB
MAX_RECORD_BYTES = 256 * MIB
"""A record is held whole, as bytes, as Python's objects and as Arrow's: a longer one is a reject."""
MAX_QUOTED_BYTES = 64 * MIB
"""How far from the start of its record a quote of CSV may be closed: one that never is must not swallow the rest of a file."""
TOO_LONG = f"longer than {MAX_RECORD_BYTES // MIB} MiB"
UNCLOSED = "a quote in it is not closed"

BOM = b"\xef\xbb\xbf"
NEWLINE, RETURN, QUOTE = b'\n\r"'

Positions = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Records that lie one after the other in some bytes, with what belongs to no record between them."""

    data: bytes
    starts: Positions
    ends: Positions
    """Behind the newline of each record."""
    offset: int
    """Of `data` in the file, or in what is decompressed of it."""
    row: int
    """Of the first record."""
    line: int
    """Newlines before `data`."""
    faults: Mapping[int, str] = field(default_factory=dict)
    """Position and reason of each record that was not found to its end."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def stop(self) -> int:
        """The row after the last."""
        return self.row + len(self)

    def part(self, first: int, last: int) -> Chunk:
        """Return the records `first` to `last` alone."""
        faults = {at - first: reason for at, reason in self.faults.items() if first <= at < last}
        return replace(
            self, starts=self.starts[first:last], ends=self.ends[first:last], row=self.row + first, faults=faults
        )

    def place(self, at: int) -> Place:
        """Return from where the record `at` can be read."""
        start = int(self.starts[at])
        return Place(self.row + at, self.offset + start, self.line + self.data.count(b"\n", 0, start))

    def records(self) -> list[bytes]:
        """Return the bytes of each record, with its newline; of those at fault, none."""
        data = self.data
        found = [data[start:end] for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True)]
        for at in self.faults:
            found[at] = b""
        return found


class WrongEncoding(Exception):
    """A file is not UTF-8 as a whole."""


def without_bom(head: bytes) -> tuple[bytes, int]:
    """
    Take the mark of UTF-8 from the first bytes of a file; return what is left, and how many bytes that was.

    Raises:
        WrongEncoding: If they are UTF-16 or UTF-32.
    """
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise WrongEncoding
    return (head[len(BOM) :], len(BOM)) if head.startswith(BOM) else (head, 0)


class Splitter(Protocol):
    """Finds the ends of records. What it finds depends on the file alone, not on how its bytes come."""

    def ends(self, data: bytes, *, is_last: bool) -> tuple[Positions, dict[int, str]]:
        """
        Find the records in `data`, which begins with one.

        Args:
            data: Bytes, of which the last record may lack its end.
            is_last: Nothing comes after them.

        Returns:
            Where each whole record ends, and the reasons of those that were cut short, by position.
        """

    def are_rows(self, data: bytes, starts: Positions, ends: Positions) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Tell rows from blank lines; None if all are rows."""


class Lines:
    """A record a line, ended by a newline, or by the end of the file."""

    def __init__(self, *, blank_is_row: bool) -> None:
        self._blank_is_row = blank_is_row

    def ends(self, data: bytes, *, is_last: bool) -> tuple[Positions, dict[int, str]]:
        """Find the newlines."""
        found = _positions(data, NEWLINE) + 1
        if is_last and (not len(found) or found[-1] < len(data)):
            found = np.append(found, len(data))
        return found, {}

    def are_rows(self, data: bytes, starts: Positions, ends: Positions) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Tell lines of white space alone from others, if they are no rows."""
        return None if self._blank_is_row else _not_blank(data, starts, ends, None)


class Quoted:
    """
    Records of CSV: a newline between quotes is part of a field.

    A quote opens a field only where one begins, as in Python's `csv`; elsewhere it is a character. Where all quotes of a buffer
    stand as RFC 4180 has them, whether a newline is between quotes is told by counting them; other buffers are walked through.
    """

    def __init__(self, delimiter: str) -> None:
        self._delimiter = ord(delimiter)
        self._field_end = re.compile(b"[\n" + re.escape(delimiter.encode()) + b"]")

    def ends(self, data: bytes, *, is_last: bool) -> tuple[Positions, dict[int, str]]:
        """Find the newlines that are not between quotes."""
        quotes = _positions(data, QUOTE)
        newlines = _positions(data, NEWLINE)
        found = np.zeros(0, np.int64)
        if self._is_regular(data, quotes):
            found = newlines[np.searchsorted(quotes, newlines) % 2 == 0] + 1
            if len(found) and np.diff(found, prepend=0).max() > MAX_QUOTED_BYTES:
                found = found[:0]
            walks = is_last or len(data) - (found[-1] if len(found) else 0) > MAX_QUOTED_BYTES
        else:
            walks = True
        if not walks:
            return found, {}
        rest, faults = self._walk(data, int(found[-1]) if len(found) else 0, is_last)
        return np.concatenate([found, np.array(rest, np.int64)]), {len(found) + at: why for at, why in faults.items()}

    def are_rows(self, data: bytes, starts: Positions, ends: Positions) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Tell empty lines from others: `csv` has no record for them."""
        return _not_blank(data, starts, ends, b"\r\n")

    def _is_regular(self, data: bytes, quotes: Positions) -> bool:
        """Say whether every odd quote begins a field or follows a quote, and every even one ends a field or precedes one."""
        view = np.frombuffer(data, np.uint8)
        opening, closing = quotes[0::2], quotes[1::2]
        before = view[opening[opening > 0] - 1]
        after = view[closing[closing < len(data) - 1] + 1]
        returns = closing[closing < len(data) - 2]
        returns = returns[view[returns + 1] == RETURN]
        fits_before = (before == self._delimiter) | (before == NEWLINE) | (before == QUOTE)
        fits_after = (after == self._delimiter) | (after == NEWLINE) | (after == RETURN) | (after == QUOTE)
        return bool(fits_before.all() and fits_after.all() and (view[returns + 2] == NEWLINE).all())

    def _walk(self, data: bytes, start: int, is_last: bool) -> tuple[list[int], dict[int, str]]:
        ends: list[int] = []
        faults: dict[int, str] = {}
        while start < len(data):
            end, is_open = self._end(data, start)
            if end < 0 and is_open and (is_last or len(data) - start > MAX_QUOTED_BYTES):
                end = data.find(b"\n", start) + 1 or -1  # its first line alone is given up, not what follows
                if end > 0 or is_last:
                    faults[len(ends)] = UNCLOSED
            if end < 0 and is_last:
                end = len(data)
            if end < 0:
                break
            ends.append(end)
            start = end
        return ends, faults

    def _end(self, data: bytes, start: int) -> tuple[int, bool]:
        """Return where the record at `start` ends, or -1; and whether that is for want of a closing quote."""
        line = data.find(b"\n", start)
        if line >= 0 and data.find(b'"', start, line) < 0:
            return line + 1, False
        limit = start + MAX_QUOTED_BYTES
        at = start
        while True:
            if data[at : at + 1] == b'"':
                close = data.find(b'"', at + 1, limit)
                while close >= 0 and data[close + 1 : close + 2] == b'"':
                    close = data.find(b'"', close + 2, limit)
                if close < 0:
                    return -1, True
                at = close + 1
            found = self._field_end.search(data, at)
            if found is None:
                return -1, False
            at = found.end()
            if data[at - 1] == NEWLINE:
                return at, False


def chunks(stream: pa.NativeFile, splitter: Splitter, place: Place, *, num_headers: int = 0) -> Iterator[Chunk]:
    """
    Read records to the end of a file.

    Args:
        stream: Open at `place`.
        splitter: Finds the records.
        place: Where a record begins.
        num_headers: Records at the start of a file that are no rows.
    """
    headers = num_headers if place == START else 0
    row, offset, line = place
    data = b""
    is_last = False
    while not is_last:
        missing = MAX_RECORD_BYTES + 1 - len(data)
        fresh = stream.read(max(READ_BYTES, min(len(data), missing)))  # doubled: a giant record is not copied often
        is_last = not fresh
        if offset == 0 and not data:
            while len(fresh) < len(BOM) and (
                more := stream.read(len(BOM))
            ):  # a stream may give less than it was asked for
                fresh += more
            fresh, offset = without_bom(fresh)
        data = data + fresh if data else fresh
        if not data:
            continue
        ends, faults = splitter.ends(data, is_last=is_last)
        if not len(ends) and len(data) > MAX_RECORD_BYTES:
            size, num_lines, rest = _skip_line(stream)
            skipped = np.zeros(1, np.int64)
            yield Chunk(b"", skipped, skipped, offset, row, line, {0: TOO_LONG})
            row, offset, line, data = row + 1, offset + len(data) + size, line + num_lines, rest
            continue
        chunk = _chunk(data, ends, splitter, faults, (row, offset, line))
        used = int(ends[-1]) if len(ends) else 0
        if headers and len(chunk):
            taken = min(headers, len(chunk))
            headers -= taken
            chunk = replace(chunk.part(taken, len(chunk)), row=row)
        if len(chunk):
            yield chunk
        row, offset, line = row + len(chunk), offset + used, line + data.count(b"\n", 0, used)
        data = data[used:]


def _chunk(data: bytes, ends: Positions, splitter: Splitter, faults: dict[int, str], at: tuple[int, int, int]) -> Chunk:
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
    rows = splitter.are_rows(data, starts, ends)
    if rows is not None and not rows.all():
        kept = np.flatnonzero(rows)
        faults = {int(np.searchsorted(kept, position)): why for position, why in faults.items() if rows[position]}
        starts, ends = starts[kept], ends[kept]
    for position in np.flatnonzero(ends - starts > MAX_RECORD_BYTES).tolist():
        faults[position] = TOO_LONG
    row, offset, line = at
    return Chunk(data, starts, ends, offset, row, line, faults)


def _skip_line(stream: pa.NativeFile) -> tuple[int, int, bytes]:
    """Read to the end of a line; return how many bytes of it there were, how many newlines, and what was read beyond it."""
    size = 0
    while fresh := stream.read(READ_BYTES):
        end = fresh.find(b"\n") + 1
        if end:
            return size + end, 1, fresh[end:]
        size += len(fresh)
    return size, 0, b""


def _positions(data: bytes, byte: int) -> Positions:
    return np.flatnonzero(np.frombuffer(data, np.uint8) == byte)


def _not_blank(
    data: bytes, starts: Positions, ends: Positions, blanks: bytes | None
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Say which records have more in them than `blanks`, or than white space."""
    first = np.frombuffer(data, np.uint8)[starts] if len(starts) else np.zeros(0, np.uint8)
    are_rows: np.ndarray[Any, np.dtype[np.bool_]] = ~((first == NEWLINE) & (ends - starts == 1))
    for at in np.flatnonzero(are_rows & (first <= ord(" "))).tolist():  # few lines begin with a space
        are_rows[at] = bool(data[starts[at] : ends[at]].strip(blanks))
    return are_rows
