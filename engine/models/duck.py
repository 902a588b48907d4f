"""Classes that have the interface without the base class, such as Kura's own, as models of the engine."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any, ClassVar

from engine.models.base import BaseEmbeddingModel


class DuckModel(BaseEmbeddingModel):
    """
    A model whose class is not the engine's, and has `slug()` and `embed(texts)`. Its subclasses are made by `wrapped`.

    Args:
        arguments: Of the class.
    """

    inner: ClassVar[type]
    """The class."""

    def __init__(self, **arguments: Any) -> None:
        self._model = self.inner(**arguments)

    def slug(self) -> str:
        """Return what the model says."""
        return str(self._model.slug())

    async def embed(self, texts: list[str]) -> Any:
        """Return what the model returns; of the error of its last retry, the cause."""
        try:
            answer = self._model.embed(texts)
            return await answer if inspect.isawaitable(answer) else answer
        except Exception as error:
            # tenacity's RetryError, which Kura's classes raise, says nothing of its own.
            attempt = getattr(error, "last_attempt", None)
            cause = attempt.exception() if attempt is not None else None
            if isinstance(cause, Exception):
                raise cause from None
            raise

    async def close(self) -> None:
        """Close the model, if it can be."""
        closed = self._model.close() if callable(getattr(self._model, "close", None)) else None
        if inspect.isawaitable(closed):
            await closed


def has_interface(found: type) -> bool:
    """Say whether a class could be a model: it can be built, and has `slug` and `embed`."""
    methods = (getattr(found, name, None) for name in ("slug", "embed"))
    return not inspect.isabstract(found) and all(map(callable, methods))


@lru_cache(maxsize=32)
def wrapped(found: type) -> type[DuckModel]:
    """Return the class of models of the engine whose work a class with the interface does."""
    return type(found.__name__, (DuckModel,), {"inner": found, "version": str(getattr(found, "version", ""))})
