"""Custom models whose classes have Kura's interface and inherit from nobody: Kura need not be installed for these."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import ConfigError, ProviderError
from engine.model_config import ModelConfig
from engine.models import registry


class LikeKuras:
    """Has the interface, and wraps what it raises as Kura's retries do."""

    def __init__(self, size: int = 3) -> None:
        self.size = size
        self.is_closed = False

    def slug(self) -> str:
        return f"like-{self.size}"

    async def embed(self, texts: list[str]) -> list[list[float]]:
        if self.size < 0 or "bad" in texts:
            raise Retried(ValueError("quotes a text"))
        return [[float(len(text))] * self.size for text in texts]

    async def close(self) -> None:
        self.is_closed = True


class Plain(LikeKuras):
    """Answers without a coroutine, and has a version."""

    version = "2"

    def embed(self, texts: list[str]) -> list[list[float]]:
        return [[1.0] * self.size for _ in texts]


class Retried(Exception):
    """Says nothing of its own, like tenacity's RetryError."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.last_attempt = Attempt(cause)


class Attempt:
    def __init__(self, cause: Exception) -> None:
        self._cause = cause

    def exception(self) -> Exception:
        return self._cause


class NoSlug:
    async def embed(self, texts: list[str]) -> list[list[float]]:
        return []


def config(name: str, **arguments) -> ModelConfig:
    return ModelConfig(model=f"custom:tests.test_kura_like.{name}", model_args=arguments)


def test_a_class_with_the_interface_is_a_model_with_all_that_the_engine_checks():
    """Arguments, slug, rejects with the cause and not its message, dimension, version, an end."""
    model = registry.build(config("LikeKuras", size=4))
    assert model.slug() == "like-4"
    answer = asyncio.run(model.embed_rows(["a", "bad", "abc"]))
    assert answer.vectors.tolist() == [[1.0] * 4, [3.0] * 4]
    assert answer.rejects == {1: "the model fails on it: ValueError"}
    asyncio.run(model.close())
    assert asyncio.run(registry.build(config("Plain")).dimension()) == 3
    assert registry.identity(config("Plain"))["version"] == "2"
    assert registry.model_class(config("Plain")) is registry.model_class(config("Plain"))


def test_what_is_wrong_with_such_a_class_is_said():
    """It fails whatever the text, takes other arguments, or lacks half of the interface."""
    with pytest.raises(ProviderError, match="every text") as caught:
        asyncio.run(registry.build(config("LikeKuras", size=-1)).embed_rows(["a"]))
    assert "quotes" not in str(caught.value)
    with pytest.raises(ConfigError, match="model_args"):
        registry.build(config("LikeKuras", colour=1))
    with pytest.raises(ConfigError, match="nor a class like it"):
        registry.build(config("NoSlug"))
    with pytest.raises(ConfigError, match="dtype"):
        registry.build(config("LikeKuras").model_copy(update={"dtype": "bfloat16"}))
