"""
The config of a model: which one, and the settings that it is built with.

Each field's description is its help text on the command line. A field that decides the vectors says so in its metadata
(`decides="vectors"`), and goes into the fingerprint; all others only decide the speed, or what stands beside the vectors.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from engine.arguments import check_arguments, has_key, is_key

DEFAULT_MODEL = "sentence-transformers:all-MiniLM-L6-v2"
LongTexts = Literal["truncate", "chunk", "chunk-rows", "reject"]
VECTORS: dict[str, Any] = {"decides": "vectors"}
"""Marks a field that decides the vectors."""


class ModelConfig(BaseModel):
    """Which model, and all the settings that a model is built with."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    model: str = Field(
        DEFAULT_MODEL,
        description="provider:name, such as sentence-transformers:all-MiniLM-L6-v2, sentence-transformers:/a/folder, "
        "openai:text-embedding-3-small, cohere:embed-v4.0, or custom:package.module.Class",
    )
    model_args: dict[str, Any] = Field(
        default_factory=dict, description="arguments of a custom model, as JSON", json_schema_extra=VECTORS
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="what the model computes in", json_schema_extra=VECTORS
    )
    max_length: int | None = Field(
        None, ge=1, description="tokens a text is cut to; the model's own limit by default", json_schema_extra=VECTORS
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        description="keep this many dimensions and normalise again (Matryoshka models); APIs are asked for them",
        json_schema_extra=VECTORS,
    )
    normalize: bool = Field(
        False, description="scale each vector to length 1, if the model does not", json_schema_extra=VECTORS
    )
    prompt: str | None = Field(None, description="put before every text", json_schema_extra=VECTORS)
    revision: str | None = Field(
        None, description="branch, tag or commit of a model on the Hugging Face Hub (its commit is what counts)"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model", json_schema_extra=VECTORS)
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
        "search_document", description="what the vectors are for (Cohere)", json_schema_extra=VECTORS
    )
    long_texts: LongTexts = Field(
        "truncate",
        description="what becomes of texts that are longer than the model takes: their beginning is embedded (truncate); "
        "overlapping chunks, whose vectors are averaged (chunk) or, of local models, get a row each (chunk-rows); or nothing (reject)",
        json_schema_extra=VECTORS,
    )
    chunk_overlap: int | None = Field(
        None,
        ge=0,
        description="tokens that a chunk of a local model shares with the one before; by default a sixteenth of what the model takes",
        json_schema_extra=VECTORS,
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
        return None if value is None else checked_address(value)

    @field_validator("key_file")
    @classmethod
    def _is_no_key(cls, value: str | None) -> str | None:
        if value is not None and is_key(value):
            raise ValueError(
                "looks like a key itself, and would be stored with the output: give the name of a file that holds it (with its "
                "folder, such as ./NAME), or put it into the workers' environment"
            )
        return value

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
        return deciding(ModelConfig, self, options)


def checked_address(value: str) -> str:
    """
    Return the address of an API, without the slash at its end.

    Raises:
        ValueError: If it is none, or holds what must not be stored with the output; it never quotes the value.
    """
    try:
        parts = urlsplit(value)
    except ValueError:  # which may quote it
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an address, such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment or has_key(parts.path):
        raise ValueError(
            "an address with a user, a password, a query, a fragment or a key would be stored with the output; give the key in the workers' "
            "environment or by key_file"
        )
    return value.rstrip("/")


def deciding(kind: type[BaseModel], config: BaseModel, options: AbstractSet[str]) -> dict[str, Any]:
    """Return the settings of `kind` that decide the vectors, of a model only those in `options`."""
    return {
        name: getattr(config, name)
        for name, field in kind.model_fields.items()
        if isinstance(field.json_schema_extra, dict)
        and field.json_schema_extra.get("decides") == "vectors"
        and (name in options or name not in ModelConfig.model_fields)
    }
