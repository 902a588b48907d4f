"""The provider interface, and what every provider gets for free: checked answers, and bad texts told from bad models."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, InputRejected, ProviderError
from engine.model_config import ModelConfig
from engine.models.duplicates import Distinct
from engine.models.embeddings import Embeddings as Embeddings
from engine.models.embeddings import Ints as Ints
from engine.models.embeddings import Vectors as Vectors

if TYPE_CHECKING:
    from engine.models.api.port import BudgetPort

logger = logging.getLogger(__name__)

PROBE = "The quick brown fox jumps over the lazy dog."
"""A text that every model embeds. When one text fails alone, this one tells whether the text or the model is at fault."""

UNUSABLE = "vector is zero or not finite"
MAX_REASON_CHARACTERS = 200
MODEL_SHARD_ROWS = 16_384
MODEL_SHARD_BYTES = 4 * 1024**2
"""Text in a shard of a large job: seconds of work for the fastest model, beside which Ray's 16 ms a shard are nothing."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What an actor with a model needs."""

    has_device: bool = True
    """A GPU, or cores of its own."""
    parcels_inside: int = 3
    """Of an actor: one on the device, one that is ready for it, one that leaves."""
    actors: int | None = None
    """How many are enough; None for as many as there is room for."""
    most_gpus: float | None = None
    """That one of them can use; None if the model may use any number."""


class BadAnswer(Exception):
    """A model's answer that is not one vector of the right shape for each text."""

    num_tokens: int | None = None
    """That a provider bills for it all the same; None if the answer does not say."""


class BaseEmbeddingModel(ABC):
    """
    An embedding model. A custom provider implements `slug` and `embed`, and is named `custom:package.module.Class`.

    The engine builds it once in each actor, from its class and arguments, and keeps one event loop for it. `embed` may raise
    anything: the engine finds the texts that cause it by halving, and rejects them alone.
    """

    options: ClassVar[frozenset[str]] = frozenset({"model", "model_args", "device"})
    """The fields of `ModelConfig` that the model goes by; a job that sets others is refused."""
    max_shard_rows: ClassVar[int] = MODEL_SHARD_ROWS
    max_shard_bytes: ClassVar[int] = MODEL_SHARD_BYTES
    """Of text, in the shards of a job that does not say how large they are."""

    shards_at_once: int = 1
    """Calls of `embed_rows` that may overlap. A model that waits (for a network, for its turn on a device) allows several."""
    version: str = ""
    """Of a custom model: change it when its code changes the vectors, so that they cannot mix in one output."""

    _dimension: int | None = None

    @abstractmethod
    def slug(self) -> str:
        """Return a stable name of what decides the vectors."""

    @abstractmethod
    async def embed(self, texts: list[str]) -> list[list[float]] | npt.NDArray[Any]:
        """Return a vector for each text, in order: lists of floats, or an array of shape (len(texts), dimension)."""

    def share(self, budget: BudgetPort) -> None:  # noqa: B027 - of those that ask a provider
        """Go by a budget that is shared with others; to be called before the first text is embedded."""

    def remember(self) -> None:  # noqa: B027 - of those that may
        """Keep the vectors of the latest texts for when these come again; to be called by whoever embeds shard after shard."""

    def is_lost(self) -> bool:
        """
        Say, after an error, whether the model's process is lost: whatever it is asked for fails from now on, and a new one would do.

        An actor whose model is lost ends itself, and Ray starts another, which has its shards.
        """
        return False

    async def close(self) -> None:
        """Release what the model holds; it is not used afterwards."""
        return

    @classmethod
    def needs(cls, config: ModelConfig) -> Needs:  # noqa: ARG003 - for those that go by it
        """Say what an actor with the model needs."""
        return Needs()

    @classmethod
    def check_options(cls, config: ModelConfig) -> None:
        """
        Refuse options that the model does not go by: whoever gives one expects that it does something.

        Raises:
            ConfigError: Names them.
        """
        given = [
            name
            for name, option in ModelConfig.model_fields.items()
            if name not in cls.options and getattr(config, name) != option.get_default(call_default_factory=True)
        ]
        if not given:
            return
        if config.provider == "custom":
            raise ConfigError(
                f"{', '.join(given)}: not for custom models; put what {config.name} takes into model_args"
            )
        raise ConfigError(f"{', '.join(given)}: not for {config.provider} models; leave it out")

    @classmethod
    def pinned(cls, config: ModelConfig) -> ModelConfig:
        """Return `config` with whatever can move (a branch) replaced by what it stands for now (a commit)."""
        return config

    @classmethod
    def suited(cls, config: ModelConfig, num_bytes: int) -> ModelConfig:  # noqa: ARG003 - for those that go by it
        """Return `config` with what it leaves open, and vectors do not depend on, chosen for an actor's share of the text."""
        return config

    @classmethod
    def identity(cls, config: ModelConfig) -> dict[str, Any]:
        """Return what names the model in the fingerprint, found without loading it."""
        return {"model": config.model, "version": cls.version}

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """
        Build the model as a job's config describes it; a custom model gets `model_args` as keyword arguments.

        Raises:
            ConfigError: If the arguments do not fit.
        """
        try:
            return cls(**config.model_args)
        except TypeError as error:
            raise ConfigError(
                f"cannot build {config.name} from model_args {sorted(config.model_args)}: {error}"
            ) from None

    async def embed_rows(self, texts: Sequence[str]) -> Embeddings:
        """
        Embed texts, those that are the same once, and check every vector; a text that fails alone is rejected.

        Args:
            texts: Neither empty nor blank.

        Raises:
            ProviderError: If the model fails whatever the text. Nothing is rejected then.
        """
        distinct = Distinct.of(texts)
        return distinct.spread(await self.embed_distinct(distinct.texts))

    async def embed_distinct(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts of which no two are the same, as `embed_rows` says."""
        vectors: Vectors | None = None
        has_vector = np.zeros(len(texts), bool)
        rejects: dict[int, str] = {}
        failed_alone: set[int] = set()
        unusable: list[int] = []
        ranges = [(0, len(texts))] if texts else []
        while ranges:
            start, stop = ranges.pop()
            try:
                answer = await self._checked(list(texts[start:stop]))
            except Exception as error:
                self._raise_if_not_about_texts(error)
                if stop - start > 1:
                    middle = (start + stop) // 2
                    ranges += [(middle, stop), (start, middle)]
                    continue
                await self._pass_probe(error)
                if start not in failed_alone:  # once more: what passes by is not the text's fault
                    failed_alone.add(start)
                    ranges.append((start, stop))
                else:
                    self._raise_if_not_about_this(error)
                    rejects[start] = reason_of(error)
                continue
            if vectors is None:
                vectors = np.empty((len(texts), answer.shape[1]), np.float32)
            is_usable = usable(answer)
            vectors[start:stop] = answer  # a copy: the model may use its buffer again
            has_vector[start:stop] = is_usable
            bad = (start + np.flatnonzero(~is_usable)).tolist()
            if stop - start > 1:
                ranges += [(position, position + 1) for position in bad]  # once more, alone
            else:
                unusable += bad
                if bad and len(unusable) == 1:
                    await self._pass_probe(BadAnswer(UNUSABLE))
        if len(unusable) > 1:  # a model that broke after the first of them fails here, before any is rejected
            await self._pass_probe(BadAnswer(UNUSABLE))
        rejects |= dict.fromkeys(unusable, f"the model's {UNUSABLE}")
        if vectors is None:
            vectors = np.empty((len(texts), await self.dimension() if texts else self._dimension or 0), np.float32)
        return Embeddings(vectors if has_vector.all() else vectors[has_vector], rejects)

    async def dimension(self) -> int:
        """Return the dimension of the vectors, by embedding a probe if no text has been embedded yet."""
        if self._dimension is None:
            await self._checked([PROBE])
        return self._dimension or 0

    async def _raw(self, texts: list[str]) -> Any:
        """Return the model's answer to texts that it takes as they are."""
        return await self.embed(texts)

    async def _checked(self, texts: list[str]) -> Vectors:
        """Return the model's answer as an array, or raise `BadAnswer` if it is not one vector of one length for each text."""
        answer = await self._raw(texts)
        try:
            array = np.asarray(answer, dtype=np.float32)
        except (TypeError, ValueError):
            raise BadAnswer("vectors are ragged or not numbers") from None
        if array.ndim != 2 or len(array) != len(texts):
            raise BadAnswer(f"shape {array.shape} for {len(texts)} texts")
        if self._dimension is None and array.shape[1] > 0:
            self._dimension = array.shape[1]
        if array.shape[1] != self._dimension:
            raise BadAnswer(f"{array.shape[1]} dimensions instead of {self._dimension}")
        return array

    async def _pass_probe(self, error: Exception) -> None:
        """Raise if the model does not embed the probe, because then it fails whatever the text."""
        try:
            answer = await self._checked([PROBE])
            if not usable(answer).all():
                raise BadAnswer(UNUSABLE)  # noqa: TRY301 - judged with the model's own errors
        except Exception as again:
            self._raise_if_not_about_texts(again)
            raise ProviderError(
                f"the model {self.slug()} fails on every text ({_described(error)}; on a plain English sentence "
                f"{_described(again)}): mend the model or its settings, then run the same command again"
            ) from None

    def _raise_if_not_about_this(self, error: Exception) -> None:
        """Raise for what no text brings about: a network or a machine that fails now and then."""
        if isinstance(error, (OSError, MemoryError)):  # TimeoutError and ConnectionError are OSErrors
            raise ProviderError(
                f"the model {self.slug()} fails with {type(error).__name__} again and again: "
                "see to its network or memory, then run the same command again"
            ) from None

    @staticmethod
    def _raise_if_not_about_texts(error: Exception) -> None:
        if isinstance(error, ProviderError) and not isinstance(error, InputRejected):
            raise error


def reason_of(error: Exception) -> str:
    """Return a reject's reason for an exception: never its message unless it is ours, since it may quote the text."""
    if isinstance(error, InputRejected):
        return error.message[:MAX_REASON_CHARACTERS]
    return f"the model fails on it: {_described(error)}"


def _described(error: Exception) -> str:
    if isinstance(error, BadAnswer):
        return f"bad answer, {error}"
    return type(error).__name__


def lowest_cosine(vectors: Vectors, others: Vectors) -> float:
    """Return the lowest cosine of pairs of vectors; -1 if there are not as many of both, or of other dimensions."""
    if vectors.shape != others.shape:
        return -1.0
    if not len(vectors):
        return 1.0
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):  # of a zero, or what is not finite, it is nan: below any bound
        return float(((vectors * others).sum(axis=1) / lengths).min())


def usable(vectors: Vectors) -> npt.NDArray[np.bool_]:
    """Say of each vector whether it is finite and not zero."""
    return np.logical_and(np.isfinite(vectors).all(axis=1), vectors.any(axis=1))
