"""OpenAI's embedding models: at OpenAI, at Azure, and at any server that speaks like OpenAI (vLLM, TEI, infinity, Ollama…)."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, Unavailable
from engine.model_config import ModelConfig, checked_address
from engine.models.api.answers import Reply, decoded
from engine.models.api.limits import limits_of
from engine.models.api.model import ApiEmbeddingModel, key_from
from engine.models.api.refusals import refusal
from engine.models.api.terms import Terms
from engine.models.api.tokens import ExactCounter

if TYPE_CHECKING:
    import ssl

    import openai

OPENAI_URL = "https://api.openai.com/v1"
EXACT_MODELS = ("text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002")
"""Whose tokens are cl100k_base's, and whose limits are known, wherever they are served."""
MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 8192
MAX_REQUEST_TOKENS = 300_000
CONNECT_S = 10.0
NO_KEY = "none"
"""For servers of one's own, which ask for none: the SDK insists on something."""
TALKATIVE = ("openai", "httpx2", "httpcore2", "httpx", "httpcore")
"""Libraries whose debug lines would show headers and texts."""


class OpenAIEmbeddingModel(ApiEmbeddingModel):
    """
    An embedding model of OpenAI's, or behind an API like it. The key is in the worker's environment (`OPENAI_API_KEY`,
    `AZURE_OPENAI_API_KEY`) or a file there, and never an argument.

    Args:
        model_name: Such as text-embedding-3-small; of Azure, the deployment.
        model_batch_size: Texts a request at most, up to 2,048.
        n_concurrent_jobs: Requests at once.
        dimensions: To ask for.
        base_url: Of a server that is like OpenAI's, or of Azure's resource.
        api_version: Of Azure.
        organization: That pays.
        key_file: File with the key.
        options: Of `ApiEmbeddingModel`: limits, long texts, prompt, time-outs.

    Raises:
        ConfigError: If there is no key, or the options do not fit.
    """

    options = ApiEmbeddingModel.options | {"dimensions", "base_url", "api_version", "organization", "key_file"}

    def __init__(
        self,
        model_name: str = "text-embedding-3-small",
        model_batch_size: int | None = None,
        n_concurrent_jobs: int | None = None,
        *,
        dimensions: int | None = None,
        base_url: str | None = None,
        api_version: str | None = None,
        organization: str | None = None,
        key_file: str | None = None,
        **options: Any,
    ) -> None:
        import openai  # noqa: F401 - it takes a second: now, and not before the first request

        super().__init__(model_name, model_batch_size, n_concurrent_jobs, **options)
        self._base_url = _address(base_url, api_version)
        self._api_version = api_version
        self._organization = organization
        variable = "AZURE_OPENAI_API_KEY" if api_version else "OPENAI_API_KEY"
        self._key = key_from(key_file, os.environ.get(variable)) or (NO_KEY if self._is_own else "")
        if not self._key:
            raise ConfigError(
                f"there is no API key: set {variable} in the environment of the workers, or give key_file"
            )
        self.terms = _terms(model_name, api_version)
        self._dimension = dimensions
        self._wanted = {"dimensions": dimensions} if dimensions else {}
        self._encoding = "base64"
        self._client: openai.AsyncOpenAI | None = None

    @classmethod
    def pinned(cls, config: ModelConfig) -> ModelConfig:
        """Return `config` with the address that the environment names, so that all workers go to the same."""
        address = _address(config.base_url, config.api_version)
        return config if address == OPENAI_URL else config.model_copy(update={"base_url": address})

    @classmethod
    def terms_of(cls, config: ModelConfig) -> Terms:
        """Return the terms of a config's model."""
        return _terms(config.name, config.api_version)

    @classmethod
    def identity(cls, config: ModelConfig) -> dict[str, Any]:
        """Name the model and the kind of its server: a server may move, and stays what it is."""
        kind = "azure" if config.api_version else "compatible" if _is_own(config.base_url) else "openai"
        return {"provider": config.provider, "name": config.name, "endpoint": kind}

    @classmethod
    def arguments(cls, config: ModelConfig) -> dict[str, Any]:
        """Return what a config says that is OpenAI's own."""
        names = ("dimensions", "base_url", "api_version", "organization", "key_file")
        return {"model_name": config.name} | {name: getattr(config, name) for name in names}

    def slug(self) -> str:
        """Return the provider, the name, and what makes its vectors others."""
        dimensions = self._wanted.get("dimensions")
        return f"openai:{self.model_name}" + (f":{dimensions}" if dimensions else "")

    async def request(self, texts: Sequence[str]) -> Reply:
        """Send texts once."""
        import aiohttp
        import httpx2
        import openai

        encoding = self._encoding  # of this request: others that are on their way may find out meanwhile
        refused, failure = None, ""
        try:
            # Not `embeddings.create`, which looks at the type of every text, and makes an object of every vector.
            body = {"model": self.model_name, "input": list(texts), "encoding_format": encoding, **self._wanted}
            answer = await self._connected().post("/embeddings", cast_to=httpx2.Response, body=body)
        except openai.APIStatusError as error:
            refused = error.response
        # Of what is not HTTP, aiohttp's error comes as it is.
        except (openai.APIConnectionError, aiohttp.ClientError) as error:
            failure = type(error.__cause__ or error).__name__
        else:
            vectors, num_tokens = await asyncio.to_thread(decoded, answer.content, len(texts))
            return Reply(vectors, num_tokens, limits_of(answer.headers))
        # out here the libraries' errors, which quote the server and hold the key, are not the context of ours
        if refused is None:
            raise Unavailable(f"the provider cannot be reached ({failure})")
        if encoding == "base64" and refused.status_code in (400, 422) and _is_about_encoding(refused.content):
            self._encoding = "float"  # it does not know base64
            return await self.request(texts)
        raise refusal(refused.status_code, refused.headers, refused.content, texts, [self._key])

    @property
    def _is_own(self) -> bool:
        return not self._api_version and _is_own(self._base_url)

    def _connected(self) -> openai.AsyncOpenAI:
        """Return the one client, which is made on the loop that uses it."""
        if self._client is None:
            import openai

            for name in TALKATIVE:
                logging.getLogger(name).setLevel(logging.WARNING)
            common: dict[str, Any] = {
                "api_key": self._key,
                "organization": self._organization,
                "timeout": openai.Timeout(self.request_timeout_s, connect=min(CONNECT_S, self.request_timeout_s)),
                "max_retries": 0,  # the dispatcher owns them
                # Reads large answers at a tenth of what the default costs.
                "http_client": openai.DefaultAioHttpClient(verify=_trusted()),
            }
            if self._api_version:
                self._client = openai.AsyncAzureOpenAI(
                    azure_endpoint=self._base_url,
                    azure_deployment=self.model_name,
                    api_version=self._api_version,
                    **common,
                )
            else:
                self._client = openai.AsyncOpenAI(base_url=self._base_url, **common)
            self.at_end(self._client.close)
        return self._client


@lru_cache(maxsize=1)
def _trusted() -> ssl.SSLContext:
    """Return whom to trust: it is read from disk, once for all clients of the process."""
    import httpx2

    return httpx2.create_ssl_context()


def _address(base_url: str | None, api_version: str | None) -> str:
    """
    Return where to send requests: as is said, or else as the environment says.

    Raises:
        ConfigError: If nobody says where Azure's resource is, or what the environment says could not be stored; never quotes it.
    """
    if base_url:
        return base_url.rstrip("/")
    variable = "AZURE_OPENAI_ENDPOINT" if api_version else "OPENAI_BASE_URL"
    found = os.environ.get(variable)
    if not found and api_version:
        raise ConfigError("api_version: it is Azure's, whose resource --base-url or AZURE_OPENAI_ENDPOINT names")
    try:
        return checked_address(found or OPENAI_URL)
    except ValueError as error:
        raise ConfigError(f"{variable}: {error}") from None


def _terms(model_name: str, api_version: str | None) -> Terms:
    if model_name in EXACT_MODELS or api_version:
        return Terms(MAX_INPUTS, MAX_INPUT_TOKENS, MAX_REQUEST_TOKENS, ExactCounter())
    return Terms(MAX_INPUTS)


def _is_own(base_url: str | None) -> bool:
    return bool(base_url) and base_url != OPENAI_URL


def _is_about_encoding(body: bytes) -> bool:
    return b"encoding_format" in body or b"base64" in body
