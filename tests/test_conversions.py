"""Conversions: what OpenVINO cannot run, or runs to other vectors, is left to PyTorch, and the log says so."""

from __future__ import annotations

import gc
import logging
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from engine.models.backends import openvino
from engine.models.backends.base import Batch
from engine.models.backends.pytorch import PyTorchBackend
from engine.models.base import Vectors
from tests.builders import Started
from tests.test_backends import KINDS, LEAST, Kind, by_engine, root_logger
from tests.tiny_models import (
    BERT,
    DECODER,
    bert_tokenizer,
    cosines,
    decoder_tokenizer,
    mixed,
    packed,
    rows,
    save_transformer,
    with_modules,
)

MIXTURE = Kind(  # sends each token to an expert, by an operation that OpenVINO does not have
    {
        "model_type": "gpt_oss",
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        **DECODER,
    },
    decoder_tokenizer,
    lambda: [Pooling(32)],
)


@pytest.fixture(autouse=True)
def root_logger_as_it_was() -> Iterator[None]:
    """One test's conversion must not silence another's warning."""
    root = logging.getLogger()
    level, filters = root.level, list(root.filters)
    yield
    root.setLevel(level)
    root.filters[:] = filters


class Flipped(torch.nn.Module):
    """Turns the vectors of texts of more than so many tokens round, by a branch that a tracer takes for settled."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        is_long = features["attention_mask"].sum(1) > self.limit
        if bool(is_long.any()):
            vectors = features["sentence_embedding"]
            features["sentence_embedding"] = torch.where(is_long[:, None], vectors.flip(1), vectors)
        return features


def refused(caplog: pytest.LogCaptureFixture) -> str:
    """Return the one warning."""
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1, warnings
    return warnings[0]


def test_what_openvino_cannot_convert_runs_on_torch(tmp_path, caplog):
    """
    With a warning, and with the library's vectors; the logging of the process stays as it is.

    A root logger at ERROR would swallow the very warning, and all that the process logs later.
    """
    expected = MIXTURE.save(tmp_path).encode(mixed())
    with caplog.at_level(logging.INFO):
        before = root_logger()
        model = by_engine(tmp_path, "openvino")
        assert root_logger() == before
    assert model.backend == "torch"
    assert cosines(rows(model, mixed()).vectors, expected).min() >= LEAST
    assert refused(caplog) == "backend torch: OpenVINO cannot convert gpt_oss (OpConversionFailure)"
    assert caplog.messages[-1].endswith("gpt_oss on cpu in float32 by torch: OpenVINO cannot run it")


def test_conversions_at_once_leave_the_process_as_it_is(tmp_path):
    """And do not fail, though PyTorch's tracer knows of one at a time; one that found what another had changed would put that back."""
    before = root_logger(), ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    folder = save_transformer(tmp_path, BERT, bert_tokenizer())
    models = [with_modules(folder) for _ in range(2)]
    with ThreadPoolExecutor(len(models)) as threads:
        encoders = list(threads.map(lambda model: packed(model, "openvino"), models))
    assert [encoder.backend_name for encoder in encoders] == ["openvino"] * 2
    assert (root_logger(), ALL_MASK_ATTENTION_FUNCTIONS["eager"]) == before


def test_a_conversion_with_other_vectors_is_refused(tmp_path, caplog):
    """A branch that the tracer took for settled shows in texts of more tokens than it was traced with."""
    folder = save_transformer(tmp_path, BERT, bert_tokenizer())
    expected = with_modules(folder, Pooling(32), Flipped(200)).encode(mixed())
    model = with_modules(folder, Pooling(32), Flipped(200))
    attention = model[0].auto_model.config._attn_implementation
    encoder = packed(model, "openvino")
    assert cosines(encoder(mixed()).vectors, expected).min() >= LEAST
    assert encoder.backend_name == "torch"
    assert "OpenVINO's vectors of bert are not the model's own" in refused(caplog)
    assert attention == model[0].auto_model.config._attn_implementation != "eager", "for the conversion it was slower"


class Perturbed(PyTorchBackend):
    """What stands in for a conversion that went wrong in a way of its own."""

    name = "openvino"
    change: Callable[[np.ndarray], np.ndarray]

    def __init__(self, model: SentenceTransformer, dtype: str, num_streams: int) -> None:
        super().__init__(model)

    def __call__(self, batch: Batch) -> Vectors:
        return type(self).change(super().__call__(batch)).astype(np.float32)


def noise(vectors: np.ndarray) -> np.ndarray:
    """As much as 8 bits would bring in."""
    return vectors + 0.01 * np.abs(vectors).max() * np.sin(np.arange(vectors.size)).reshape(vectors.shape)


def with_fourth(vectors: np.ndarray, value: float) -> np.ndarray:
    return np.where(np.arange(len(vectors))[:, None] == 3, value, vectors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda vectors: vectors, None),
        (noise, r"cosine 0\.9\d+"),
        (lambda vectors: vectors[::-1], r"cosine -?0\.\d+"),
        (lambda vectors: vectors[:, :-1], r"cosine -1\.0+"),
        (lambda vectors: with_fourth(vectors, np.nan), "cosine nan"),
        (lambda vectors: with_fourth(vectors, 0), "cosine nan"),
        (lambda vectors: vectors * np.nan if len(vectors) == 1 else vectors, "cosine nan"),
    ],
    ids=["right", "noise", "order", "dimension", "nan", "zero", "nan in a long text"],
)
def test_vectors_that_are_not_the_model_s_own_are_never_taken(tmp_path, caplog, monkeypatch, change, said):
    """A conversion is held against PyTorch before it is used; the warning says how far off it was."""
    expected = KINDS["MPNet"].save(tmp_path).encode(mixed())
    monkeypatch.setattr(Perturbed, "change", staticmethod(change), raising=False)
    monkeypatch.setattr(openvino, "OpenVinoBackend", Perturbed)
    model = by_engine(tmp_path, "openvino")
    assert cosines(rows(model, mixed()).vectors, expected).min() >= LEAST
    if said is None:
        assert model.backend == "openvino", "nothing but the vectors decides"
        return
    assert model.backend == "torch"
    told = rf"OpenVINO's vectors of mpnet are not the model's own \({said}, and float32 promises 0\.99999\)"
    assert re.search(told, refused(caplog))


def models_come_and_go(folder: str) -> None:
    models = [packed(with_modules(Path(folder)), "openvino") for _ in range(2)]
    while models:  # the first one first
        models.pop(0).close()
        gc.collect()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_an_exception_still_when_converted_models_are_gone(tmp_path):
    """OpenVINO changes the stack that signals are handled on; a process that is left with one that was freed dies of the next signal."""
    Started(models_come_and_go, str(save_transformer(tmp_path, BERT, bert_tokenizer()))).result()
