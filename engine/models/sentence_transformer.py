"""sentence-transformers models, on the device that the actor was given."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from engine.disk import expanded
from engine.errors import ConfigError, InputRejected
from engine.model_config import LongTexts, ModelConfig
from engine.models import model_files
from engine.models.base import BaseEmbeddingModel, Needs, usable
from engine.models.embeddings import ONE_VECTOR, Embeddings
from engine.models.recent import Recent

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from engine.models.base import Vectors
    from engine.models.encoders import Encoded
    from engine.models.tokens import Tokens

SHARDS_AT_ONCE = 3
"""One on the device, the next one tokenized and waiting for it, and the one before on its way out."""
WORTH_CONVERTING_BYTES = 200_000
"""Of text that one actor will see. A conversion takes two seconds and more, in which PyTorch embeds some thousand short texts."""


class SentenceTransformerEmbeddingModel(BaseEmbeddingModel):
    """
    A model of the sentence-transformers library; parameter names are Kura's where Kura has them.

    Args:
        model_name: Name on the Hugging Face Hub, a folder, or `package:name/folder` for one inside an installed package.
        model_batch_size: Texts that go through the model together at most; by default only `batch_tokens` limits them.
        device: auto, cpu, cuda, cuda:1, mps…
        backend: auto, torch or openvino: what runs the model. It decides the speed, and not the vectors.
        batch_tokens: Tokens, padding among them, that go through the model together; by default found by measuring.
        dtype: float32, bfloat16 or float16: what the model computes in. Vectors are float32.
        max_length: Tokens a text is cut to.
        dimensions: Keep the first so many dimensions, and normalise again.
        normalize: Scale each vector to length 1, if the model does not.
        prompt: Put before every text.
        long_texts: What becomes of texts of more tokens than the model takes: truncate; chunk, which averages the vectors of overlapping
            chunks by their tokens, and scales the mean to length 1 if their vectors have it; chunk-rows, which keeps each of them; or reject.
        chunk_overlap: Tokens that a chunk shares with the one before.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ConfigError: If there is no such model, device or backend.
    """

    options = frozenset(
        {
            "model", "batch_size", "device", "backend", "batch_tokens", "dtype", "max_length", "dimensions", "normalize",
            "prompt", "long_texts", "chunk_overlap", "revision", "trust_remote_code",
        }
    )  # fmt: skip
    shards_at_once = SHARDS_AT_ONCE
    _recent: Recent | None = None

    def __init__(
        self,
        model_name: str = "all-MiniLM-L6-v2",
        model_batch_size: int | None = None,
        device: str = "auto",
        *,
        backend: str = "auto",
        batch_tokens: int | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        dimensions: int | None = None,
        normalize: bool = False,
        prompt: str | None = None,
        long_texts: LongTexts = "truncate",
        chunk_overlap: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from engine.models import architecture, local

        self.model_name = model_name
        self.model_batch_size = model_batch_size
        self._slug = f"sentence-transformers:{model_name}" + (f"@{revision}" if revision else "")
        chosen = local.chosen(device, backend)
        model = local.load(model_name, chosen, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
        architecture.limit_length(model, model_name, max_length)
        _check_dimensions(model, model_name, dimensions)
        self._dimensions = dimensions if dimensions is not None else model.truncate_dim
        self._normalize = normalize or dimensions is not None
        self._encoder = local.encoder(
            model, chosen, dtype=dtype, prompt=prompt, max_rows=model_batch_size, batch_tokens=batch_tokens
        )
        self.long_texts = long_texts
        self._fitter = local.fitter(model, self._encoder, prompt=prompt, how=long_texts, overlap=chunk_overlap)
        self.device = self._encoder.device
        self.backend = self._encoder.backend_name

    @classmethod
    def needs(cls, config: ModelConfig) -> Needs:  # noqa: ARG003 - the same for all
        """Say that an actor uses one GPU at most."""
        return Needs(most_gpus=1)

    @classmethod
    def check_options(cls, config: ModelConfig) -> None:
        """Refuse options that the model does not go by, and an overlap of no chunks."""
        super().check_options(config)
        if config.chunk_overlap is not None and config.long_texts not in ("chunk", "chunk-rows"):
            raise ConfigError("chunk_overlap: it is for --long-texts chunk and chunk-rows; leave it out")

    @classmethod
    def pinned(cls, config: ModelConfig) -> ModelConfig:
        """Return `config` with the revision replaced by the commit that it names now; folders have none."""
        if model_files.folder_of(config.name) is not None:
            if config.revision:
                raise ConfigError(f"revision: {config.name} is a folder, and has none; leave it out")
            if config.name.startswith(model_files.PACKAGE):
                return config
            absolute = expanded(config.name)  # actors may have another working directory
            return config.model_copy(update={"model": f"{config.provider}:{absolute}"})
        commit = model_files.commit_of(model_files.hub_name(config.name), config.revision)
        return config.model_copy(update={"revision": commit})

    @classmethod
    def suited(cls, config: ModelConfig, num_bytes: int) -> ModelConfig:
        """Return `config` with PyTorch for its backend, if there is too little text to pay for a conversion."""
        if config.backend == "auto" and num_bytes < WORTH_CONVERTING_BYTES:
            return config.model_copy(update={"backend": "torch"})
        return config

    @classmethod
    def identity(cls, config: ModelConfig) -> dict[str, Any]:
        """Name the model by its commit on the Hub, or by the content of its folder, wherever that lies."""
        folder = model_files.folder_of(config.name)
        if folder is not None:
            return {"provider": config.provider, "content": model_files.content_hash_of(folder)}
        return {"provider": config.provider, "name": model_files.hub_name(config.name), "revision": config.revision}

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """Build the model as a job's config describes it."""
        return cls(
            config.name,
            config.batch_size,
            config.device,
            backend=config.backend,
            batch_tokens=config.batch_tokens,
            dtype=config.dtype,
            max_length=config.max_length,
            dimensions=config.dimensions,
            normalize=config.normalize,
            prompt=config.prompt,
            long_texts=config.long_texts,
            chunk_overlap=config.chunk_overlap,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )

    def slug(self) -> str:
        """Return the provider, the name and the revision."""
        return self._slug

    async def embed(self, texts: list[str]) -> npt.NDArray[Any]:
        """
        Return an array of shape (len(texts), dimension), float32; the event loop stays free meanwhile.

        Raises:
            ConfigError: If each chunk of a text is to have a vector of its own; `embed_rows` returns those.
            InputRejected: If a text is longer than the model takes, and such are to be rejected.
        """
        if self.long_texts == "chunk-rows":
            raise ConfigError(ONE_VECTOR)
        if self._fitter is None:
            return await self._raw(texts)
        answer = await self.embed_rows(texts)
        for position, reason in sorted(answer.rejects.items()):
            raise InputRejected(f"text {position} cannot be embedded: {reason}")
        return answer.vectors

    def remember(self) -> None:
        """Keep the vectors of the latest texts: the same text has the same vector, but for rounding, in whatever batch."""
        self._recent = Recent()

    async def embed_distinct(self, texts: Sequence[str]) -> Embeddings:
        """Embed and check texts as every model does; of those that it remembers only the vectors are looked up."""
        if self._recent is None:
            return await self._embed_fitted(texts)
        return await self._recent.embedded(texts, self._embed_fitted)

    async def _embed_fitted(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts, and what is too long as was asked for."""
        if self._fitter is None:
            return await self._embed_pieces(texts)
        fitted = await asyncio.to_thread(self._fitter, texts)
        answer = await self._embed_pieces(fitted.pieces, fitted.tokens)
        return await asyncio.to_thread(fitted.joined, answer, pooled=self.long_texts != "chunk-rows")

    async def _embed_pieces(self, texts: Sequence[str], tokens: Tokens | None = None) -> Embeddings:
        """Embed texts that need no cutting but the model's own: in one go, and only those again, one by one, that failed in it."""
        try:
            answer = await asyncio.to_thread(self._encode, texts, tokens)
        except Exception:  # of no batch, but of all texts together: a tokenizer's, an `encode`'s
            answer = None
        if answer is None:  # the error is gone, and with it what its frames held of the device's memory
            return await super().embed_distinct(texts)
        if answer.vectors.shape[1]:
            self._dimension = answer.vectors.shape[1]
        good = usable(answer.vectors)
        good[list(answer.failed)] = False
        if not good.all():
            again = np.flatnonzero(~good)
            rest = await super().embed_distinct([texts[int(at)] for at in again])
            answer.rejects = {int(again[at]): reason for at, reason in rest.rejects.items()}
            if len(rest.vectors):
                if not answer.vectors.shape[1]:  # not one batch came through
                    answer.vectors = np.empty((len(texts), rest.vectors.shape[1]), np.float32)
                saved = np.array([at for number, at in enumerate(again) if number not in rest.rejects])
                answer.vectors[saved] = rest.vectors
                good[saved] = True
            answer.vectors = answer.vectors[good]
        return answer

    def is_lost(self) -> bool:
        """Say whether CUDA has given up the process."""
        from engine.models.backends.pytorch import is_lost

        return is_lost(self.device)

    async def close(self) -> None:
        """End the threads that run the model."""
        self._encoder.close()

    async def _raw(self, texts: list[str]) -> npt.NDArray[Any]:
        encoded = await asyncio.to_thread(self._encode, texts)
        for error in encoded.failed.values():
            raise error
        return encoded.vectors

    def _encode(self, texts: Sequence[str], tokens: Tokens | None = None) -> Encoded:
        encoded = self._encoder(texts, tokens)
        encoded.vectors = self._finished(encoded.vectors)
        return encoded

    def _finished(self, vectors: Vectors) -> Vectors:
        """Cut vectors, and scale them to length 1, as was asked for: in float32, whatever the model computes in."""
        if self._dimensions is not None:
            vectors = np.ascontiguousarray(vectors[:, : self._dimensions])
        if self._normalize:
            with np.errstate(invalid="ignore", divide="ignore"):  # zeros and what is not finite are found by the checks
                vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


def _check_dimensions(model: SentenceTransformer, name: str, dimensions: int | None) -> None:
    full = model.get_embedding_dimension()
    if dimensions is not None and full is not None and dimensions > full:
        raise ConfigError(f"dimensions: {name} has {full}, of which {dimensions} cannot be kept")
