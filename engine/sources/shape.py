"""The shape of an input file: enough to cut it into shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine.schema import START, InputFile, Place


@dataclass(frozen=True, slots=True)
class FileShape:
    """What planning knows of a file."""

    file: InputFile
    row_groups: tuple[int, ...]
    """Rows of each row group, or of whatever else can be read without what is before it."""
    text_bytes: int
    """Size of the texts, not compressed. Of Parquet: of their pages, where a value that a dictionary holds counts once. Of lines: estimated."""
    kept_types: tuple[tuple[str, str], ...]
    """Name and Arrow type of each kept column; of lines also `json`, and `null` or `missing` where the first rows tell no type."""
    offsets: tuple[int, ...] = ()
    """Of each row group of a file of lines: bytes before it. Empty where a reader finds them by itself."""
    lines: tuple[int, ...] = ()
    """The same in newlines."""

    @property
    def num_rows(self) -> int:
        """Rows of the whole file."""
        return sum(self.row_groups)

    def placed(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, Place]]:
        """Say for ranges of rows, in their order, where to begin reading each."""
        group = first = 0
        place = Place(0, self.offsets[0], self.lines[0]) if self.offsets else START
        for start, stop in ranges:
            while group + 1 < len(self.offsets) and first + self.row_groups[group] <= start:
                first += self.row_groups[group]
                group += 1
            if self.offsets and place.row != first:
                place = Place(first, self.offsets[group], self.lines[group])
            yield start, stop, place
