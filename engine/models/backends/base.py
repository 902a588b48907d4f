"""The one small interface of the backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from engine.batching import Positions
    from engine.models.base import Vectors

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "_status_alloc_failed")
"""What the messages of PyTorch's CUDA, MPS and CPU allocators, of cuBLAS, cuDNN and OpenVINO have in them."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that go through the model together."""

    positions: Positions
    """Of its texts among those that were asked for."""
    input_ids: npt.NDArray[np.int64]
    """Shape (texts, tokens of the longest)."""
    attention_mask: npt.NDArray[np.int64]
    """1 for a token, 0 for padding; the shape of `input_ids`."""
    budget: int
    """Padded tokens under which it was packed."""
    num_shares: int = 1
    """How many streams' cores it may use: more than one if there are fewer batches than streams."""

    @property
    def num_padded_tokens(self) -> int:
        """Tokens with padding: what the device computes."""
        return self.input_ids.size


class Backend(ABC):
    """
    A model on a device. It is called from `num_streams` threads at once, and each call returns when its batch is done.

    So what feeds a device is the same for all: on CPUs a stream is a core, on GPUs a queue of kernels.
    """

    name: str
    device: str
    num_streams: int = 1
    call_tokens: int | None = None
    """What a call costs, beside its padded tokens, in tokens of a small model. None: streams share the device, which is no faster by more of them."""
    has_shared_batches: bool = False
    """A batch may be computed by the cores of several streams, if there are fewer batches than streams."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Vectors:
        """Return the vectors of a batch: shape (texts, dimension), float32, in memory that is the caller's."""

    def relieve(self) -> None:
        """Give back what memory the device's allocator holds in reserve; called after it ran out."""
        return


def features_of(input_ids: Any, attention_mask: Any) -> dict[str, Any]:
    """Return what sentence-transformers' modules are given with a padded batch of texts."""
    return {"input_ids": input_ids, "attention_mask": attention_mask, "modality": "text"}


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a device, or the machine, has no memory for a batch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)
