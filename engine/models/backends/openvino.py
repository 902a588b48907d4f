"""
The OpenVINO backend: for CPUs, where its kernels are the fastest there are.

The loaded PyTorch model is traced and converted in memory, pooling and all, so that whatever sentence-transformers would compute
is what runs; nothing is exported to a file, and no second library describes the model.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import openvino as ov
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from engine.models.backends.base import Backend, Batch, features_of
from engine.models.backends.pooling import with_early_pooling
from engine.models.backends.stepwise import stepwise

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from engine.models.base import Vectors

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""Hints: a CPU that cannot compute in 16 bits computes in 32, which is never less exact."""
LONG = 256
"""Tokens: over fewer, attention may be faster step by step than in OpenVINO's fused kernels (docs/decisions/0009)."""
MAX_WEIGHT_BYTES = 512 * 1024**2
"""Of a model that is compiled twice, since each has weights of its own; in larger ones attention is less of the whole."""
TRIAL_SHAPE = (8, 13)
"""No multiple of a vector's width, as most lengths."""
TRIALS = 5

Ids = npt.NDArray[np.int64]
_CONVERTING = Lock()
"""
One conversion at a time: it changes how the process logs and masks, and puts back what it found; and PyTorch traces a model twice, and refuses
it if names differ, which traces beside it bring about.
"""
_Computes = TypeVar("_Computes", bound=Callable[[Ids, Ids], object])

logger = logging.getLogger(__name__)


class OpenVinoBackend(Backend):
    """
    A sentence-transformers model, converted.

    Args:
        model: In float32, on the CPU. Its attention is switched to the plain implementation, which converts whole.
        dtype: float32, bfloat16 or float16.
        num_streams: Batches at a time, each on one core. Streams do not wait for each other, as the threads of one batch do.
    """

    name = "openvino"
    device = "cpu"
    call_tokens = 8  # 1.5 ms beside 0.21 ms for each token, measured of all-MiniLM-L6-v2 in float32 on a core of Zen 4

    def __init__(self, model: SentenceTransformer, dtype: str, num_streams: int) -> None:
        self.num_streams = num_streams
        model[0].auto_model.set_attn_implementation("eager")
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # never int8 behind our back
            "NUM_STREAMS": num_streams,
            "INFERENCE_NUM_THREADS": num_streams,
            "ENABLE_CPU_PINNING": False,  # several actors of a machine would all be pinned to its first cores
        }
        converted = with_early_pooling(_converted(model))
        self._plan = _Plan(converted, settings, num_streams)
        if self.precision not in (PRECISIONS[dtype], "f32"):  # a CPU without float16 would take bfloat16, which is less
            settings["INFERENCE_PRECISION_HINT"] = "f32"
            self._plan = _Plan(converted, settings, num_streams)
        self._short_plan = self._plan
        if sum(weights.nbytes for weights in model.parameters()) <= MAX_WEIGHT_BYTES:
            self._short_plan = self._for_short_texts(converted, settings)

    @property
    def precision(self) -> str:
        """What the CPU computes in: f32, bf16 or f16."""
        return str(self._plan.compiled.get_property("INFERENCE_PRECISION_HINT").to_string())

    def __call__(self, batch: Batch) -> Vectors:
        """Compute in one of the streams."""
        plan = self._short_plan if batch.input_ids.shape[1] < LONG else self._plan
        return plan(batch.input_ids, batch.attention_mask)

    def _for_short_texts(self, converted: ov.Model, settings: dict[str, Any]) -> _Plan:
        """Compile the model with attention step by step too; return which of both computes short texts faster on this CPU."""
        try:
            short_plan = _Plan(stepwise(converted), settings | {"SNIPPETS_MODE": "DISABLE"}, self.num_streams)
        except RuntimeError as error:  # an OpenVINO that does not know this setting
            logger.debug("attention is fused for all lengths: %s", type(error).__name__)
            return self._plan
        return _fastest((self._plan, short_plan))


@cache
def _core() -> ov.Core:
    """
    Return OpenVINO, the same for all models of the process, and for its life.

    Each `ov.Core` puts an alternate signal stack under the thread that compiles with it, and the one before back as it goes. If that one went
    first, its memory is free, and the next signal, Ctrl-C among them, kills the process.
    """
    return ov.Core()


class _Plan:
    """A compiled model, with a request for each stream."""

    def __init__(self, converted: ov.Model, settings: dict[str, Any], num_streams: int) -> None:
        self.compiled = _core().compile_model(converted, "CPU", settings)
        self._idle: deque[Any] = deque(self.compiled.create_infer_request() for _ in range(num_streams))

    def __call__(self, input_ids: Ids, attention_mask: Ids) -> Vectors:
        request = self._idle.pop()
        try:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            vectors = request.infer(inputs, share_inputs=True, share_outputs=True)[0]
            return np.array(vectors, np.float32)  # a copy: the request uses its buffer again
        finally:
            self._idle.append(request)


def _fastest(plans: Sequence[_Computes]) -> _Computes:
    """Measure, in a moment, which of several plans computes a few short texts fastest; they take turns."""
    ids = np.ones(TRIAL_SHAPE, np.int64)
    fastest = [float("inf")] * len(plans)
    for number in range(1 + TRIALS):
        for at, plan in enumerate(plans):
            began = time.perf_counter()
            plan(ids, ids)
            if number:  # the first call makes its kernels
                fastest[at] = min(fastest[at], time.perf_counter() - began)
    return plans[fastest.index(min(fastest))]


class _Traceable(torch.nn.Module):
    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.model(features_of(input_ids, attention_mask))["sentence_embedding"]
        return vectors


def _converted(model: SentenceTransformer) -> Any:
    """Trace a model over two texts of which one is padded, so that no branch on padding is taken for settled."""
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, 6:] = 0
    example = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": mask}
    with _CONVERTING, _hushed(), _broadcast_masks(), torch.inference_mode(False), torch.no_grad():
        return ov.convert_model(_Traceable(model.eval()), example_input=example)


@contextmanager
def _broadcast_masks() -> Iterator[None]:
    """
    Have masks made by broadcasting, where a model asks for `torch.vmap`, which the tracer does not know.

    Gemma 3 does, to attend to both sides. A mask that broadcasting makes wrong shows in the vectors, which are checked.
    """
    made = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = lambda *args, **options: made(*args, **options | {"use_vmap": False})
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["eager"] = made


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep off the screen what tracing warns of, since the vectors are checked anyway."""
    root = logging.getLogger()
    before = root.level, root.handlers[:], root.filters[:]  # a converter that fails leaves them as it changed them
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        root.setLevel(before[0])
        root.handlers[:], root.filters[:] = before[1:]
