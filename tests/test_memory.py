"""Memory and other failures of a batch: every text that can be embedded is, and the others are told with their reason."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import ProviderError
from engine.models.backends.base import Batch
from engine.models.backends.pytorch import PyTorchBackend
from engine.models.base import Vectors
from engine.models.encoders import Encoded, Encoder, PackedEncoder
from engine.models.sentence_transformer import SentenceTransformerEmbeddingModel
from engine.models.token_budget import TokenBudget
from engine.models.tokens import Tokenizer
from tests.scripted import Lengths, Scripted, wait
from tests.tiny_models import BERT, bert_tokenizer, cosines, mixed, rows, sample, save_transformer, with_modules

NO_MEMORY: dict[str, Callable[[], Exception]] = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "CPU": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError,
}
POISON = "zebra"


class Small(Scripted):
    """PyTorch on a device that has no memory for batches of more than so many padded tokens."""

    def __init__(self, backend: PyTorchBackend, max_tokens: int, error: Callable[[], Exception]) -> None:
        super().__init__(self._refuse, backend.num_streams)
        self.backend, self.max_tokens, self.error = backend, max_tokens, error
        self.num_refused = 0

    def _refuse(self, batch: Batch) -> None:
        if batch.num_padded_tokens > self.max_tokens:
            self.num_refused += 1
            raise self.error()

    def compute(self, batch: Batch) -> Vectors:
        return self.backend(batch)


class Device:
    """A tiny BERT that is loaded once, and an engine's model over it, on any backend."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = with_modules(save_transformer(folder, BERT, bert_tokenizer()))
        self.reference = with_modules(folder)
        self.tokenizer = Tokenizer.of(model, None)
        self.torch = PyTorchBackend(model)

    def encoder(self, backend: Any, budget: TokenBudget | None = None) -> PackedEncoder:
        return PackedEncoder(self.tokenizer, backend, budget or TokenBudget("cpu", 512))

    def model(self, encoder: Encoder) -> SentenceTransformerEmbeddingModel:
        model = SentenceTransformerEmbeddingModel(str(self.folder), device="cpu", backend="torch")
        model._encoder = encoder
        return model

    def check(self, vectors: Vectors, texts: list[str]) -> None:
        assert cosines(vectors, self.reference.encode(texts)).min() >= 0.99999


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = tmp_path_factory.mktemp("bert")
    device = Device(folder)
    with_modules(folder).save(str(folder))
    return device


def lengths(device: Device, texts: list[str]) -> np.ndarray:
    return device.tokenizer(texts).lengths


# Too much at once


@pytest.mark.parametrize("kind", NO_MEMORY)
@pytest.mark.parametrize("given", [512, None])
def test_a_device_without_memory_gets_smaller_batches_and_loses_no_text(device, kind, given):
    """The budget is halved until its batches fit, and stays there; the next call asks for nothing that does not fit."""
    texts = [text for text in [*mixed(), *sample("messages", 200)] if lengths(device, [text])[0] <= 100]
    small = Small(device.torch, 100, NO_MEMORY[kind])
    encoder = device.encoder(small, TokenBudget("cpu", given))
    encoded = encoder(texts)
    assert encoded.failed == {}
    device.check(encoded.vectors, texts)
    assert 50 < encoder.budget.value <= 100
    assert small.num_relieved == small.num_refused > 0
    assert encoded.num_tokens == lengths(device, texts).sum(), "what was refused is not counted"
    small.num_refused = 0
    device.check(encoder(texts[::-1]).vectors, texts[::-1])
    assert small.num_refused == 0


def test_every_text_is_computed_once_where_memory_is_enough(device):
    """Halving does not bring again what has its vector."""
    small = Small(device.torch, 200, NO_MEMORY["CUDA"])
    texts = [text for text in mixed() if lengths(device, [text])[0] <= 200]
    device.encoder(small)(texts)
    computed = [batch.positions for batch in small.began if batch.num_padded_tokens <= 200]
    assert sorted(np.concatenate(computed).tolist()) == list(range(len(texts)))


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_a_text_that_does_not_fit_alone_is_rejected_and_its_neighbours_are_embedded(device, kind):
    """The reason says how many tokens it has, and what it is that they are too many for."""
    texts = mixed()
    num_tokens = lengths(device, texts)
    giants = np.flatnonzero(num_tokens > 150).tolist()
    assert 0 < len(giants) < 30
    model = device.model(device.encoder(Small(device.torch, 150, NO_MEMORY[kind])))
    answer = rows(model, texts)
    assert answer.rejects == {
        at: f"the device has no memory for its {num_tokens[at]} tokens: allow fewer (--max-length)" for at in giants
    }
    device.check(answer.vectors, [text for at, text in enumerate(texts) if at not in giants])


@pytest.mark.parametrize("count", [1, 3])
def test_where_no_text_fits_each_is_rejected(device, count):
    """A shard of giants has no vectors, and the job goes on."""
    giants = [text for text in mixed() if lengths(device, [text])[0] > 150][:count]
    encoder = device.encoder(Small(device.torch, 150, NO_MEMORY["CUDA"]), TokenBudget("cpu", 120))
    answer = rows(device.model(encoder), giants)
    assert len(answer.vectors) == 0
    assert list(answer.rejects) == list(range(count))
    assert encoder.budget.value == 120, "a text that is too large is no reason for smaller batches"


def test_a_device_without_memory_for_anything_ends_the_job(device):
    """Where a plain sentence does not fit, no text is at fault."""
    with pytest.raises(ProviderError, match="fails on every text"):
        rows(device.model(device.encoder(Small(device.torch, 1, NO_MEMORY["CUDA"]))), mixed())


def test_a_text_that_fits_only_alone_is_embedded():
    """What did not fit beside others is tried with nothing beside it, before it is given up."""
    giant, neighbour = threading.Event(), threading.Event()
    beside: list[int] = []

    def act(batch: Batch) -> None:
        if batch.num_padded_tokens < 500:
            neighbour.set()
            wait(giant)  # stays until the giant is there
            return
        if not beside:
            wait(neighbour)
        beside.append(len(backend.active) - 1)
        giant.set()
        if beside[-1]:
            raise torch.OutOfMemoryError

    backend = Scripted(act, num_streams=2)
    texts = ["500", *["7"] * 100]
    encoder = PackedEncoder(Lengths(), backend, TokenBudget("cpu", 100))
    encoded = encoder(texts)
    assert beside == [1, 0]
    assert encoded.failed == {}
    np.testing.assert_array_equal(encoded.vectors[:, 0], [int(text) ** 2 for text in texts])
    assert encoder.budget.value == 100


def test_a_text_that_fits_only_alone_does_not_meet_other_callers_texts_either():
    """While it has the device, the batches of the other shards of an actor wait."""
    over = threading.Event()

    def act(batch: Batch) -> None:
        time.sleep(0.001)
        if batch.num_padded_tokens >= 500:
            for _ in range(20):
                if len(backend.active) > 1:
                    raise torch.OutOfMemoryError
                time.sleep(0.001)

    def others() -> Iterator[Encoded]:
        while not over.is_set():
            yield encoder(["7"] * 100)

    backend = Scripted(act, num_streams=2)
    encoder = PackedEncoder(Lengths(), backend, TokenBudget("cpu", 100))
    with ThreadPoolExecutor(2) as threads:
        callers = [threads.submit(lambda: list(others())) for _ in range(2)]
        try:
            answers = [encoder(["500", *["7"] * 50]) for _ in range(5)]
        finally:
            over.set()
        answers += [answer for caller in callers for answer in caller.result()]
    assert all(answer.failed == {} for answer in answers)
    assert backend.num_relieved > 0, "beside others it did not fit"


# Other errors


class Poisoned(PyTorchBackend):
    """A model that fails on batches with a certain token."""

    def __init__(self, device: Device, error: Exception) -> None:
        super().__init__(device.torch._model)
        self.error = error
        self.poison = int(device.tokenizer([POISON]).ids[1])

    def __call__(self, batch: Batch) -> Vectors:
        if (batch.input_ids[:, 1] == self.poison).any():
            raise self.error
        return super().__call__(batch)


@pytest.mark.parametrize("error", [RuntimeError(f"it said: {POISON}"), ValueError(), IndexError()])
@pytest.mark.parametrize("count", [400, 5, 1], ids=["many batches", "one batch", "one neighbour"])
def test_an_error_in_a_batch_rejects_the_guilty_text_alone(device, error, count):
    """Its neighbours in the batch are embedded again, one by one, whether or not there are other batches."""
    first = int(device.tokenizer([POISON]).ids[1])
    texts = [text for text in sample("messages", 600) if device.tokenizer([text]).ids[1] != first][:count]
    texts.insert(len(texts) // 2, f"{POISON} in the sea")
    answer = rows(device.model(device.encoder(Poisoned(device, error))), texts)
    at = texts.index(f"{POISON} in the sea")
    assert answer.rejects == {at: f"the model fails on it: {type(error).__name__}"}
    device.check(answer.vectors, texts[:at] + texts[at + 1 :])


def test_an_error_that_passes_by_rejects_nothing(device):
    """Not even where it was the only batch of its call."""
    left = [RuntimeError()]

    def act(batch: Batch) -> None:
        if left:
            raise left.pop()

    backend = Scripted(act, num_streams=1)
    backend.compute = device.torch
    answer = rows(device.model(device.encoder(backend)), ["one", "two three"])
    assert answer.rejects == {}
    device.check(answer.vectors, ["one", "two three"])


def test_an_error_that_does_not_pass_by_ends_the_job(device):
    """It is the model's, and the message does not quote a text."""

    def act(batch: Batch) -> None:
        raise RuntimeError("secret text")

    with pytest.raises(ProviderError, match="fails on every text") as caught:
        rows(device.model(device.encoder(Scripted(act))), ["one", "two"])
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_vector_that_says_nothing_is_a_reject(device, value):
    """As of every model; the text is tried alone before."""
    poison = int(device.tokenizer([POISON]).ids[1])

    def compute(batch: Batch) -> Vectors:
        vectors = np.array(device.torch(batch))
        vectors[batch.input_ids[:, 1] == poison] = value
        return vectors

    backend = Scripted()
    backend.compute = compute
    answer = rows(device.model(device.encoder(backend)), ["one", f"{POISON}s", "two"])
    assert answer.rejects == {1: "the model's vector is zero or not finite"}
    device.check(answer.vectors, ["one", "two"])
