"""
The command line: verbs over the runner.

Its options are the fields of `JobConfig`, so that a flag, a key in YAML and a keyword argument have one name, one check and
one error. stdout is for results, stderr for progress, warnings and logs. An error becomes one message and an exit code.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text
from typer.exceptions import TyperException

from engine import export_verb, gc_verb, overview, runner
from engine.config import load_config
from engine.errors import ConfigError, EngineError, ProviderError
from engine.options import NO_VALUE, Debug, Json, Output, Verbose, given, job_options
from engine.streams import Unwritten, escape_on_stdout, on_stdout, without_core_notices
from engine.terminal import show, show_verify
from engine.version import __version__

if TYPE_CHECKING:
    from engine.config import JobConfig
    from engine.result import Result
    from engine.results import RunResult

_Result = TypeVar("_Result", bound="Result")

TOO_MANY_REJECTS = 5
VERIFICATION_FAILED = 6
INTERRUPTED = 130
"""As shells have it: 128 and SIGINT."""

Config = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="a YAML file of the options; those given here win")
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Embed texts in bulk: files in, vectors out, and no work lost.",
)


@dataclass(slots=True)
class _Outcome:
    """How a command ended, besides by an error."""

    exit_code: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv: Without the program's name; by default what the process was called with.

    Returns:
        The exit code: 0 done; 1 unexpected; 2 the command or config is wrong; 3 refused; 4 the model fails; 5 too many rejects;
        6 verification failed; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    outcome = _Outcome()
    escape_on_stdout()
    try:
        app(arguments, standalone_mode=False, obj=outcome)
    except TyperException as error:
        if not error.format_message():  # no verb: the help is printed already
            return ConfigError.exit_code
        return _say_error(f"{error.format_message()}; see `engine --help`", ConfigError.exit_code, arguments)
    except Unwritten as error:
        if error.is_unread:
            return outcome.exit_code
        message = f"cannot write the result to stdout ({error}): see that there is room; what the command did is kept"
        return _say_error(message, outcome.exit_code or EngineError.exit_code, ())
    except EngineError as error:
        _trace(arguments)
        return _say_error(error.message, error.exit_code, arguments)
    except (KeyboardInterrupt, typer.Abort):
        return _say_error("interrupted; what was committed is kept", INTERRUPTED, arguments)
    except Exception as error:  # its message could quote a text: only --debug shows it
        _trace(arguments)
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"unexpected {type(error).__name__} in {Path(where.filename).name}, line {where.lineno}"
        return _say_error(f"{what}; --debug shows more", EngineError.exit_code, arguments)
    return outcome.exit_code


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", metavar=NO_VALUE, help="print the version")] = False,
) -> None:
    if version:
        with on_stdout():
            print(__version__)  # noqa: T201 - the result
        raise typer.Exit


@app.command(
    "plan",
    help="Say what a run would do: files, rows, shards and bytes, done and left. Writes nothing, loads no model.",
    epilog="Example: engine plan --source 'texts/*.parquet' --output out",
)
@job_options
def _plan(
    *, config: Config = None, as_json: Json = False, verbose: Verbose = False, debug: Debug = False, **options: Any
) -> None:
    with _reporting(verbose, debug):
        result = runner.plan(load_config(config, **given(options)))
    _print(result, as_json, show)


@app.command(
    "run",
    help="Embed what is pending. Run the same command again to go on where it stopped, however it stopped.",
    epilog="Example: engine run --source texts --output out --model sentence-transformers:all-MiniLM-L6-v2 --id-column id",
)
@job_options
def _run(
    context: typer.Context,
    *,
    config: Config = None,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    from engine.progress import Progress

    job = load_config(config, **given(options))
    with _reporting(verbose, debug) as console, Progress(console) as shown:
        result = runner.run(job, on_event=shown)
    try:
        _print(result, as_json, show)
    finally:
        context.obj.exit_code = _exit_code_of(result, job)


@app.command("status", help="Say where an output stands, by its records.", epilog="Example: engine status out")
def _status(output: Output, as_json: Json = False, verbose: Verbose = False, debug: Debug = False) -> None:
    with _reporting(verbose, debug):
        result = overview.status(output)
    _print(result, as_json, show)


@app.command(
    "verify",
    help="Check an output against its plan, its records and its files; exit with 6 if anything is wrong or missing.",
    epilog="Example: engine verify out --level full",
)
def _verify(
    context: typer.Context,
    output: Output,
    level: Annotated[
        Literal["quick", "footers", "full", "sample"],
        typer.Option(
            help="quick: listings and records; footers: and every footer; full: every byte; sample: embed rows again"
        ),
    ] = "quick",
    set_aside: Annotated[
        bool,
        typer.Option(
            "--set-aside", metavar=NO_VALUE, help="move bad parts away, so that the next run makes them again"
        ),
    ] = False,
    sample_rows: Annotated[int, typer.Option(min=1, help="rows that level sample embeds again")] = 64,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    with _reporting(verbose, debug):
        result = runner.verify(output, level, set_aside=set_aside, sample_rows=sample_rows)
    context.obj.exit_code = 0 if result.ok else VERIFICATION_FAILED
    _print(result, as_json, show_verify)


@app.command(
    "report",
    help="Make a page about an output that opens offline: speed, runs, texts, rejects, and a map of its vectors.",
    epilog="Example: engine report out --to report.html --color-by language",
)
def _report(
    output: Output,
    to: Annotated[
        str | None, typer.Option(metavar="FILE", help="the page to write; by default OUT/_engine/report.html")
    ] = None,
    color_by: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="a column of the output that colours the map; clusters do by default"),
    ] = None,
    sample_rows: Annotated[int, typer.Option(min=1, max=20_000, help="vectors to look at")] = 5000,
    projection: Annotated[
        Literal["auto", "pca", "tsne"],
        typer.Option(help="how vectors become points; auto takes t-SNE for 5,000 or fewer"),
    ] = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    from engine.reporting import story

    with _reporting(verbose, debug):
        result = story.report(output, to, color_by=color_by, sample_rows=sample_rows, projection=projection)
    _print(result, as_json, show)


@contextmanager
def _reporting(verbose: bool, debug: bool) -> Iterator[Console]:
    """Send logs, and whatever libraries and workers print, to stderr: stdout is for the result."""
    with (
        without_core_notices() if not debug else nullcontext(),
        redirect_stdout(sys.stderr),
        _logging(verbose, debug) as console,
    ):
        yield console


@contextmanager
def _logging(verbose: bool, debug: bool) -> Iterator[Console]:
    console = Console(stderr=True, highlight=False)
    handler = RichHandler(console=console, show_path=False, markup=False, log_time_format="%X")
    logger = logging.getLogger("engine")
    before = logger.level
    logger.setLevel(logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield console
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _print(result: _Result, as_json: bool, show: Callable[[Console, _Result], None]) -> None:
    with on_stdout():
        if as_json:
            print(json.dumps(result.as_json()))  # noqa: T201 - the result
        else:
            show(Console(highlight=False, soft_wrap=True), result)


export_verb.add_to(app, _reporting, _print)
gc_verb.add_to(app, _reporting, _print)


def _exit_code_of(result: RunResult, job: JobConfig) -> int:
    if result.interrupted:
        _say(f"interrupted: {result.pending_rows:,} rows are left; run the same command again to go on")
        return INTERRUPTED
    if result.stopped:
        _say(f"stopped: {result.stopped}; {result.pending_rows:,} rows are left, and what was committed is kept")
        return ProviderError.exit_code
    if job.max_rejects is not None and (result.total_rejects or 0) > job.max_rejects:
        _say(
            f"error: {result.total_rejects:,} rows are rejected, and --max-rejects is {job.max_rejects:,}; all others are "
            f"embedded. The reasons are in {result.output}/_engine/rejects"
        )
        return TOO_MANY_REJECTS
    return 0


def _say_error(message: str, exit_code: int, arguments: Sequence[str]) -> int:
    """Print an error to stderr, and as the one object on stdout if that was asked for."""
    _say(f"error: {message}")
    if "--json" in arguments:
        with suppress(Unwritten), on_stdout():
            print(json.dumps({"error": message, "exit_code": exit_code}))  # noqa: T201 - the result
    return exit_code


def _say(message: str) -> None:
    with suppress(OSError, SystemExit):  # nobody can be told: the exit code says it
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text(message))


def _trace(arguments: Sequence[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()
