"""Short texts in OpenVINO: attention fused or step by step, whichever is faster here; the vectors are the model's own either way."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino as ov
import pytest
from sentence_transformers import SentenceTransformer

from engine.models import model_files
from engine.models.backends import openvino
from engine.models.backends.openvino import OpenVinoBackend
from tests.tiny_models import (
    BERT,
    PACKAGED,
    bert_tokenizer,
    cosines,
    packaged,
    packed,
    sample,
    save_transformer,
    with_modules,
)

LEAST = {"float32": 0.99999, "bfloat16": 0.9995}
FEW = [*sample("messages", 48), *sample("conversations", 6)]
CHOICE = "SNIPPETS_MODE"


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return SentenceTransformer(str(model_files.folder_of(PACKAGED)), device="cpu").encode(FEW)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of every compilation from here on."""
    seen: list[dict[str, Any]] = []
    compile_model = ov.Core.compile_model

    def spied(core: ov.Core, model: Any, device: str, settings: dict[str, Any]) -> Any:
        seen.append(settings)
        return compile_model(core, model, device, settings)

    monkeypatch.setattr(ov.Core, "compile_model", spied)
    return seen


@pytest.mark.parametrize("dtype", LEAST)
def test_the_vectors_are_the_model_s_own_whichever_plan_is_taken(monkeypatch, expected, dtype):
    """Fused, then step by step, in one model, whose converting takes seconds."""
    choices = []

    def fused(plans: list[Any]) -> Any:
        choices.append(plans)
        return plans[0]

    monkeypatch.setattr(openvino, "_fastest", fused)
    made = packaged("openvino", dtype)
    [plans] = choices
    assert len(set(plans)) == 2
    for plan in plans:
        made._queue.backend._short_plan = plan
        assert cosines(made(FEW).vectors, expected).min() >= LEAST[dtype]


def test_the_faster_plan_is_taken():
    """Whichever place it has; and the first call, in which kernels are made, says nothing."""

    def plan(seconds: float, first: float) -> Any:
        waits = iter([first])
        return lambda ids, mask: time.sleep(next(waits, seconds))

    slow, fast = plan(0.02, first=0.0), plan(0.001, first=0.05)
    assert openvino._fastest([slow, fast]) is fast
    assert openvino._fastest([fast, slow]) is fast


def test_a_large_model_is_compiled_once(tmp_path, monkeypatch, compiled):
    """A second set of weights would take as much memory as the first, for a share of attention that is small."""
    folder = save_transformer(tmp_path, BERT, bert_tokenizer())
    packed(with_modules(folder), "openvino")
    assert [CHOICE in settings for settings in compiled] == [False, True]
    compiled.clear()
    monkeypatch.setattr(openvino, "MAX_WEIGHT_BYTES", 10_000)
    packed(with_modules(folder), "openvino")
    assert [CHOICE in settings for settings in compiled] == [False]


def test_an_openvino_without_the_setting_runs_all_lengths_fused(tmp_path, monkeypatch):
    compile_model = ov.Core.compile_model

    def refusing(core: ov.Core, model: Any, device: str, settings: dict[str, Any]) -> Any:
        if CHOICE in settings:
            raise RuntimeError(f"[ NOT_FOUND ] Unsupported property {CHOICE} by CPU plugin.")
        return compile_model(core, model, device, settings)

    monkeypatch.setattr(ov.Core, "compile_model", refusing)
    folder = save_transformer(tmp_path, BERT, bert_tokenizer())
    made = packed(with_modules(folder), "openvino")
    backend = made._queue.backend
    assert isinstance(backend, OpenVinoBackend)
    assert backend._short_plan is backend._plan
    assert cosines(made(FEW).vectors, with_modules(folder).encode(FEW)).min() >= LEAST["float32"]
