"""Encoders: from texts to vectors, by packed batches through a backend, or through a model's own `encode`."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.batching import pack, pack_for_streams, pack_in_turns
from engine.errors import InputRejected
from engine.models.backends.base import Batch, is_out_of_memory
from engine.models.backends.pytorch import empty_cache
from engine.models.base import Embeddings
from engine.models.device_queue import DeviceClock, DeviceQueue, Done

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    from engine.batching import Positions
    from engine.models.backends.base import Backend
    from engine.models.token_budget import TokenBudget
    from engine.models.tokens import Tokenizer, Tokens

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Encoded(Embeddings):
    """An answer that is not judged yet: it has a row for every text, and those of texts that failed hold anything."""

    failed: dict[int, Exception] = field(default_factory=dict)
    """Positions among the texts, and why."""


class Encoder(ABC):
    """Turns texts into vectors; may be called from several threads at once."""

    backend_name: str
    device: str
    tokenizer: Tokenizer | None = None
    """That it goes by, if it is its own."""

    @abstractmethod
    def __call__(self, texts: Sequence[str], tokens: Tokens | None = None) -> Encoded:
        """
        Encode texts. What concerns single texts is told, not raised.

        Args:
            texts: Neither empty nor blank.
            tokens: Of the texts, by `tokenizer`, if they are known already.
        """

    def close(self) -> None:
        """Release threads; the encoder is not used afterwards."""
        return


class PackedEncoder(Encoder):
    """
    Tokenizes all texts at once, packs them by length under a budget of padded tokens, and puts the vectors back in order.

    A device that runs out of memory halves the budget, down to single texts; one that does not fit alone has failed.

    Args:
        tokenizer: The model's.
        backend: The model, on its device.
        budget: Of padded tokens.
        max_rows: Texts a batch at most, whatever the budget.
        num_known: Tokens that the model has embeddings for; None if that is not known. A tokenizer may have more.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        backend: Backend,
        budget: TokenBudget,
        max_rows: int | None = None,
        num_known: int | None = None,
    ) -> None:
        self.backend_name = backend.name
        self.device = backend.device
        self.budget = budget
        self.tokenizer: Tokenizer = tokenizer
        self._queue = DeviceQueue(backend)
        self._max_rows = max_rows
        self._num_known = num_known

    def __call__(self, texts: Sequence[str], tokens: Tokens | None = None) -> Encoded:
        """Encode texts; only their tokens and their vectors are held as a whole."""
        tokens = self.tokenizer(texts) if tokens is None else tokens
        encoded = Encoded(np.empty((len(texts), 0), np.float32))
        encoded.count_lost(tokens.lost_of_long())
        giants: list[Positions] = []
        with self.budget.trial(int(tokens.starts[-1])) as budgets:
            todo = self._packed(tokens, self._known(tokens, encoded), budgets)
            logger.debug("%d texts in %d batches of up to %s padded tokens", len(texts), len(todo), budgets)
            while todo:
                too_large = self._run(tokens, todo, encoded)
                giants += [positions for positions in too_large if len(positions) == 1]
                many = [positions for positions in too_large if len(positions) > 1]
                todo = self._packed(tokens, np.concatenate(many), (self.budget.value,)) if many else []
        # Single texts that did not fit are tried once more with nothing beside them, and then given up.
        for positions in self._run(tokens, [(1, positions) for positions in giants], encoded, alone=True):
            at = int(positions[0])
            encoded.failed[at] = InputRejected(
                f"the device has no memory for its {tokens.lengths[at]} tokens: allow fewer (--max-length)"
            )
        return encoded

    def close(self) -> None:
        """End the threads of the backend's streams."""
        self._queue.close()

    def _known(self, tokens: Tokens, encoded: Encoded) -> Positions:
        """
        Return the texts all of whose tokens the model has embeddings for; the others have failed.

        Of such a token PyTorch raises on CPUs, CUDA gives up the process's GPU, and OpenVINO computes a vector, of zeros in its place.
        """
        every = np.arange(len(tokens.lost))
        unknown = np.flatnonzero(tokens.ids >= self._num_known) if self._num_known is not None else every[:0]
        if not len(unknown):
            return every
        texts = np.searchsorted(tokens.starts, unknown, side="right") - 1
        for at, number in zip(texts.tolist(), tokens.ids[unknown].tolist(), strict=True):
            encoded.failed[at] = InputRejected(
                f"its token {number} is unknown to the model, which has {self._num_known}: its tokenizer has more of them"
            )
        return np.setdiff1d(every, texts)

    def _packed(self, tokens: Tokens, positions: Positions, budgets: Sequence[int]) -> list[tuple[int, Positions]]:
        """Pack texts: under one budget so that all streams have their share; under several, in turns."""
        lengths, backend = tokens.lengths[positions], self._queue.backend
        if len(budgets) > 1 or backend.call_tokens is None:
            packed = pack_in_turns(lengths, budgets, max_rows=self._max_rows)
        else:
            batches = pack_for_streams(
                lengths,
                max_tokens=budgets[0],
                num_streams=backend.num_streams,
                call_tokens=backend.call_tokens,
                can_share=backend.has_shared_batches,
                max_rows=self._max_rows,
            )
            packed = [(budgets[0], batch) for batch in batches]
        return [(budget, positions[batch]) for budget, batch in packed]

    def _filled(self, tokens: Tokens, packed: Sequence[tuple[int, Positions]]) -> Iterator[Batch]:
        backend = self._queue.backend
        num_shares = max(backend.num_streams // max(len(packed), 1), 1) if backend.has_shared_batches else 1
        for budget, positions in packed:
            ids, mask = tokens.padded(positions, pad_id=self.tokenizer.pad_id, pad_left=self.tokenizer.pad_left)
            yield Batch(positions, ids, mask, budget, num_shares)

    def _run(
        self, tokens: Tokens, packed: Sequence[tuple[int, Positions]], encoded: Encoded, *, alone: bool = False
    ) -> list[Positions]:
        """
        Compute batches and put their vectors in their places; return those for which the device had no memory.

        Where streams share a device, batches on trial are alone on it: beside a large one a small one waits for that one's work.
        """
        if not packed:
            return []
        budgets = {budget for budget, _ in packed}
        on_trial, is_shared = len(budgets) > 1, self._queue.backend.call_tokens is None
        too_large: list[Positions] = []
        lengths = tokens.lengths

        def take(one: Done) -> None:
            positions = one.batch.positions
            if on_trial and not (is_shared and one.is_first):
                self.budget.note(one)
            if one.vectors is not None:
                if not encoded.vectors.shape[1]:
                    encoded.vectors = np.empty((len(encoded.vectors), one.vectors.shape[1]), np.float32)
                encoded.vectors[positions] = one.vectors
                encoded.num_tokens += int(lengths[positions].sum())
                encoded.num_padded_tokens += one.batch.num_padded_tokens
            elif one.error is not None and is_out_of_memory(one.error):
                too_large.append(positions)
                if len(positions) > 1:
                    self.budget.halve(one.batch.num_padded_tokens)
            elif one.error is not None:
                encoded.failed.update(dict.fromkeys(positions.tolist(), one.error))

        spent = self._queue.run(self._filled(tokens, packed), take, alone=alone or (on_trial and is_shared))
        encoded.held_s += spent.held_s
        encoded.busy_s += spent.busy_s
        if on_trial:
            self.budget.compare({budget: self._fill(tokens, budget) for budget in budgets})
        return too_large

    def _fill(self, tokens: Tokens, budget: int) -> float:
        """Return which share of the padded tokens would be tokens, if all texts were packed under `budget`."""
        lengths = tokens.lengths
        batches = pack(lengths, max_tokens=budget, max_rows=self._max_rows)
        padded = sum(len(batch) * int(lengths[batch[0]]) for batch in batches)
        return int(tokens.starts[-1]) / max(padded, 1)


class OwnEncoder(Encoder):
    """
    A model's own `encode`, for what is not a plain transformer: static embeddings, routers, modules of its own.

    One call at a time, since such a model may keep anything. Tokens are counted as they go into the model. A device that runs out of
    memory has smaller batches from then on.

    Args:
        model: Any.
        prompt: Put before every text.
        batch_size: Texts that go through the model together at most.
        beside: Tells what the model cuts off; None if nothing does.
    """

    backend_name = "encode"

    def __init__(
        self, model: SentenceTransformer, prompt: str | None, batch_size: int, beside: Tokenizer | None = None
    ) -> None:
        self.device = str(model.device)
        self._model = model
        self._beside = beside
        self._prompt = prompt
        self._batch_size = batch_size
        self._turn = threading.Lock()
        self._clock = DeviceClock()
        self._num_tokens = self._num_padded_tokens = 0
        model.register_forward_pre_hook(self._count_tokens)

    def __call__(self, texts: Sequence[str], tokens: Tokens | None = None) -> Encoded:
        """Encode texts as the model's authors meant it."""
        if not texts:  # of which some make no array of two dimensions
            return Encoded(np.empty((0, 0), np.float32))
        if tokens is None and self._beside is not None:
            tokens = self._beside(texts)
        with self._turn:
            began = time.perf_counter()
            vectors = self._vectors(texts)
            encoded = Encoded(
                vectors,
                num_tokens=self._num_tokens,
                num_padded_tokens=self._num_padded_tokens,
                busy_s=time.perf_counter() - began,
                held_s=self._clock.held_s(began),
            )
        if tokens is not None:
            encoded.count_lost(tokens.lost_of_long())
        return encoded

    def _vectors(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Encode texts, in smaller batches if the device has no memory; those with which it came through stay."""
        size = self._batch_size
        while True:
            error = None
            self._num_tokens = self._num_padded_tokens = 0
            try:
                vectors: npt.NDArray[np.float32] = self._encoded(texts, size).float().cpu().numpy()
            except Exception as problem:
                error = problem.with_traceback(None)  # whose frames hold the batch's tensors
            if error is None:
                if size < min(self._batch_size, len(texts)):
                    logger.warning("larger batches do not fit into the device's memory: %d texts from now on", size)
                    self._batch_size = size
                return vectors
            if not is_out_of_memory(error):
                raise error
            empty_cache(self.device)
            size = min(size, len(texts))
            if size == 1:  # a text is too large alone: of the others nothing is learned
                raise error
            size //= 2

    def _encoded(self, texts: Sequence[str], batch_size: int) -> torch.Tensor:
        answer: torch.Tensor = self._model.encode(
            list(texts), prompt=self._prompt, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True
        )
        return answer

    def _count_tokens(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        features = inputs[0] if inputs and isinstance(inputs[0], Mapping) else {}
        if "attention_mask" in features:
            self._num_tokens += int(features["attention_mask"].sum())
            self._num_padded_tokens += features["attention_mask"].numel()
        elif "input_ids" in features:  # flattened, without padding
            self._num_tokens += features["input_ids"].numel()
            self._num_padded_tokens += features["input_ids"].numel()
