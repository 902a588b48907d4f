"""The PyTorch backend: for GPUs, and for what nothing else can run."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.models.architecture import has_known_code
from engine.models.backends.base import Backend, Batch, features_of, is_out_of_memory
from engine.models.cores import num_cores

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from engine.models.base import Vectors

CUDA_STREAMS = 2
"""While one waits for its copies and its launches, the kernels of the other keep the device busy."""
CALL_TOKENS = 32
"""On CPUs: 7.5 ms beside 0.24 ms for each token, measured of all-MiniLM-L6-v2 in float32 on a core of Zen 4."""
_THREADS = threading.Lock()
"""Held while the number of threads is set: torch has one for threads to come, which is each stream's own for a moment."""


class PyTorchBackend(Backend):
    """
    A sentence-transformers model as it is, without gradients.

    On CPUs each stream is one core, since threads that share a batch wait for each other.

    On CUDA each of two threads has a stream of its own and pinned memory, so that copies to and from the device overlap with
    the computing of the other. A model with code of its own, which may write what the other stream reads, has one.
    """

    name = "torch"

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model.eval()
        self._device = torch.device(model.device)
        self.device = str(self._device)
        self._is_cuda = self._device.type == "cuda"
        self._is_cpu = self._device.type == "cpu"
        self._num_threads = torch.get_num_threads()
        self._own = threading.local()
        if self._is_cpu:
            self.num_streams = num_cores()
            self.call_tokens = CALL_TOKENS
            self.has_shared_batches = True
        elif self._is_cuda:
            self.num_streams = CUDA_STREAMS if has_known_code(model) else 1
            refuse_tf32()
            torch.cuda.synchronize(self._device)  # the weights came on another stream than those below

    def __call__(self, batch: Batch) -> Vectors:
        """Compute on the calling thread's stream, and wait for it alone."""
        with torch.inference_mode():
            if self._is_cuda:
                return self._on_stream(batch)
            if self._is_cpu:
                self._use_threads(batch.num_shares)
            return self._forward(_tensors(batch, self._device)).float().cpu().numpy()

    def relieve(self) -> None:
        """Empty the allocator's cache: what lies in it is in pieces of the wrong sizes."""
        empty_cache(self.device)

    def _use_threads(self, number: int) -> None:
        """Have the calling thread compute with so many threads; torch sets the number for all new threads with it."""
        if getattr(self._own, "num_threads", None) != number:
            self._own.num_threads = number
            with _THREADS:
                torch.get_num_threads()  # has torch give a new thread its number now, and not after ours
                torch.set_num_threads(number)
                others = threading.Thread(target=torch.set_num_threads, args=(self._num_threads,))
                others.start()
                others.join()

    def _forward(self, features: dict[str, Any]) -> torch.Tensor:
        vectors: torch.Tensor = self._model(features)["sentence_embedding"]
        return vectors

    def _on_stream(self, batch: Batch) -> Vectors:
        stream = self._stream()
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            vectors = self._forward(_tensors(batch, self._device, pin=True)).float()
            host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
            host.copy_(vectors, non_blocking=True)
            stream.synchronize()
        return np.array(host.numpy())  # pinned memory is scarce, and goes back to its pool

    def _stream(self) -> torch.cuda.Stream:
        """Return the calling thread's own stream."""
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._own.stream
        return stream


def refuse_tf32() -> None:
    """In float32, multiply in float32: TensorFloat-32, which torch allows in convolutions, has 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def empty_cache(device: str) -> None:
    """Give back what memory of a device torch holds in reserve."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "mps":
        torch.mps.empty_cache()


def is_lost(device: str) -> bool:
    """
    Say whether CUDA has given up the process, after which every call of it fails: bad memory, a kernel that went astray.

    The device is asked for nothing but whether it is done, so that no text and no lack of memory has a part in the answer.
    """
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:  # torch.AcceleratorError, from 2.8 on
        return not is_out_of_memory(error)
    return False


def _tensors(batch: Batch, device: torch.device, *, pin: bool = False) -> dict[str, Any]:
    arrays = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if pin:
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return features_of(**{name: tensor.to(device, non_blocking=pin) for name, tensor in tensors.items()})
