"""The shape of an input file: enough to cut it into shards."""

from __future__ import annotations

from dataclasses import dataclass

from engine.schema import InputFile


@dataclass(frozen=True, slots=True)
class FileShape:
    """What planning knows of a file."""

    file: InputFile
    row_groups: tuple[int, ...]
    """Rows of each row group, or of whatever else can be read without what is before it."""
    text_bytes: int
    """Size of the texts, not compressed. Of Parquet: of their pages, where a value that a dictionary holds counts once."""
    kept_types: tuple[tuple[str, str], ...]
    """Name and Arrow type of each kept column."""

    @property
    def num_rows(self) -> int:
        """Rows of the whole file."""
        return sum(self.row_groups)
