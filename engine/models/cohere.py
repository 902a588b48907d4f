"""Cohere's embedding models, on Cohere's SDK."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import orjson

from engine.errors import ConfigError, Unavailable
from engine.model_config import ModelConfig
from engine.models.api.answers import Malformed, Reply, billed, stacked
from engine.models.api.limits import limits_of
from engine.models.api.model import ApiEmbeddingModel, key_from
from engine.models.api.refusals import refusal
from engine.models.api.terms import Terms

if TYPE_CHECKING:
    import cohere


class CohereEmbeddingModel(ApiEmbeddingModel):
    """
    An embedding model of Cohere's. The key is in the worker's environment (`CO_API_KEY`) or a file there.

    Args:
        model_name: Such as embed-v4.0.
        model_batch_size: Texts a request at most, up to 96.
        n_concurrent_jobs: Requests at once.
        input_type: What the vectors are for: search_document, search_query, classification or clustering.
        dimensions: To ask for.
        base_url: Of a server that is like Cohere's.
        key_file: File with the key.
        options: Of `ApiEmbeddingModel`: limits, long texts, prompt, time-outs.

    Raises:
        ConfigError: If the SDK is not installed, or there is no key.
    """

    terms = Terms(max_inputs=96)
    options = ApiEmbeddingModel.options | {"input_type", "dimensions", "base_url", "key_file"}

    def __init__(
        self,
        model_name: str = "embed-v4.0",
        model_batch_size: int | None = 96,
        n_concurrent_jobs: int | None = None,
        input_type: str = "search_document",
        *,
        dimensions: int | None = None,
        base_url: str | None = None,
        key_file: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model_name, model_batch_size, n_concurrent_jobs, **options)
        if find_spec("cohere") is None:
            raise ConfigError(
                "Cohere's SDK is not installed where the worker runs: pip install 'embedding-engine[cohere]'"
            )
        self._key = key_from(key_file, os.environ.get("CO_API_KEY"))
        if not self._key:
            raise ConfigError("there is no API key: set CO_API_KEY in the environment of the workers, or give key_file")
        self._base_url = base_url
        self._dimension = dimensions
        self._wanted: dict[str, Any] = {
            "model": model_name,
            "input_type": input_type,
            "embedding_types": ["float"],
            "truncate": "END" if self._long_texts == "truncate" else "NONE",  # of what it refuses, chunks are made here
            **({"output_dimension": dimensions} if dimensions else {}),
        }
        self._slug = f"cohere:{model_name}:{input_type}" + (f":{dimensions}" if dimensions else "")
        self._client: cohere.AsyncClientV2 | None = None

    @classmethod
    def identity(cls, config: ModelConfig) -> dict[str, Any]:
        """Name the model."""
        return {"provider": config.provider, "name": config.name}

    @classmethod
    def arguments(cls, config: ModelConfig) -> dict[str, Any]:
        """Return what a config says that is Cohere's own."""
        names = ("input_type", "dimensions", "base_url", "key_file")
        return {"model_name": config.name} | {name: getattr(config, name) for name in names}

    def slug(self) -> str:
        """Return the provider, the name, and what makes its vectors others."""
        return self._slug

    async def request(self, texts: Sequence[str]) -> Reply:
        """Send texts once."""
        import httpx
        from cohere.core.api_error import ApiError

        failure = ""
        try:
            raw = await self._connected().with_raw_response.embed(
                texts=list(texts), **self._wanted, request_options={"max_retries": 0}
            )
        except ApiError as error:
            status, headers, body = error.status_code or 0, error.headers or {}, error.body
        except httpx.HTTPError as error:
            failure = type(error).__name__
        else:
            given = getattr(getattr(raw.data, "embeddings", None), "float_", None)
            units = raw.data.meta.billed_units if raw.data.meta else None
            num_tokens = math.ceil(units.input_tokens) if units and units.input_tokens else None
            with billed(num_tokens):
                vectors = await asyncio.to_thread(stacked, given or [])
            return Reply(vectors, num_tokens, limits_of(raw.headers))
        # out here the libraries' errors, which quote the server, are not the context of ours
        if failure:
            raise Unavailable(f"the provider cannot be reached ({failure})")
        if status < 300:
            raise Malformed("not an embeddings answer")
        raise refusal(status, headers, orjson.dumps(body, default=str), texts, [self._key or ""])

    def _connected(self) -> cohere.AsyncClientV2:
        """Return the one client, which is made on the loop that uses it."""
        if self._client is None:
            import cohere

            self._client = cohere.AsyncClientV2(
                self._key, base_url=self._base_url, timeout=self.request_timeout_s, max_retries=0
            )
            self.at_end(self._client._client_wrapper.httpx_client.httpx_client.aclose)  # noqa: SLF001 - it has no public way
        return self._client
