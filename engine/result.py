"""A result: what a face returns, in each form in which it is shown."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from typing import Any


class Result:
    """Gives every result the forms in which it is shown: `--json`, a few aligned lines, a table in a notebook."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)  # type: ignore[call-overload,no-any-return] # every subclass is a dataclass

    def lines(self) -> dict[str, str]:
        """Return what a person reads of it, by label, the most wanted first."""
        return {name: str(value) for name, value in self.as_json().items()}

    def _repr_html_(self) -> str:
        """Show the lines as a table: notebooks call this."""
        rows = [
            f"<tr><th style='text-align:left'>{escape(label)}</th><td style='text-align:left'>{escape(text)}</td></tr>"
            for label, text in self.lines().items()
        ]
        notes = [f"<div>warning: {escape(text)}</div>" for text in getattr(self, "warnings", [])]
        notes += [f"<div>problem: {escape(found.problem)}</div>" for found in getattr(self, "findings", [])]
        return f"<table>{''.join(rows)}</table>{''.join(notes)}"
