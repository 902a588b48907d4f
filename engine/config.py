"""
The config of a job: one pydantic model behind flags, YAML and keyword arguments.

Each field's description is its help text on the command line. A field that decides the vectors says so in its metadata
(`decides="vectors"`), and goes into the fingerprint; all others only decide the speed, or what stands beside the vectors.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.arguments import check_arguments
from engine.errors import ConfigError
from engine.schema import EMBEDDING, SOURCE_ROW

DEFAULT_MODEL = "sentence-transformers:all-MiniLM-L6-v2"
_Config = TypeVar("_Config", bound=BaseModel)
_VECTORS: dict[str, Any] = {"decides": "vectors"}


class ModelConfig(BaseModel):
    """Which model, and all the settings that a model is built with."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(
        DEFAULT_MODEL,
        description="provider:name, such as sentence-transformers:all-MiniLM-L6-v2, sentence-transformers:/a/folder, "
        "openai:text-embedding-3-small, cohere:embed-v4.0, or custom:package.module.Class",
    )
    model_args: dict[str, Any] = Field(
        default_factory=dict, description="arguments of a custom model, as JSON", json_schema_extra=_VECTORS
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="what the model computes in; vectors are stored as float32", json_schema_extra=_VECTORS
    )
    max_length: int | None = Field(
        None, ge=1, description="tokens a text is cut to; the model's own limit by default", json_schema_extra=_VECTORS
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        description="keep this many dimensions and normalise again (Matryoshka models); APIs are asked for them",
        json_schema_extra=_VECTORS,
    )
    normalize: bool = Field(
        False, description="scale each vector to length 1, if the model does not", json_schema_extra=_VECTORS
    )
    prompt: str | None = Field(None, description="put before every text", json_schema_extra=_VECTORS)
    revision: str | None = Field(
        None, description="branch, tag or commit of a model on the Hugging Face Hub (its commit is what counts)"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model", json_schema_extra=_VECTORS)
    device: str = Field("auto", description="auto, cpu, cuda or mps; auto takes the GPU that Ray assigns")
    backend: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="what runs a local model; auto takes OpenVINO on CPUs where it can, and PyTorch elsewhere"
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="texts that go through the model together, or in one request, at most (Kura's model_batch_size)",
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens, padding among them, that go through a local model together; auto, the default, finds out on the "
        "job's own texts",
    )

    input_type: Literal["search_document", "search_query", "classification", "clustering"] = Field(
        "search_document", description="what the vectors are for (Cohere)", json_schema_extra=_VECTORS
    )
    long_texts: Literal["truncate", "chunk", "reject"] = Field(
        "truncate",
        description="what an API is sent of texts that are longer than its model takes: the beginning (truncate), "
        "overlapping pieces whose vectors are averaged (chunk), or nothing (reject)",
        json_schema_extra=_VECTORS,
    )
    base_url: str | None = Field(
        None,
        description="address of an API that is like OpenAI's, such as http://127.0.0.1:8000/v1, or of Azure's resource",
    )
    api_version: str | None = Field(
        None, description="of Azure OpenAI, such as 2024-10-21; makes the model's name a deployment"
    )
    organization: str | None = Field(None, description="the OpenAI organisation that pays")
    key_file: str | None = Field(
        None, description="file that holds the API's key where the workers run; by default it is in their environment"
    )
    concurrent_requests: int | None = Field(
        None, ge=1, le=256, description="requests of an actor at once (Kura's n_concurrent_jobs; default: 8)"
    )
    requests_per_minute: float | None = Field(
        None, gt=0, description="the provider's limit for all actors together; learned from its answers by default"
    )
    tokens_per_minute: float | None = Field(
        None, gt=0, description="the provider's limit for all actors together; learned from its answers by default"
    )
    request_timeout_s: float | None = Field(None, gt=0, description="seconds for one answer of an API (default: 60)")
    give_up_s: float | None = Field(
        None, gt=0, description="seconds after which an API that answers nothing is given up (default: 1800)"
    )
    token_price: float | None = Field(
        None,
        ge=0,
        description="dollars per million tokens, for plan, status and --max-cost; known for OpenAI's and Cohere's own models",
    )

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not an address, such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "an address with a user, a password or a query would be stored with the output; give the key in the workers' "
                "environment or by key_file"
            )
        return value.rstrip("/")

    @field_validator("model")
    @classmethod
    def _has_provider(cls, value: str) -> str:
        provider, separator, name = value.partition(":")
        if not (separator and provider and name):
            raise ValueError(f"{value!r} is not provider:name, such as {DEFAULT_MODEL}")
        return value

    @field_validator("batch_tokens", mode="before")
    @classmethod
    def _auto_is_none(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @field_validator("model_args")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_arguments(value)
        return value

    @property
    def provider(self) -> str:
        """What stands before the colon of `model`."""
        return self.model.partition(":")[0]

    @property
    def name(self) -> str:
        """What stands behind the colon of `model`."""
        return self.model.partition(":")[2]

    def settings(self, options: AbstractSet[str]) -> dict[str, Any]:
        """Return the settings that decide the vectors, of those in `options`, which the model goes by, for the fingerprint."""
        return _deciding(ModelConfig, self, options)


class JobConfig(ModelConfig):
    """One job: a source, a model, an output, and how to run it."""

    source: tuple[str, ...] = Field(
        description="files, folders or globs of Parquet; repeat for more than one", min_length=1
    )
    output: str = Field(description="the folder that the parts are written to", min_length=1)
    text_column: str = Field("text", description="the column to embed", json_schema_extra=_VECTORS)
    id_column: str | None = Field(
        None, description="the column that names a row; by default an `id` of file and row is made"
    )
    keep: tuple[str, ...] = Field((), description="columns to copy beside the vectors; repeat for more than one")
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
    stall_s: float | None = Field(
        None,
        gt=0,
        description="end the run when nothing has moved for so many seconds (default: half an hour while no node can hold an "
        "actor, else four hours)",
    )
    address: str | None = Field(
        None, description="address of a Ray cluster; by default a running one is joined, or a local one started"
    )

    @field_validator("source", "keep", mode="before")
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

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_above_one(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"{value} is neither a share of one GPU nor a whole number of them")
        return value

    @model_validator(mode="after")
    def _distinct_columns(self) -> JobConfig:
        if self.id_column == self.text_column:
            raise ValueError(
                "id_column is the text column, and ids are written into records: name another, or leave it out"
            )
        made = (EMBEDDING, SOURCE_ROW, "_manifest", *(() if self.id_column else ("id",)))
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
        return _deciding(JobConfig, self, options)


def load_config(path: str | None = None, /, **given: Any) -> JobConfig:
    """
    Make a job's config from a YAML file and keyword arguments, which win over the file.

    Args:
        path: A YAML file with the names of `JobConfig`'s fields as keys.
        given: Fields of `JobConfig`; those that are None were not given.

    Raises:
        ConfigError: Names each field that is wrong, unknown or missing.
    """
    values = _read_yaml(path) if path else {}
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


def _deciding(kind: type[BaseModel], config: BaseModel, options: AbstractSet[str]) -> dict[str, Any]:
    return {
        name: getattr(config, name)
        for name, field in kind.model_fields.items()
        if isinstance(field.json_schema_extra, dict)
        and field.json_schema_extra.get("decides") == "vectors"
        and (name in options or name not in ModelConfig.model_fields)
    }


def _problem(kind: type[BaseModel], problem: Any) -> str:
    """Say in a line what pydantic found wrong, in the words of the config."""
    name = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown option {name!r}; known are: {', '.join(sorted(kind.model_fields))}"
    if problem["type"] == "missing":
        return f"{name!r} is missing; give it as a flag, in the config file or as an argument"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError):  # ValueError: not UTF-8, or 2024-13-45 where a date may stand
        raise ConfigError(f"the config {path} is not YAML; check its indentation and quotes") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"the config {path} must be a mapping of options to values, such as `output: out/`")
    return values
