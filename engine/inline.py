"""Embedding inline: a few texts, here and now, without a cluster, files or a job."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.config import validated
from engine.errors import ConfigError, EngineError, ProviderError
from engine.model_config import ModelConfig
from engine.models import registry
from engine.models.embeddings import ONE_VECTOR
from engine.models.loop_thread import LoopThread
from engine.sources.texts import check_list, reject_reason

if TYPE_CHECKING:
    from engine.models.base import BaseEmbeddingModel, Embeddings, Vectors


def embed(texts: Sequence[str], **options: Any) -> Vectors:
    """
    Embed a few texts here and now: no cluster, no files. It works inside a running event loop too.

    Args:
        texts: Neither empty nor blank, each a string.
        options: `model` and the other fields of `ModelConfig`. The model stays loaded for the next call.

    Returns:
        Shape (len(texts), dimension), float32.

    Raises:
        EngineError: If a text cannot be embedded; says which, by position, and why.
    """
    check_list(texts)
    for position, text in enumerate(texts):
        if (reason := reject_reason(text)) is not None:
            raise EngineError(f"text {position} cannot be embedded: {reason}")
    config = registry.suited(validated(ModelConfig, options), sum(map(len, texts)))
    if config.long_texts == "chunk-rows":
        raise ConfigError(ONE_VECTOR)
    answer = _embed_aside(_resident(config.model_dump_json()), list(texts))
    if answer.rejects:
        position, reason = min(answer.rejects.items())
        raise EngineError(f"text {position} cannot be embedded: {reason}")
    return answer.vectors


@lru_cache(maxsize=2)
def _resident(config: str) -> BaseEmbeddingModel:
    """Build a model once for all calls of `embed` with the same options."""
    return registry.build(ModelConfig.model_validate_json(config))


def _embed_aside(model: BaseEmbeddingModel, texts: list[str]) -> Embeddings:
    """Run the model's coroutine to its end on the one loop that all calls share, in a thread beside the caller's."""
    if _own_thread().is_current:
        raise ProviderError(
            "engine.embed was called by a model's own `embed`, which it would wait for, for ever: have the model await "
            "another model's `embed`, or call engine.embed by asyncio.to_thread"
        )
    return _own_thread().submit(model.embed_rows(texts)).result()


@lru_cache(maxsize=1)
def _own_thread() -> LoopThread:
    return LoopThread("engine-embed")
