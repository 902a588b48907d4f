"""The verb `gc` of the command line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer

from engine.options import NO_VALUE, Debug, Json, Output, Verbose
from engine.terminal import show


def add_to(
    app: typer.Typer, reporting: Callable[[bool, bool], AbstractContextManager[Any]], say: Callable[..., None]
) -> None:
    """
    Give the command line its verb.

    Args:
        app: Of the command line.
        reporting: What sends logs to stderr while it runs.
        say: What prints the result.
    """

    @app.command(
        "gc",
        help="Show what an output does not need: parts of deleted inputs, and what dead runs left. Deletes it only with --apply.",
        epilog="Example: engine gc out --apply",
    )
    def _gc(
        output: Output,
        apply: Annotated[
            bool, typer.Option("--apply", metavar=NO_VALUE, help="delete what is shown; refused beside a live run")
        ] = False,
        older_than_days: Annotated[
            int, typer.Option(metavar="N", min=1, help="leave what came later, by the store's clock")
        ] = 1,
        inputs_gone: Annotated[
            bool,
            typer.Option(
                "--inputs-gone",
                metavar=NO_VALUE,
                help="the inputs that are not there were deleted, though it looks like a lost disk",
            ),
        ] = False,
        as_json: Json = False,
        verbose: Verbose = False,
        debug: Debug = False,
    ) -> None:
        from engine import garbage

        with reporting(verbose, debug):
            result = garbage.gc(output, apply=apply, older_than_days=older_than_days, inputs_gone=inputs_gone)
        say(result, as_json, show)
