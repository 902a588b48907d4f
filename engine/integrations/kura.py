"""
The engine inside Kura: embedding models that Kura takes for its own.

    from engine.integrations.kura import OpenAIEmbeddingModel      # was: from kura.embedding import OpenAIEmbeddingModel

Checkpoints are in `engine.integrations.kura_checkpoints`. Kura 0.5.4 has to be installed (docs/kura.md says how).
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.config import validated
from engine.errors import ConfigError, InputRejected
from engine.model_config import DEFAULT_MODEL, ModelConfig
from engine.models import registry
from engine.models.base import BaseEmbeddingModel as EngineModel
from engine.models.base import Vectors
from engine.models.embeddings import ONE_VECTOR
from engine.models.loop_thread import LoopThread
from engine.models.openai import OpenAIEmbeddingModel as EngineOpenAI
from engine.models.sentence_transformer import SentenceTransformerEmbeddingModel as EngineSentenceTransformer
from engine.sources.texts import check_list, reject_reason

try:
    from kura.base_classes import BaseEmbeddingModel
except ModuleNotFoundError as error:
    raise ConfigError(
        f"Kura is not installed here (there is no module {error.name!r}): docs/kura.md says how to install it"
    ) from None

STEP_TEXTS = 4096
"""Texts that are looked at between two chances for other coroutines: some milliseconds."""
STEP_VALUES = 100_000
"""Of vectors that become Python floats in one go: `tolist` holds the interpreter meanwhile, some milliseconds."""
MAX_NAMED = 10
"""Positions that an error names."""


class EngineEmbeddingModel(BaseEmbeddingModel):  # type: ignore[misc] # Kura has no types that mypy may use
    """
    A model of the engine as an embedding model of Kura. Any number of `embed` calls may be under way, on any event loops.

    All of them share one model, on an event loop of its own in a thread of its own, so that the caller's stays free. Texts go through it
    in slices, of which as many are under way as the model takes.

    Args:
        model: `provider:name` as for `--model`, or a model of the engine's.
        options: Fields of `ModelConfig`, such as `dimensions`; only with `provider:name`.

    Raises:
        ConfigError: If there is no such model, or it cannot be built.
    """

    def __init__(self, model: str | EngineModel = DEFAULT_MODEL, **options: Any) -> None:
        if isinstance(model, str):
            model = registry.build(validated(ModelConfig, {"model": model, **options}))
        elif options:
            raise ConfigError(f"{', '.join(sorted(options))}: the model is built already; give them to its class")
        if getattr(model, "long_texts", "") == "chunk-rows":
            raise ConfigError(ONE_VECTOR)
        self.model = model
        self._slots = asyncio.Semaphore(max(1, model.shards_at_once))
        self._thread = LoopThread("engine-kura")

    def slug(self) -> str:
        """Return the name of what decides the vectors."""
        return self.model.slug()

    async def embed(self, texts: list[str]) -> list[list[float]]:
        """
        Embed texts, each distinct one once.

        Args:
            texts: Neither empty nor blank; as many as there are.

        Returns:
            A list of floats for each text, in order.

        Raises:
            InputRejected: If texts cannot be embedded; names their positions and the reasons. Kura needs a vector for each.
            ProviderError: If the model fails whatever the text.
        """
        check_list(texts)
        return await self._thread.run(self._embedded(list(texts)))

    async def close(self) -> None:
        """Release the model and its threads; it is not used afterwards."""
        await self._thread.run(self.model.close())
        await self._thread.ended()

    async def _embedded(self, texts: Sequence[str]) -> list[list[float]]:
        numbers = await _numbered(texts)
        distinct = list(numbers)
        slices = list(_slices(distinct, self.model.max_shard_rows, self.model.max_shard_bytes))
        try:
            async with asyncio.TaskGroup() as tasks:
                found = [tasks.create_task(self._slice(texts, distinct[start:stop])) for start, stop in slices]
        except BaseExceptionGroup as group:
            raise _first(group) from None
        parts = [task.result() for task in found]
        found.clear()  # a task keeps its result
        rows = await _lists(parts)
        return await _in_order(texts, numbers, rows)

    async def _slice(self, texts: Sequence[str], some: list[str]) -> Vectors:
        async with self._slots:
            answer = await self.model.embed_rows(some)
        if answer.rejects:
            reasons = {some[number]: reason for number, reason in answer.rejects.items()}
            raise _refused({place: reasons[text] for place, text in enumerate(texts) if text in reasons})
        return answer.vectors


class OpenAIEmbeddingModel(EngineEmbeddingModel):
    """
    Kura's class of this name, by the engine: the same parameters, defaults and slug. The key is in `OPENAI_API_KEY`.

    Args:
        model_name: Such as text-embedding-3-small.
        model_batch_size: Texts a request at most, up to 2,048: larger is faster.
        n_concurrent_jobs: Requests at once.
        options: Of `engine.OpenAIEmbeddingModel`, such as `base_url` and `dimensions`.

    Raises:
        ConfigError: If there is no key, or the options do not fit.
    """

    def __init__(
        self,
        model_name: str = "text-embedding-3-small",
        model_batch_size: int = 50,
        n_concurrent_jobs: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(EngineOpenAI(model_name, model_batch_size, n_concurrent_jobs, **options))
        self.model_name = model_name
        self._slug = f"{self.model.slug()}-batchsize:{model_batch_size}-concurrent:{n_concurrent_jobs}"

    def slug(self) -> str:
        """Return what Kura's class returns; of `dimensions`, it says that too."""
        return self._slug


class SentenceTransformerEmbeddingModel(EngineEmbeddingModel):
    """
    Kura's class of this name, by the engine: the same parameters, defaults and slug.

    Args:
        model_name: Name on the Hugging Face Hub, a folder, or `package:name/folder`.
        model_batch_size: Texts that go through the model together at most.
        device: cpu, cuda, cuda:1, mps, or auto.
        options: Of `engine.SentenceTransformerEmbeddingModel`, such as `backend` and `dtype`.

    Raises:
        ConfigError: If there is no such model or device.
    """

    def __init__(
        self,
        model_name: str = "all-MiniLM-L6-v2",
        model_batch_size: int = 128,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(EngineSentenceTransformer(model_name, model_batch_size, device, **options))
        self.model_name = model_name
        self._slug = f"{self.model.slug()}-batchsize:{model_batch_size}"

    def slug(self) -> str:
        """Return what Kura's class returns; of a `revision`, it says that too."""
        return self._slug


async def _numbered(texts: Sequence[str]) -> dict[str, int]:
    """Number the distinct texts; raise for all that cannot be embedded, before anything is."""
    numbers: dict[str, int] = {}
    reasons: dict[int, str] = {}
    for place, text in enumerate(texts):
        if place % STEP_TEXTS == 0:
            await asyncio.sleep(0)
        if (reason := reject_reason(text)) is not None:
            reasons[place] = reason
        else:
            numbers.setdefault(text, len(numbers))
    if reasons:
        raise _refused(reasons)
    return numbers


async def _lists(parts: list[Vectors]) -> list[list[float]]:
    """Make Python's floats of vectors, a few at a time, and free the vectors on the way."""
    rows: list[list[float]] = []
    parts.reverse()
    while parts:
        vectors = parts.pop()
        step = _step(vectors.shape[1])
        for start in range(0, len(vectors), step):
            rows += vectors[start : start + step].tolist()
            _take_for_old()
            await asyncio.sleep(0)
    return rows


async def _in_order(texts: Sequence[str], numbers: dict[str, int], rows: list[list[float]]) -> list[list[float]]:
    """Give each text its own list: of the same text's, copies, since whoever has a list may change it."""
    if len(rows) == len(texts):
        return rows
    is_given = bytearray(len(rows))
    step = _step(len(rows[0]))
    answer = []
    for place, text in enumerate(texts):
        if place % step == 0:
            _take_for_old()
            await asyncio.sleep(0)
        number = numbers[text]
        answer.append(list(rows[number]) if is_given[number] else rows[number])
        is_given[number] = 1
    return answer


def _step(dimension: int) -> int:
    return max(1, min(STEP_TEXTS, STEP_VALUES // max(1, dimension)))


def _take_for_old() -> None:
    """
    Have the garbage collector take all that is new for old.

    It would look at every float of every new list, three times over, for seconds in which no thread runs: 77 million in 50,000 vectors.
    """
    if not gc.get_freeze_count():  # or what another part of the program froze would thaw
        gc.freeze()
        gc.unfreeze()


def _slices(texts: Sequence[str], max_rows: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut texts where a slice has enough rows or text; characters stand for bytes."""
    start = size = 0
    for place, text in enumerate(texts):
        if place > start and (place - start == max_rows or size + len(text) > max_bytes):
            yield start, place
            start, size = place, 0
        size += len(text)
    if start < len(texts):
        yield start, len(texts)


def _refused(reasons: Mapping[int, str]) -> InputRejected:
    """Return an error that names positions and why, and no text."""
    by_reason: dict[str, list[int]] = {}
    for place, reason in reasons.items():
        by_reason.setdefault(reason, []).append(place)
    lines = "; ".join(f"at {_listed(places)}: {reason}" for reason, places in list(by_reason.items())[:MAX_NAMED])
    return InputRejected(
        f"{len(reasons)} texts cannot be embedded ({lines}), and Kura needs a vector for each: take them out of the list"
    )


def _listed(places: Sequence[int]) -> str:
    more = f" and {len(places) - MAX_NAMED} more" if len(places) > MAX_NAMED else ""
    return ", ".join(map(str, places[:MAX_NAMED])) + more


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group: the others were under way beside it."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


__all__ = ["EngineEmbeddingModel", "OpenAIEmbeddingModel", "SentenceTransformerEmbeddingModel"]
