"""Embedding inline: a few texts, here and now, without a cluster, files or a job."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from threading import RLock
from typing import TYPE_CHECKING, Any

from engine.config import validated
from engine.errors import ConfigError, EngineError, InputRejected, ProviderError
from engine.model_config import ModelConfig
from engine.models import registry
from engine.models.embeddings import ONE_VECTOR
from engine.models.loop_thread import LoopThread
from engine.sources.texts import check_list, reject_reason

if TYPE_CHECKING:
    from engine.models.base import BaseEmbeddingModel, Embeddings, Vectors

MODELS_KEPT = 2


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
    config = validated(ModelConfig, options)
    if config.long_texts == "chunk-rows":
        raise ConfigError(ONE_VECTOR)
    model = _residents.model(config, sum(map(len, texts)))
    try:
        answer = _embed_aside(model, list(texts))
    except InputRejected:
        raise
    except ProviderError:  # the next call may have another key
        _residents.let_go(config)
        raise
    if answer.rejects:
        position, reason = min(answer.rejects.items())
        raise EngineError(f"text {position} cannot be embedded: {reason}")
    return answer.vectors


class _Residents:
    """The models of the latest calls, one for each set of options: on a GPU there may be no room for it twice."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[ModelConfig, BaseEmbeddingModel]] = OrderedDict()
        self._turn = RLock()  # a model that is being built may embed by another

    def model(self, config: ModelConfig, num_bytes: int) -> BaseEmbeddingModel:
        """Return the model of a config; it is built if it is not there, or was for so little text that it is not the fastest one for this."""
        key, wanted = config.model_dump_json(), registry.suited(config, num_bytes)
        with self._turn:
            kept = self._kept.pop(key, None)
            if kept is None or (kept[0] not in (wanted, config) and getattr(kept[1], "device", "") == "cpu"):
                kept = (wanted, registry.build(wanted))
            self._kept[key] = kept
            while len(self._kept) > MODELS_KEPT:
                self._kept.popitem(last=False)
        return kept[1]

    def let_go(self, config: ModelConfig) -> None:
        """Build the model anew for the next call."""
        with self._turn:
            self._kept.pop(config.model_dump_json(), None)


_residents = _Residents()


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
