"""The registry: from `provider:name` to a model class. A description of a model travels; the live model is built where it runs."""

from __future__ import annotations

import importlib
from typing import Any

from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.models.base import BaseEmbeddingModel
from engine.models.duck import has_interface, wrapped

CUSTOM = "custom"
PROVIDERS = {
    "sentence-transformers": "engine.models.sentence_transformer.SentenceTransformerEmbeddingModel",
    "openai": "engine.models.openai.OpenAIEmbeddingModel",
    "cohere": "engine.models.cohere.CohereEmbeddingModel",
}
"""Where each provider's class is. Its module is imported when it is asked for, and heavy imports are inside its methods."""


def model_class(config: ModelConfig) -> type[BaseEmbeddingModel]:
    """
    Return the class that a config names.

    Raises:
        ConfigError: If there is no such provider, module or class, or it does not take the options that are given.
    """
    if config.provider == CUSTOM:
        found = _imported(config.name)
    elif config.model_args:
        raise ConfigError("model_args are for custom models; give the options of this one by their own names")
    elif config.provider in PROVIDERS:
        found = _imported(PROVIDERS[config.provider])
    else:
        known = ", ".join([*PROVIDERS, CUSTOM])
        raise ConfigError(f"unknown provider {config.provider!r} in {config.model!r}; known are: {known}")
    found.check_options(config)
    return found


def pinned(config: ModelConfig) -> ModelConfig:
    """Return `config` with a moving revision replaced by the commit that it names now."""
    return model_class(config).pinned(config)


def suited(config: ModelConfig, num_bytes: int) -> ModelConfig:
    """Return `config` with what it leaves open chosen for so much text."""
    return model_class(config).suited(config, num_bytes)


def identity(config: ModelConfig) -> dict[str, Any]:
    """Return what names a pinned config's model in the fingerprint, without loading it."""
    return model_class(config).identity(config)


def build(config: ModelConfig) -> BaseEmbeddingModel:
    """Build the live model. This is where torch and the weights are loaded."""
    return model_class(config).from_config(config)


def _imported(path: str) -> type[BaseEmbeddingModel]:
    module_name, _, class_name = path.rpartition(".")
    if not all(step.isidentifier() for step in path.split(".")) or not module_name:
        raise ConfigError(f"{path!r} is not package.module.Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"cannot import {path}: there is no module {error.name!r} on the import path of this process; "
            "install it, or run where it is (PYTHONPATH)"
        ) from None
    except Exception as error:  # whatever the module of a user does as it is imported
        raise ConfigError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ConfigError(f"the module {module_name} has no class {class_name!r}")
    if isinstance(found, type) and issubclass(found, BaseEmbeddingModel):
        return found
    if isinstance(found, type) and has_interface(found):
        return wrapped(found)
    raise ConfigError(
        f"{path} is not a subclass of engine.BaseEmbeddingModel, nor a class like it, with slug() and an async embed(texts)"
    )
