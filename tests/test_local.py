"""Local models: which device and which backend, and the log line that says so and why."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch

from engine.config import validated
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.models import local, registry
from engine.models.sentence_transformer import WORTH_CONVERTING_BYTES, SentenceTransformerEmbeddingModel
from engine.pipeline.worker import EmbedWorker, Work
from engine.sources.rows import Selection
from tests.models import HashModel
from tests.tiny_models import BERT, PACKAGED, bert_tokenizer, mixed, rows, save_transformer, with_modules

PIP = r"pip install 'embedding-engine\[cpu\]'"


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "find_spec", lambda name: None)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is only seen, never used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    with_modules(save_transformer(folder / "0", BERT, bert_tokenizer())).save(str(folder / "model"))
    return str(folder / "model")


def worker(model: str, num_gpus: float, **options: Any) -> EmbedWorker:
    """Return what an actor with so much of a GPU runs."""
    options |= {"backend": "torch"} if model.startswith("sentence-transformers") else {}
    config = validated(ModelConfig, {"model": model, **options})
    built = EmbedWorker(
        Work(config, registry.identity(config), Selection("text"), None, 0, logging.WARNING, num_gpus=num_gpus)
    )
    assert built._failure is None
    return built


# The choice


def test_a_cpu_takes_openvino_if_it_is_installed():
    """As it is here."""
    assert local.chosen("cpu", "auto") == local.Chosen("cpu", "openvino", "the fastest on CPUs")


def test_a_cpu_takes_torch_where_openvino_is_not_installed(without_openvino):
    """And says how to come by it."""
    chosen = local.chosen("cpu", "auto")
    assert (chosen.device, chosen.backend) == ("cpu", "torch")
    assert "pip install 'embedding-engine[cpu]'" in chosen.why


def test_openvino_that_is_asked_for_and_not_installed_is_refused(without_openvino):
    """With the line that installs it."""
    with pytest.raises(ConfigError, match=f"it is not installed; {PIP}"):
        local.chosen("cpu", "openvino")
    with pytest.raises(ConfigError, match=PIP):
        SentenceTransformerEmbeddingModel(PACKAGED, device="cpu", backend="openvino")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "auto"])
def test_openvino_on_a_gpu_is_refused(cuda, device):
    """The message says what to do."""
    with pytest.raises(
        ConfigError, match=rf"for CPUs here, and the device is {device.replace('auto', 'cuda')}; use --backend"
    ):
        local.chosen(device, "openvino")


@pytest.mark.parametrize(("num_gpus", "fractions"), [(0.5, [0.475]), (0.0, []), (1.0, []), (2.0, [])])
def test_an_actor_with_a_share_of_a_gpu_keeps_to_that_share_of_its_memory(bert, cuda, monkeypatch, num_gpus, fractions):
    """Else the first actor takes all that a GPU has, and the second rejects texts for want of memory."""
    asked: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    worker(f"sentence-transformers:{bert}", num_gpus, device="cpu")
    assert asked == fractions


@pytest.mark.parametrize(("num_gpus", "is_told"), [(1.0, True), (0.5, True), (0.0, False)])
def test_an_actor_with_a_gpu_that_torch_does_not_see_says_so(bert, caplog, num_gpus, is_told):
    """A driver that is too old, or torch for CPUs: Ray has counted the GPU, which stands still, and is paid for."""
    worker(f"sentence-transformers:{bert}", num_gpus)
    told = [record.levelname for record in caplog.records if "was given a GPU that torch" in record.message]
    assert told == ["WARNING"] * is_told


@pytest.mark.usefixtures("cuda")
def test_an_actor_whose_gpu_is_seen_says_nothing_of_it(bert, caplog, monkeypatch):
    """Nor does a model that may be no torch's, and does not say what it runs on."""
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: None)
    worker(f"sentence-transformers:{bert}", 0.5, device="cpu")
    worker("custom:tests.models.HashModel", 1.0)
    assert "was given a GPU" not in caplog.text


@pytest.mark.parametrize(("num_gpus", "before", "after"), [(1.0, 5e-3, 1e-4), (0.5, 5e-5, 5e-5), (0.0, 5e-3, 5e-3)])
def test_threads_of_an_actor_with_a_gpu_take_short_turns(num_gpus, before, after):
    """One that launches kernels waits a turn after each, beside one that makes lists of tokens. On cores there are no launches."""
    usual = sys.getswitchinterval()
    try:
        sys.setswitchinterval(before)
        worker("custom:tests.models.HashModel", num_gpus)
        assert sys.getswitchinterval() == pytest.approx(after, rel=0.05)  # it is kept in microseconds
    finally:
        sys.setswitchinterval(usual)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_gpu_takes_torch(cuda, backend):
    """Whatever is installed; `auto` finds the GPU."""
    assert [local.chosen(device, backend).backend for device in ("auto", "cuda", "cuda:1")] == ["torch"] * 3
    assert [local.chosen(device, backend).kind for device in ("auto", "cuda:1", "mps", "cpu")] == ["cuda", "cuda", "mps", "cpu"]  # fmt: skip


def test_torch_that_is_asked_for_runs_on_a_cpu():
    """Also where OpenVINO would be faster."""
    assert local.chosen("cpu", "torch").backend == "torch"
    assert local.chosen("auto", "torch").device == "cpu", "there is no GPU here"


@pytest.mark.parametrize(
    ("backend", "num_bytes", "suited"),
    [
        ("auto", WORTH_CONVERTING_BYTES - 1, "torch"),
        ("auto", 0, "torch"),
        ("auto", WORTH_CONVERTING_BYTES, "auto"),
        ("openvino", 0, "openvino"),
        ("torch", 10**12, "torch"),
    ],
)
def test_little_text_is_not_worth_a_conversion(backend, num_bytes, suited):
    """What was asked for by name is what runs, however little text there is; and nothing else of a config changes."""
    config = ModelConfig(model=f"sentence-transformers:{PACKAGED}", backend=backend, batch_tokens=7, dtype="bfloat16")
    assert registry.suited(config, num_bytes) == config.model_copy(update={"backend": suited})


def test_a_custom_model_has_no_backend_to_choose():
    """Its config stays as it is."""
    config = ModelConfig(model="custom:tests.models.HashModel")
    assert registry.suited(config, 0) is config
    assert HashModel.suited(config, 0) is config


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "is_told"),
    [
        ((7, 5), "cuda", "bfloat16", True),
        ((7, 5), "cuda", "float16", False),
        ((8, 0), "cuda", "bfloat16", False),
        ((7, 5), "cpu", "bfloat16", False),
    ],
)
def test_bfloat16_on_a_gpu_without_it_is_a_warning(caplog, monkeypatch, capability, device, dtype, is_told):
    """A T4 or a V100 takes it without a word, and has float16 in its tensor cores alone."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match="there is no model folder"):
        local.load("/nowhere", local.Chosen(device, "torch", ""), dtype=dtype, revision=None, trust_remote_code=False)
    assert ("dtype bfloat16: the GPU (Tesla T4) has none" in caplog.text) is is_told


# The log line


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("model initialised")]


@pytest.mark.parametrize(
    ("backend", "dtype", "line"),
    [
        ("auto", "float32", "bert on cpu in float32 by openvino: the fastest on CPUs"),
        ("torch", "bfloat16", "bert on cpu in bfloat16 by torch: asked for, or enough for so little text"),
    ],
)
def test_one_log_line_says_what_runs_a_model_and_why(bert, caplog, backend, dtype, line):
    """At INFO: the model, the device, the dtype, the backend and the reason."""
    with caplog.at_level(logging.INFO, "engine"):
        model = SentenceTransformerEmbeddingModel(bert, device="cpu", backend=backend, dtype=dtype)
    assert told(caplog) == [f"model initialised: {line}"]
    assert not [
        record for record in caplog.records if record.levelno > logging.INFO and record.name.startswith("engine")
    ]
    assert rows(model, mixed()[:3]).vectors.shape == (3, 32)


def test_the_log_line_says_that_openvino_is_missing(bert, caplog, without_openvino):
    """It works without, and is slower."""
    with caplog.at_level(logging.INFO, "engine"):
        model = SentenceTransformerEmbeddingModel(bert, device="cpu")
    assert model.backend == "torch"
    (line,) = told(caplog)
    assert line.endswith(
        "by torch: OpenVINO, which is faster on CPUs, is not installed: pip install 'embedding-engine[cpu]'"
    )


def test_openvino_that_is_installed_and_broken_is_a_warning(bert, caplog, monkeypatch):
    """A library that it needs may be missing on an actor's machine: PyTorch runs the model."""
    monkeypatch.setitem(sys.modules, "engine.models.backends.openvino", None)
    with caplog.at_level(logging.INFO, "engine"):
        model = SentenceTransformerEmbeddingModel(bert, device="cpu")
    assert model.backend == "torch"
    assert "backend torch: OpenVINO cannot convert bert (ModuleNotFoundError)" in caplog.messages


def test_a_model_is_loaded_in_float32_where_it_is_to_be_converted():
    """From bfloat16 nothing could be rounded right any more."""

    def dtype_of(backend: str) -> Any:
        model = local.load(
            PACKAGED,
            local.Chosen("cpu", backend, ""),
            dtype="bfloat16",
            revision=None,
            trust_remote_code=False,
        )
        return next(model.parameters()).dtype

    assert (dtype_of("openvino"), dtype_of("torch")) == (torch.float32, torch.bfloat16)


def test_a_closed_model_has_ended_its_threads(bert):
    """And only its own."""
    import asyncio
    import threading

    def streams() -> int:
        return sum(thread.name.startswith("stream") for thread in threading.enumerate())

    before = streams()
    model = SentenceTransformerEmbeddingModel(bert, device="cpu", backend="torch")
    rows(model, mixed())
    assert streams() > before
    asyncio.run(model.close())
    assert streams() == before
