"""Models behind an API: what a provider's class inherits, so that all it has to know is its own request."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from engine.disk import expanded
from engine.errors import ConfigError, InputRejected
from engine.model_config import LongTexts, ModelConfig
from engine.models.api.answers import Reply
from engine.models.api.budget import Budget
from engine.models.api.dispatcher import Dispatcher
from engine.models.api.limits import Limits
from engine.models.api.long_texts import TOO_LONG
from engine.models.api.manners import Manners
from engine.models.api.orders import Order
from engine.models.api.port import BudgetPort
from engine.models.api.terms import Terms
from engine.models.base import PROBE, BaseEmbeddingModel, Embeddings, Needs
from engine.models.loop_thread import Closing, LoopThread
from engine.sources.texts import reject_reason

DEFAULT_CONCURRENT_REQUESTS = 8
"""Of an actor. A provider's limits are reached with fewer; a server of one's own without limits wants some."""
SHARDS_BEYOND_REQUESTS = 2
"""That are in an actor beside one for each request: one that is prepared, and one that leaves."""
GIVE_UP_S = 1800.0
REQUEST_TIMEOUT_S = 60.0

ADMIT_EVERY_S = 0.5
"""An order asks whether it may begin, while the money may all be needed for others."""


class ApiEmbeddingModel(BaseEmbeddingModel):
    """
    A model behind an API.

    A provider's class sets what its API takes, and implements `request` and `slug`. It inherits all the rest: texts are counted, sent
    once if they are the same, cut or rejected if they are too long, packed into full requests within the limits of the provider,
    sent as the budget allows, sent again when that helps; and answers are checked.

    Args:
        model_name: As the provider calls it.
        model_batch_size: Texts a request at most; the provider's own limit by default.
        n_concurrent_jobs: Requests at once.
        requests_per_minute: The provider's limit; learned from its answers by default.
        tokens_per_minute: The provider's limit; learned from its answers by default.
        long_texts: truncate, chunk (embed overlapping pieces, and average) or reject texts that are too long.
        prompt: Put before every text.
        request_timeout_s: Seconds for one whole answer.
        give_up_s: Seconds after which a provider that answers nothing is given up.
    """

    terms: Terms = Terms()
    """What the provider takes."""
    options = frozenset(
        {
            "model", "model_args", "batch_size", "concurrent_requests", "requests_per_minute", "tokens_per_minute", "long_texts",
            "prompt", "request_timeout_s", "give_up_s", "token_price",
        }
    )  # fmt: skip
    device = "API"
    max_shard_rows = 2048
    max_shard_bytes = 1_200_000
    """About one full request: what a crash loses of each shard in flight has been paid for."""

    def __init__(
        self,
        model_name: str,
        model_batch_size: int | None = None,
        n_concurrent_jobs: int | None = None,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        long_texts: LongTexts = "truncate",
        prompt: str | None = None,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        self._check_batch_size(model_batch_size)
        self.model_name = model_name
        self.model_batch_size = model_batch_size or self.terms.max_inputs
        self.n_concurrent_jobs = n_concurrent_jobs or DEFAULT_CONCURRENT_REQUESTS
        self.shards_at_once = self.n_concurrent_jobs + SHARDS_BEYOND_REQUESTS
        self.request_timeout_s = request_timeout_s
        self._give_up_s = give_up_s
        self._long_texts: LongTexts = long_texts
        self._prompt = prompt or ""
        self._budget: BudgetPort = Budget(Limits(requests_per_minute, tokens_per_minute), is_resident=True)
        self._dispatcher: Dispatcher | None = None
        self._thread = LoopThread("api-loop")

    @abstractmethod
    async def request(self, texts: Sequence[str]) -> Reply:
        """
        Send texts once, and return the answer.

        Args:
            texts: Neither empty nor blank, within the limits of the class.

        Raises:
            ProviderError: What the provider's refusal means, as `engine.models.api.refusals.refusal` tells it.
            BadAnswer: If the answer is not one vector for each text.
        """

    def at_end(self, close: Closing) -> None:
        """Have the provider's client closed when the model is, or else when it is let go of, or the process ends."""
        self._thread.at_end(close)

    @classmethod
    def check_options(cls, config: ModelConfig) -> None:
        """Refuse options that the model does not go by, and requests that the provider does not take."""
        super().check_options(config)
        cls._check_batch_size(config.batch_size)
        if config.long_texts == "chunk-rows":
            raise ConfigError("long_texts: chunk-rows is for local models; APIs take truncate, chunk or reject")

    @classmethod
    def _check_batch_size(cls, batch_size: int | None) -> None:
        most = cls.terms.max_inputs
        if batch_size is not None and not 1 <= batch_size <= most:
            raise ConfigError(f"batch_size: the provider takes 1 to {most} texts a request, not {batch_size}")

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """Build the model as a job's config describes it; a custom one gets `model_args` as keyword arguments too."""
        wanted = {
            "model_batch_size": config.batch_size,
            "n_concurrent_jobs": config.concurrent_requests,
            "requests_per_minute": config.requests_per_minute,
            "tokens_per_minute": config.tokens_per_minute,
            "long_texts": config.long_texts,
            "prompt": config.prompt,
            "request_timeout_s": config.request_timeout_s,
            "give_up_s": config.give_up_s,
            **cls.arguments(config),
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        try:
            return cls(**given)
        except TypeError as error:
            raise ConfigError(f"cannot build {config.name} with {sorted(given)}: {error}") from None

    @classmethod
    def arguments(cls, config: ModelConfig) -> dict[str, Any]:
        """Return the arguments that the class has beside those of all API models; those that are None are left out."""
        return dict(config.model_args)

    @classmethod
    def terms_of(cls, config: ModelConfig) -> Terms:  # noqa: ARG003 - for those that go by it
        """Return the terms of a config's model, for whoever has no key to build it."""
        return cls.terms

    @classmethod
    def needs(cls, config: ModelConfig) -> Needs:
        """Say that an actor waits for a network, and that one of them is enough for a provider's limits."""
        concurrent = config.concurrent_requests or DEFAULT_CONCURRENT_REQUESTS
        return Needs(has_device=False, parcels_inside=concurrent + SHARDS_BEYOND_REQUESTS, actors=1)

    def share(self, budget: BudgetPort) -> None:
        """Go by a budget that is shared with others; to be called before the first text is embedded."""
        self._budget = budget

    async def embed(self, texts: list[str]) -> list[list[float]]:
        """
        Return a vector for each text, in order.

        Raises:
            InputRejected: If a text cannot be embedded; says which, by position, and why.
        """
        for position, text in enumerate(texts):
            if (reason := reject_reason(text)) is not None:
                raise InputRejected(f"text {position} cannot be embedded: {reason}")
        answer = await self.embed_rows(texts)
        for position, reason in sorted(answer.rejects.items()):
            raise InputRejected(f"text {position} cannot be embedded: {reason}")
        return answer.vectors.tolist()  # type: ignore[no-any-return] # of two dimensions

    async def embed_rows(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts, on the model's own loop; those that the provider refuses are rejected alone."""
        return await self._thread.run(self._embedded(texts))

    async def dimension(self) -> int:
        """Return the dimension of the vectors, by embedding a probe if no text has been embedded yet."""
        return await self._thread.run(self._known_dimension())

    async def close(self) -> None:
        """Close the client, and end the loop."""
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            await self._thread.run(dispatcher.close())
        await self._thread.ended()

    async def _embedded(self, texts: Sequence[str], *, is_probe: bool = False) -> Embeddings:
        numbers, pieces, lost = await asyncio.to_thread(self.terms.prepared, texts, self._prompt, self._long_texts)
        usage = Embeddings(np.empty((0, 0), np.float32), num_duplicates=len(numbers) - len(pieces))
        order = Order(numbers, list(pieces.values()), asyncio.get_running_loop().create_future(), usage)
        order.lost.update(lost)
        for number, found in enumerate(pieces.values()):
            if not found:
                order.reject(number, TOO_LONG.format(limit=self.terms.max_input_tokens))
        num_tokens = order.num_tokens
        while not (budget_weight := await self._budget.admit(num_tokens)):  # noqa: ASYNC110 - it may be in another process
            await asyncio.sleep(ADMIT_EVERY_S)
        is_done = False
        try:
            if pieces:
                self._running().send(order, budget_weight)
                await order.done
            is_done = not is_probe  # nobody waits for what becomes of a probe
        finally:
            await self._budget.dismiss(num_tokens, usage.num_tokens, is_done=is_done)
        return order.answer()

    async def _known_dimension(self) -> int:
        dispatcher = self._running()
        if dispatcher.dimension is None:
            await self._embedded([PROBE], is_probe=True)
        return dispatcher.dimension or 0

    def _running(self) -> Dispatcher:
        """Return the dispatcher, which is bound to the loop that this runs on."""
        if self._dispatcher is None:
            manners = Manners(
                max_inputs=self.model_batch_size,
                max_weight=self.terms.max_request_tokens,
                num_concurrent=self.n_concurrent_jobs,
                timeout_s=self.request_timeout_s,
                give_up_s=self._give_up_s,
                long_texts=self._long_texts,
                counter=self.terms.counter,
            )
            self._dispatcher = Dispatcher(self.request, manners, self._budget)
            # That was asked for, if any was: a server that gives another is not to be believed.
            self._dispatcher.dimension = self._dimension
        return self._dispatcher


def key_from(file: str | None, environment: str | None) -> str | None:
    """
    Return a key from a file, or else what the environment had.

    Raises:
        ConfigError: If the file cannot be read, or is empty.
    """
    if file is None:
        return environment or None
    try:
        key = expanded(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"key_file: {file} cannot be read where the worker runs ({type(error).__name__})") from None
    if not key:
        raise ConfigError(f"key_file: {file} is empty")
    return key
