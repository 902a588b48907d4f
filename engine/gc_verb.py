"""The verb `gc` of the command line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from engine.gc_result import GcResult


def add_to(
    app: typer.Typer,
    reporting: Callable[[bool, bool], AbstractContextManager[Any]],
    show: Callable[[GcResult, bool], None],
) -> None:
    """
    Give the command line the verb.

    Args:
        app: The command line.
        reporting: Sends logs to stderr while something is done; takes whether to be verbose, and whether to debug.
        show: Prints a result; takes whether as JSON.
    """

    @app.command(
        "gc",
        help="Show what an output does not need: parts of deleted inputs, and what dead runs left. Deletes it only with --apply.",
        epilog="Example: engine gc out --apply",
    )
    def _gc(
        output: Annotated[str, typer.Argument(metavar="OUT", help="an output folder")],
        apply: Annotated[bool, typer.Option("--apply", help="delete what is shown; refused beside a live run")] = False,
        older_than_days: Annotated[
            int, typer.Option(metavar="N", min=1, help="leave what came later, by the store's clock")
        ] = 1,
        inputs_gone: Annotated[
            bool,
            typer.Option(
                "--inputs-gone", help="the inputs that are not there were deleted, though it looks like a lost disk"
            ),
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="print the result as one JSON object")] = False,
        verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log what happens")] = False,
        debug: Annotated[bool, typer.Option("--debug", help="log everything, and show tracebacks")] = False,
    ) -> None:
        from engine import garbage

        with reporting(verbose, debug):
            result = garbage.gc(output, apply=apply, older_than_days=older_than_days, inputs_gone=inputs_gone)
        show(result, as_json)
