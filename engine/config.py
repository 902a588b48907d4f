"""
The config of a job: one pydantic model behind flags, YAML and keyword arguments.

Each field's description is its help text on the command line; `engine.model_config` has those that a model is built with.
"""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from engine.errors import ConfigError
from engine.model_config import VECTORS, ModelConfig, deciding
from engine.schema import CHUNK_COLUMNS, EMBEDDING, FAULT, SOURCE_ROW, TEXT, TEXT_HASH
from engine.template import parse, unescaped

_Config = TypeVar("_Config", bound=BaseModel)
_Named = Annotated[str, Field(min_length=1)]
"""An empty name would be taken for another: a source for the current folder, a column for none."""
COPY_OF_JOB = "/working_dir_files/_ray_pkg_"
"""Of Ray's folders for the working directories of jobs."""


class JobConfig(ModelConfig):
    """One job: a source, a model, an output, and how to run it."""

    source: tuple[_Named, ...] = Field(
        description="files, folders or globs of Parquet, JSON lines, CSV, TSV, plain text or Arrow, on disks, in s3://, gs://, az:// or on hf://; "
        "repeat for more than one",
        min_length=1,
    )
    output: str = Field(
        description="the folder, or place in s3://, gs:// or az://, that the parts are written to", min_length=1
    )
    text_column: _Named = Field("text", description="the column to embed", json_schema_extra=VECTORS)
    text_rows: Literal["line", "file"] = Field(
        "line", description="of plain text: whether a row is a line or a whole file", json_schema_extra=VECTORS
    )
    text_template: str | None = Field(
        None,
        description="makes the text of several columns, in place of --text-column: '{title}\\n\\n{body}'; \\n and \\t stand for a "
        "new line and a tab, {{ and }} for braces, null is empty",
        json_schema_extra=VECTORS,
    )
    id_column: _Named | None = Field(
        None, description="the column that names a row; by default an `id` of file and row is made"
    )
    keep: tuple[_Named, ...] = Field((), description="columns to copy beside the vectors; repeat for more than one")
    output_dtype: Literal["float32", "float16", "int8", "binary"] = Field(
        "float32",
        description="what vectors are stored as: int8 in steps that are fixed once for the whole job, binary as a bit a dimension",
        json_schema_extra=VECTORS,
    )
    reuse: tuple[_Named, ...] = Field(
        (),
        description="other outputs of the same model and settings, whose vectors of the same texts are taken; repeat for more than one",
    )
    shard_rows: int | None = Field(None, ge=1, description="rows a shard; by default chosen from the texts")
    num_actors: int | None = Field(
        None, ge=1, description="most model actors at once; by default one per GPU or group of cores"
    )
    min_actors: int | None = Field(
        None, ge=1, description="actors to begin with, and to keep; by default as many as the cluster holds now"
    )
    gpus_per_actor: float | None = Field(
        None, gt=0, description="GPUs, or the share of one, for each actor; default: 1 if the cluster has any"
    )
    cpus_per_actor: int | None = Field(
        None, ge=1, description="cores and model threads for each actor on CPUs; default: up to 4"
    )
    max_cost: float | None = Field(
        None, gt=0, description="dollars; stop before all runs of the output together have cost more"
    )
    max_rejects: int | None = Field(None, ge=0, description="exit with 5 if more rows than this are rejected")
    if_in_use: Literal["refuse", "wait", "take-over"] = Field(
        "refuse", description="what to do if a live run owns the output; take-over ends that one cleanly"
    )
    unsafe_single_writer: bool = Field(
        False,
        description="write to an object store that cannot refuse to overwrite: right only as long as one run at a time writes there",
    )
    stall_s: float | None = Field(
        None,
        gt=0,
        description="end the run when nothing has moved for so many seconds (default: half an hour while no node can hold an "
        "actor, else four hours)",
    )
    address: str | None = Field(
        None, description="address of a Ray cluster; by default a running one is joined, or a local one started"
    )

    @field_validator("source", "keep", "reuse", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        values = (value,) if isinstance(value, (str, Path)) else value
        if not isinstance(values, (list, tuple)):
            return values
        return tuple(str(item) if isinstance(item, Path) else item for item in values)

    @field_validator("output", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("output")
    @classmethod
    def _outlives_the_job(cls, value: str) -> str:
        if "://" not in value and COPY_OF_JOB in os.path.abspath(os.path.expanduser(value)):  # noqa: PTH100, PTH111 - never raises
            raise ValueError(
                f"{value} is in the copy of the working directory that a submitted job runs in, which Ray deletes: give an absolute path, "
                "on a disk that all nodes share"
            )
        return value

    @field_validator("text_template")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is None:
            return None
        template = unescaped(value)
        parse(template)
        return template

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_above_one(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"{value} is neither a share of one GPU nor a whole number of them")
        return value

    @model_validator(mode="after")
    def _distinct_columns(self) -> JobConfig:
        if self.text_template is not None and self.text_column != JobConfig.model_fields["text_column"].default:
            raise ValueError("text_template makes the text, and text_column names it: give one of the two")
        texts = (self.text_column,) if self.text_template is None else parse(self.text_template).columns
        if texts == (self.id_column,):
            raise ValueError(
                "id_column is the text column, and ids are written into records: name another, or leave it out"
            )
        chunks = CHUNK_COLUMNS if self.long_texts == "chunk-rows" else ()
        made = (EMBEDDING, TEXT_HASH, SOURCE_ROW, TEXT, FAULT, "_manifest", *chunks)
        made = made if self.id_column else (*made, "id")
        columns = (*((self.id_column,) if self.id_column else ()), *self.keep)
        for column in columns:
            if column in made:
                raise ValueError(f"the column {column!r} cannot be kept: the parts have one of that name of their own")
            if columns.count(column) > 1:
                raise ValueError(f"the column {column!r} is kept twice")
        if self.min_actors and self.num_actors and self.min_actors > self.num_actors:
            raise ValueError(f"min_actors {self.min_actors} is more than num_actors {self.num_actors}")
        return self

    def of_model(self) -> ModelConfig:
        """Return what a model is built with, without the job around it."""
        return ModelConfig.model_validate(self.model_dump(include=set(ModelConfig.model_fields)))

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """The columns that go from the source to the parts as they are, the id first."""
        return (*((self.id_column,) if self.id_column else ()), *self.keep)

    def settings(self, options: AbstractSet[str]) -> dict[str, Any]:
        """Return the settings that decide the vectors, of the job and of those in `options`, which the model goes by."""
        decided = deciding(JobConfig, self, options)
        del decided["text_template" if self.text_template is None else "text_column"]
        return decided


def load_config(path: str | None = None, /, **given: Any) -> JobConfig:
    """
    Make a job's config from a YAML file and keyword arguments, which win over the file.

    Args:
        path: A YAML file with the names of `JobConfig`'s fields as keys.
        given: Fields of `JobConfig`; those that are None were not given.

    Raises:
        ConfigError: Names each field that is wrong, unknown or missing.
    """
    values = _read_yaml(path) if path is not None else {}
    values |= {name: value for name, value in given.items() if value is not None}
    return validated(JobConfig, values)


def validated(kind: type[_Config], values: dict[str, Any]) -> _Config:
    """
    Check `values` against the pydantic model `kind`.

    Raises:
        ConfigError: One line for each thing that is wrong.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(kind, problem) for problem in error.errors()]
        raise ConfigError("; ".join(problems)) from None


def _problem(kind: type[BaseModel], problem: Any) -> str:
    """Say in a line what pydantic found wrong, in the words of the config."""
    name = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown option {name!r}; known are: {', '.join(sorted(kind.model_fields))}"
    if problem["type"] == "missing":
        return f"{name!r} is missing; give it as a flag, in the config file or as an argument"
    if problem["type"] == "string_too_short":
        return f"{problem['loc'][0]}: is empty; give a value, or leave the option out"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path!r}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError):  # ValueError: not UTF-8, or 2024-13-45 where a date may stand
        raise ConfigError(f"the config {path} is not YAML; check its indentation and quotes") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"the config {path} must be a mapping of options to values, such as `output: out/`")
    return values
