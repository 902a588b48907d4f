"""What `engine gc` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from engine.result import Result
from engine.wording import count, size


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
