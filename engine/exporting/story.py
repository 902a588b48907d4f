"""The story of an export: which format, what is to be done, and what was."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from engine.disk import expanded, kind_of, real
from engine.errors import ConfigError
from engine.exporting import lance_dataset, one_file
from engine.exporting.faiss_index import FLAT
from engine.result import Result
from engine.snapshot import Snapshot
from engine.survey import opened
from engine.wording import count, duration, size

Format = Literal["npy", "faiss", "lance"]


@dataclass(frozen=True, slots=True)
class ExportResult(Result):
    """What was exported, and what of it was there already."""

    output: str
    to: str
    format: str
    ids: str
    """The file of the rows' ids; empty if they are in the export itself."""
    num_rows: int
    """That the export has."""
    num_new_rows: int
    """Of those, that were written now; 0 if there was nothing to do."""
    num_deleted_rows: int
    """That were taken out of a Lance dataset, since their parts have left the output."""
    dimension: int
    """How many numbers are stored of a vector: bytes, if they are bits."""
    dtype: str
    """Of the stored numbers."""
    index: str
    """Of FAISS; empty for other formats."""
    num_bytes: int
    seconds: float

    def lines(self) -> dict[str, str]:
        """Say what was exported, and to where."""
        done = "nothing to do: it is this output already"
        if self.num_new_rows or self.num_deleted_rows:
            gone = f", {count(self.num_deleted_rows, 'row')} deleted" if self.num_deleted_rows else ""
            done = f"{count(self.num_new_rows, 'row')} written{gone}, in {duration(self.seconds)}"
        return {
            "exported": done,
            "to": f"{self.to}, {size(self.num_bytes)}",
            **({"ids": self.ids} if self.ids else {}),
            "vectors": f"{self.num_rows:,} of {self.dimension:,} x {self.dtype}{f', as {self.index}' if self.index else ''}",
            "output": self.output,
        }


def export(
    output: str,
    to: str | Path,
    *,
    format: Format | None = None,  # noqa: A002 - the flag's name
    index: str | None = None,
) -> ExportResult:
    """
    Make a file or dataset of an output's vectors. If it is there and is the output as it stands, nothing is done.

    Args:
        output: The folder.
        to: A file `.npy` or `.faiss`, or a folder `.lance`, on a local disk.
        format: Which of the three, if the name does not end so.
        index: Of FAISS, how its index is described, such as `HNSW32` or `IVF4096,PQ48`; by default `Flat`.

    Raises:
        ConfigError: There is no output, nothing is committed in it yet, or an argument does not fit it.
        Refused: `to` is there and is no export of this output, or another process is making it.
        CorruptOutput: A part or a record is missing or damaged.
    """
    started = time.monotonic()
    chosen = _format_of(str(to), format)
    if index is not None and chosen != "faiss":
        raise ConfigError(f"--index is of FAISS, and {to} is to be {chosen}: leave it out")
    ledger, job = opened(output)
    snapshot = Snapshot.of(ledger, job)
    snapshot.check_columns([snapshot.id_column])
    target = _target(str(to), snapshot.root, is_folder=chosen == "lance")
    num_deleted = 0
    if chosen == "lance":
        num_new, num_deleted = lance_dataset.export(snapshot, target)
    else:
        num_new = one_file.export(snapshot, target, index=(index or FLAT) if chosen == "faiss" else None)
    return ExportResult(
        output=snapshot.root,
        to=str(target),
        format=chosen,
        ids="" if chosen == "lance" else str(one_file.ids_path(target)),
        num_rows=snapshot.num_rows,
        num_new_rows=num_new,
        num_deleted_rows=num_deleted,
        dimension=snapshot.width,
        dtype=str(snapshot.dtype),
        index=(index or FLAT) if chosen == "faiss" else "",
        num_bytes=_size_of(target),
        seconds=round(time.monotonic() - started, 3),
    )


def _format_of(to: str, given: str | None) -> str:
    known = get_args(Format)
    chosen = given or Path(to).suffix.removeprefix(".")
    if chosen not in known:
        raise ConfigError(
            f"cannot tell the format of {to}: let its name end with {', '.join(f'.{name}' for name in known)}, or give --format"
        )
    return str(chosen)


def _target(to: str, root: str, *, is_folder: bool) -> Path:
    """Return where the export goes, if it may go there."""
    if "://" in to:
        raise ConfigError(f"--to {to}: exports are made on a local disk; give a path, and copy it from there")
    path = expanded(to)
    if "://" not in root and real(path).is_relative_to(real(root)):
        raise ConfigError(
            f"--to {to} is inside the output: give a place beside it, since all that is in it is the engine's"
        )
    kind = kind_of(path)
    if kind not in (None, "folder" if is_folder else "file"):
        raise ConfigError(f"--to {to} is a {'folder' if kind == 'folder' else 'file'} already: name another place")
    return path


def _size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
