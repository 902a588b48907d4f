"""The verb `export` of the command line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import typer

from engine.options import Debug, Json, Output, Verbose
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
        "export",
        help="Make one .npy, .faiss or .lance of an output's vectors. Again: it goes on, or says that there is nothing to do.",
        epilog="Example: engine export out --to vectors.faiss --index IVF4096,PQ48",
    )
    def _export(
        output: Output,
        to: Annotated[
            str, typer.Option(metavar="PATH", help="a file .npy or .faiss, or a folder .lance, beside the output")
        ],
        form: Annotated[
            Literal["npy", "faiss", "lance"] | None,
            typer.Option("--format", help="if the name of PATH does not end so"),
        ] = None,
        index: Annotated[
            str | None, typer.Option(metavar="TEXT", help="which index FAISS makes (default: Flat), such as HNSW32")
        ] = None,
        as_json: Json = False,
        verbose: Verbose = False,
        debug: Debug = False,
    ) -> None:
        from engine.exporting import story

        with reporting(verbose, debug):
            result = story.export(output, to, format=form, index=index)
        say(result, as_json, show)
