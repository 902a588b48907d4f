"""What `engine gc` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from engine.result import Result
from engine.wording import count, size

WHY = {
    "gone": "records, rejects and parts of inputs that were deleted",
    "unnamed": "parts and rejects that no record names and no run will take up",
    "held": "parts that waited for a record, and that no run will take up",
    "former": "parts that others have taken the place of",
    "set-aside": "damaged files that were moved out of the way",
    "staging": "left by writers that died",
    "reuse": "indexes of former vectors; a run that wants them makes them again",
    "indexes": "of the lines of files that are not in the source",
    "inputs": "copies of data in memory that no record names and no source is",
    "leases": "of runs before the last two",
}
"""The kinds of garbage, and what each is."""
BY_HAND = (
    "If nothing can be written there: `engine gc {output}` shows what there is all the same, and files of the kinds set-aside, "
    "staging, reuse and former may be deleted by hand while no run owns the output"
)


@dataclass(frozen=True, slots=True)
class Garbage(Result):
    """One kind of files that an output does not need."""

    kind: str
    why: str
    """It is not needed; or, of what is kept, why it is."""
    names: list[str]
    """Below the output."""
    num_bytes: int

    @property
    def amount(self) -> str:
        """How much it is."""
        return f"{count(len(self.names), 'file')}, {size(self.num_bytes)}"


@dataclass(frozen=True, slots=True)
class GcResult(Result):
    """What an output does not need: deleted, or only shown."""

    output: str
    applied: bool
    """What is in `garbage` was deleted."""
    older_than_days: int
    garbage: list[Garbage]
    kept: list[Garbage]
    """What would be garbage, and is kept for now."""
    strange: list[str]
    """Files that are not the engine's. They are never touched."""
    warnings: list[str] = field(default_factory=list)

    @property
    def num_files(self) -> int:
        """Of garbage."""
        return sum(len(found.names) for found in self.garbage)

    @property
    def num_bytes(self) -> int:
        """Of garbage."""
        return sum(found.num_bytes for found in self.garbage)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON types, and the sums."""
        return asdict(self) | {"num_files": self.num_files, "num_bytes": self.num_bytes}

    def lines(self) -> dict[str, str]:
        """Say how much garbage there is, of which kinds, and what is kept."""
        amount = f"{count(self.num_files, 'file')}, {size(self.num_bytes)}" if self.garbage else "nothing"
        shown = "" if self.applied or not self.garbage else "; nothing is deleted without --apply"
        lines = {"deleted" if self.applied else "garbage": f"{amount}{shown}"}
        lines |= {found.kind: f"{found.amount}: {found.why}" for found in self.garbage}
        for found in self.kept:
            lines["kept" if "kept" not in lines else f"kept {found.kind}"] = f"{found.amount}: {found.why}"
        if self.strange:
            named = ", ".join(self.strange[:3]) + (", ..." if len(self.strange) > 3 else "")
            lines["strange"] = f"{count(len(self.strange), 'file')} that no engine made, and that stay: {named}"
        return lines | {"output": self.output}
