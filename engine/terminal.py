"""The terminal: what a person reads of a result, in a few aligned lines, the most wanted first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from engine.result import Result
    from engine.results import VerifyResult

LABEL_WIDTH = 10
MAX_FINDINGS = 20
"""Shown of what verification found; `--json` has them all."""


def show(console: Console, result: Result) -> None:
    """Print a result's lines, then what it warns of."""
    for label, text in result.lines().items():
        console.print(Text(label.ljust(LABEL_WIDTH - 1) + " ", style="bold") + Text(text))
    for warning in getattr(result, "warnings", []):
        console.print(Text(f"warning: {warning}", style="yellow"))


def show_verify(console: Console, result: VerifyResult) -> None:
    """Say whether an output is right, and what is wrong with it and what to do."""
    show(console, result)
    for finding in result.findings[:MAX_FINDINGS]:
        console.print(Text(f"problem: {finding.problem}", style="red"), Text(f"  {finding.advice}"), sep="\n")
    if len(result.findings) > MAX_FINDINGS:
        console.print(f"and {len(result.findings) - MAX_FINDINGS:,} more: --json has them all")
