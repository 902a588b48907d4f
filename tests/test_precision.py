"""Precision: what each dtype promises of the vectors of a real model, whatever the backend, the batches and the neighbours."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from engine.models import model_files
from engine.models.backends.openvino import OpenVinoBackend
from engine.models.encoders import PackedEncoder
from engine.models.token_budget import TokenBudget
from tests.tiny_models import PACKAGED, cosines, packaged, sample

LEAST = {"float32": 0.99999, "bfloat16": 0.9995, "float16": 0.9995}
BACKENDS = ["torch", "openvino"]
FEW = 32
"""Texts of each kind, where a CPU is slow: torch has no kernels for float16 on most of them."""


@cache
def texts() -> list[str]:
    """Return 160 messages and 32 conversations, in no order of length."""
    both = [*sample("messages", 160), *sample("conversations", 32)]
    return random.Random(0).sample(both, len(both))


@cache
def expected() -> np.ndarray:
    """Return what the library's users have: `encode`, with its own batches, in float32."""
    return SentenceTransformer(str(model_files.folder_of(PACKAGED)), device="cpu").encode(texts())


minilm = cache(packaged)
"""Built once for all tests of this file."""


@cache
def vectors_of_first(backend: str, dtype: str, count: int) -> np.ndarray:
    """Return the vectors of the first texts, computed once."""
    return vectors_of(backend, dtype, texts()[:count])


def vectors_of(backend: str, dtype: str, some: list[str], batch_tokens: int | None = 512) -> np.ndarray:
    encoder = minilm(backend, dtype)
    encoder.budget = TokenBudget("cpu", batch_tokens)
    encoded = encoder(some)
    assert encoded.failed == {}
    assert encoded.vectors.dtype == np.float32
    return encoded.vectors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch_tokens", "count"), [(1, 36), (64, 96), (512, 192), (4096, 192)])
def test_float32_is_the_library_s_whatever_the_budget(backend, batch_tokens, count):
    """Padding, and how many texts share a batch, leave no trace; under a budget of 1 each text is alone."""
    found = vectors_of(backend, "float32", texts()[:count], batch_tokens)
    assert cosines(found, expected()[:count]).min() >= LEAST["float32"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_the_library_s_whatever_the_neighbours(backend):
    """Among others, in another order, and in several calls."""
    order = np.random.default_rng(0).permutation(len(texts()))[:192]
    shuffled = vectors_of(backend, "float32", [texts()[at] for at in order])
    assert cosines(shuffled, expected()[order]).min() >= LEAST["float32"]
    parts = [vectors_of(backend, "float32", texts()[start : start + 7]) for start in range(0, 98, 7)]
    assert cosines(np.concatenate(parts), expected()[:98]).min() >= LEAST["float32"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "count"), [("bfloat16", 192), ("float16", FEW)])
def test_sixteen_bits_keep_their_promise(backend, dtype, count):
    """Half the width, and at least this close to float32."""
    found = vectors_of_first(backend, dtype, count)
    assert cosines(found, expected()[:count]).min() >= LEAST[dtype]
    is_exact = np.allclose(found, expected()[:count], atol=2e-6)
    assert is_exact == (_computes_in(backend, dtype) == "f32"), "it does compute in what was asked for"


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bits_do_not_depend_on_the_batches_either(backend):
    """They round in another way where a batch has another shape, and keep their promise to each other too."""
    other = vectors_of(backend, "bfloat16", texts()[:192], 64)
    assert cosines(other, expected()[:192]).min() >= LEAST["bfloat16"]
    assert cosines(other, vectors_of_first(backend, "bfloat16", 192)[:192]).min() >= LEAST["bfloat16"]


@pytest.mark.parametrize(("dtype", "count"), [("float32", 144), ("bfloat16", 192), ("float16", FEW)])
def test_backends_are_as_close_to_each_other_as_to_the_library(dtype, count):
    """An output that one machine makes by PyTorch and another by OpenVINO is one output."""
    one, other = (vectors_of_first(backend, dtype, count) for backend in BACKENDS)
    assert cosines(one, other).min() >= LEAST[dtype]


def _backend(encoder: PackedEncoder) -> Any:
    return encoder._queue.backend


def _computes_in(backend: str, dtype: str) -> str:
    return _backend(minilm(backend, dtype)).precision if backend == "openvino" else dtype


@pytest.mark.parametrize(("dtype", "hint"), [("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16")])
def test_openvino_never_computes_in_less_than_it_was_asked_for(dtype, hint):
    """A CPU that cannot compute in 16 bits of that kind computes in 32; never in another kind, and never in 8."""
    backend = _backend(minilm("openvino", dtype))
    assert isinstance(backend, OpenVinoBackend)
    assert backend.precision in (hint, "f32")
    for plan in (backend._plan, backend._short_plan):
        assert plan.compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
        assert plan.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == backend.precision
