"""Backends: every kind of transformer has the vectors of the library's own `encode`, whichever of them runs it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import LayerNorm, Normalize, Pooling, WordWeights
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from engine.models import local
from engine.models.backends.base import is_out_of_memory
from engine.models.backends.pytorch import PyTorchBackend
from engine.models.sentence_transformer import SentenceTransformerEmbeddingModel
from tests.test_cores import threads_of_a_new_thread
from tests.test_own_encode import bag_of_words
from tests.tiny_models import (
    BERT,
    DECODER,
    ROBERTA,
    SIZES,
    bert_tokenizer,
    cosines,
    decoder_tokenizer,
    mixed,
    roberta_tokenizer,
    rows,
    save_transformer,
    with_modules,
)

LEAST = 0.99999
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


class Kind:
    """A kind of model: its settings, its tokenizer, and the modules behind it."""

    def __init__(
        self,
        settings: dict[str, Any],
        tokenizer: Callable[[], PreTrainedTokenizerFast],
        after: Callable[[], list[torch.nn.Module]],
    ) -> None:
        self.settings, self.tokenizer, self.after = settings, tokenizer, after

    def save(self, folder: Path) -> SentenceTransformer:
        """Write it to a folder, and return the library's own model of it."""
        torch.manual_seed(0)
        model = with_modules(save_transformer(folder / "0", self.settings, self.tokenizer()), *self.after())
        model.save(str(folder / "model"))
        return SentenceTransformer(str(folder / "model"), device="cpu")


KINDS = {
    "BERT": Kind(BERT, bert_tokenizer, lambda: [Pooling(32, POOLINGS)]),
    "XLM-RoBERTa": Kind(
        {"model_type": "xlm-roberta", **ROBERTA},
        roberta_tokenizer,
        lambda: [Pooling(32, "cls"), Dense(32, 16), LayerNorm(16), Normalize()],
    ),
    "MPNet": Kind({"model_type": "mpnet", **ROBERTA}, roberta_tokenizer, lambda: [Pooling(32)]),
    "ModernBERT": Kind(
        {
            "model_type": "modernbert",
            "max_position_embeddings": 300,
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
            "pad_token_id": 0,
            **SIZES,
            "num_hidden_layers": 2,
        },
        bert_tokenizer,
        lambda: [Pooling(32)],
    ),
    "Qwen3": Kind({"model_type": "qwen3", **DECODER}, decoder_tokenizer, lambda: [Pooling(32, "lasttoken")]),
    "Gemma 3": Kind(  # attends to both sides, in every other layer to a window, by masks that it makes in a way of its own
        {
            "model_type": "gemma3_text",
            "use_bidirectional_attention": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            **DECODER,
            "num_hidden_layers": 2,
        },
        decoder_tokenizer,
        lambda: [Pooling(32), Normalize()],
    ),
    "Llama": Kind({"model_type": "llama", **DECODER}, decoder_tokenizer, lambda: [Pooling(32, "weightedmean")]),
    "DistilBERT": Kind(
        {"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64},
        bert_tokenizer,
        lambda: [WordWeights([str(at) for at in range(600)], {"7": 2.0, "100": 3.0}, 0.5), Pooling(32, "mean")],
    ),
    "T5": Kind(
        {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "pad_token_id": 1},
        roberta_tokenizer,
        lambda: [Pooling(32, "max")],
    ),
}
CASES = [(kind, "torch") for kind in KINDS] + [
    (kind, "openvino") for kind in ("BERT", "XLM-RoBERTa", "MPNet", "Qwen3", "Gemma 3")
]
"""Conversions take some seconds each; these are the ones that differ most. tests/test_precision.py has a real model."""


def by_engine(folder: Path, backend: str, **options: Any) -> SentenceTransformerEmbeddingModel:
    return SentenceTransformerEmbeddingModel(str(folder / "model"), device="cpu", backend=backend, **options)


def root_logger() -> tuple[Any, ...]:
    root = logging.getLogger()
    return root.level, tuple(root.handlers), tuple(root.filters)


@dataclass
class Case:
    """A model of a kind, by the library and by the engine."""

    reference: SentenceTransformer
    expected: np.ndarray
    model: SentenceTransformerEmbeddingModel
    left_logging: bool
    left_threads: bool


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, backend = request.param
    folder = tmp_path_factory.mktemp(backend)
    reference = KINDS[kind].save(folder)
    before, threads = root_logger(), (torch.get_num_threads(), threads_of_a_new_thread())
    model = by_engine(folder, backend)
    rows(model, mixed())
    left_threads = threads == (torch.get_num_threads(), threads_of_a_new_thread())
    assert (model.backend, model.device) == (backend, "cpu")
    return Case(reference, reference.encode(mixed()), model, root_logger() == before, left_threads)


def test_vectors_are_those_of_the_library(case):
    """Of texts of 1 to 256 tokens, in batches of all shapes, each by the backend that was asked for."""
    answer = rows(case.model, mixed())
    assert answer.rejects == {}
    assert answer.vectors.dtype == np.float32
    parts = answer.vectors.shape[1] // 32 or 1
    for ours, theirs in zip(np.split(answer.vectors, parts, 1), np.split(case.expected, parts, 1), strict=True):
        assert cosines(ours, theirs).min() >= LEAST
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1), rtol=1e-4)
    others = cosines(case.expected, np.roll(case.expected, 1, axis=0))
    assert np.median(others) < 0.99, "vectors of different texts differ, so that this test can fail"


def test_tokens_and_padded_tokens_are_counted(case):
    """Those that the library's tokenizer makes, and what the device computed."""
    answer = rows(case.model, mixed())
    ids = case.reference.tokenizer(mixed(), truncation=True, max_length=case.reference.max_seq_length)["input_ids"]
    assert answer.num_tokens == sum(map(len, ids))
    assert answer.num_tokens < answer.num_padded_tokens < 1.5 * answer.num_tokens
    assert answer.busy_s > 0
    assert answer.held_s > 0


def test_several_callers_at_once_have_their_own_vectors(case):
    """As an actor's shards: their batches share the device's streams."""
    starts = range(0, 60, 10)
    with ThreadPoolExecutor(len(starts)) as callers:
        answers = list(callers.map(lambda at: rows(case.model, mixed()[at:] + mixed()[:at]), starts))
    assert len(answers) == 6
    for at, answer in zip(starts, answers, strict=True):
        assert cosines(np.roll(answer.vectors, at, axis=0), case.expected).min() >= LEAST


def test_the_logging_of_the_process_stays_as_it_is(case):
    """OpenVINO sets the level of the root logger while it converts."""
    assert case.left_logging


def test_the_threads_of_the_process_stay_as_they_are(case):
    """The caller's own, and those that start later, after a model was built and used."""
    assert case.left_threads


@pytest.mark.parametrize("nothing", ["\u200b", "\u00ad\u200d"])
def test_a_text_of_which_the_tokenizer_makes_nothing_is_rejected_alone(tmp_path, nothing):
    """Without special tokens around it there is nothing to embed; in a batch, and as the only text."""
    tokenizer = bert_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", "$A $B", [])
    with_modules(save_transformer(tmp_path / "0", BERT, tokenizer)).save(str(tmp_path / "model"))
    model = by_engine(tmp_path, "torch")
    expected = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(["one", "two three"])
    answer = rows(model, ["one", nothing, "two three"])
    assert list(answer.rejects) == [1]
    assert cosines(answer.vectors, expected).min() >= LEAST
    alone = rows(model, [nothing])
    assert (list(alone.rejects), len(alone.vectors)) == ([0], 0)


# On CUDA, of which there is none here


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models say that they are on a GPU; nothing is computed there."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    monkeypatch.setattr(SentenceTransformer, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    matmul.allow_tf32 = convolutions.allow_tf32 = True
    yield
    matmul.allow_tf32, convolutions.allow_tf32 = before


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_the_libraries_have_two_streams_on_cuda(tmp_path, on_cuda, kind):
    """They change nothing of their own as they compute; and none multiplies float32 in TensorFloat-32."""
    assert PyTorchBackend(KINDS[kind].save(tmp_path)).num_streams == 2
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)


def test_a_model_s_own_encode_multiplies_float32_in_float32_on_cuda(tmp_path, on_cuda):
    """Convolutions too, which torch computes in TensorFloat-32 if nobody says otherwise."""
    chosen, settings = local.Chosen("cuda", "torch", ""), {"prompt": None, "max_rows": None, "batch_tokens": None}
    encoder = local.encoder(bag_of_words(tmp_path), chosen, dtype="float32", **settings)
    assert (encoder.backend_name, torch.backends.cudnn.allow_tf32) == ("encode", False)


@pytest.mark.parametrize("place", ["the transformer", "a module behind it"])
def test_a_model_with_code_of_its_own_has_one_stream_on_cuda(tmp_path, on_cuda, place):
    """It may fill a table as it computes, as nomic's does with cosines: another stream would read it before it is written."""
    model = KINDS["BERT"].save(tmp_path)
    module = model[0].auto_model if place == "the transformer" else model[1]
    module.__class__ = type("Own", (type(module),), {"__module__": "transformers_modules.someone.modeling"})
    assert PyTorchBackend(model).num_streams == 1


@pytest.mark.parametrize(
    ("device", "error", "lost"),
    [
        ("cuda:0", torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        ("cuda", RuntimeError("CUDA error: unspecified launch failure"), True),
        ("cuda", torch.OutOfMemoryError("CUDA out of memory"), False),
        ("cuda", torch.AcceleratorError("CUDA error: out of memory"), False),
        ("cuda", None, False),
        ("cpu", RuntimeError("nobody asks"), False),
    ],
    ids=str,
)
def test_a_device_that_fails_without_any_work_is_lost(monkeypatch, device, error, lost):
    """CUDA gives up a process after an error of a kernel; before torch 2.8 the error had no name of its own."""

    def synchronize(_: str) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    model = SentenceTransformerEmbeddingModel.__new__(SentenceTransformerEmbeddingModel)
    model.device = device
    assert model.is_lost() is lost


# What is out of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        torch.cuda.OutOfMemoryError("HIP out of memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Exception from src/inference/src/cpp/infer_request.cpp:224:\nstd::bad_alloc"),
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**9, 10**9), np.dtype(np.float32)),
    ],
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
def test_what_means_that_memory_ran_out_is_known(error):
    """CUDA's own error, those that only say so, the CPU's allocator, OpenVINO's, numpy's and Python's."""
    assert is_out_of_memory(error)


def test_what_torch_raises_here_without_memory_is_known():
    """The real message, of the version that is installed."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert triggered"), ValueError("out of memory"), KeyError(), OSError()],
)
def test_other_errors_are_not_taken_for_memory(error):
    """A smaller batch would not help."""
    assert not is_out_of_memory(error)
