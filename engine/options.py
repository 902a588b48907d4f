"""The options of the command line, made from the fields of `JobConfig`: one description, one check, one error for all faces."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from engine.config import JobConfig
from engine.errors import ConfigError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

NO_VALUE = ""
"""What a flag's value is called in the help, where typer would say `<bool>`: it takes none."""
Json = Annotated[bool, typer.Option("--json", metavar=NO_VALUE, help="print the result as one JSON object")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", metavar=NO_VALUE, help="log what happens")]
Debug = Annotated[bool, typer.Option("--debug", metavar=NO_VALUE, help="log everything, and show tracebacks")]
Output = Annotated[str, typer.Argument(metavar="OUT", help="an output folder")]

FIRST = ("source", "output", "model")
PANELS = {
    "job": "The job",
    "fixed": "Fixed for an output: the same in each of its runs",
    "free": "Free to change from run to run",
}
FIXED = ("revision", "id_column", "keep", "shard_rows")
"""Besides what decides the vectors."""
METAVARS = {int: "N", float: "X", str: "TEXT"}


def job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every field of `JobConfig` as an option, in place of its `options`."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    fields = [_parameter(name, field) for name, field in JobConfig.model_fields.items()]
    fields.sort(key=lambda parameter: FIRST.index(parameter.name) if parameter.name in FIRST else len(FIRST))
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*fields, *own)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the options that were given on the command line, as `JobConfig` takes them.

    Raises:
        ConfigError: If an option that takes JSON is not JSON.
    """
    values = {name: value for name, value in options.items() if value not in (None, [])}
    for name, value in values.items():
        if get_origin(JobConfig.model_fields[name].annotation) is dict:
            try:
                values[name] = json.loads(value)
            except ValueError:
                raise ConfigError(f"""{name}: not JSON, such as '{{"name": 1}}'""") from None
    return values


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Make the option of a field. Values pass as they were typed: pydantic converts and checks them, as from YAML."""
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if kind is not type(None)]
    flag = f"--{name.replace('_', '-')}"
    shown: dict[str, Any] = {"help": _help(field), "rich_help_panel": PANELS[_panel(name, field)]}
    kind: Any = str | None
    if field.annotation is bool:
        kind = bool | None
        shown["metavar"] = NO_VALUE
    elif get_origin(field.annotation) is tuple:
        kind = list[str] | None
        shown["metavar"] = "TEXT"
    elif get_origin(field.annotation) is dict:
        shown["metavar"] = "JSON"
    elif get_origin(field.annotation) is Literal:
        shown["metavar"] = "|".join(get_args(field.annotation))
    else:
        shown["metavar"] = next((METAVARS[kind] for kind in kinds if kind in METAVARS), "TEXT")
    annotation = Annotated[kind, typer.Option(flag, **shown)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if isinstance(field.default, (str, int, float)) and not isinstance(field.default, bool):
        return f"{text} (default: {field.default})"
    return text


def _panel(name: str, field: FieldInfo) -> str:
    if name in FIRST:
        return "job"
    decides = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("decides") == "vectors"
    return "fixed" if decides or name in FIXED else "free"
