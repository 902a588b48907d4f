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
from tests.tiny_models import PACKAGED, cosines, packaged, sample

LEAST = {"float32": 0.99999, "bfloat16": 0.9995}
FEW = [*sample("messages", 48), *sample("conversations", 6)]
CHOICE = "SNIPPETS_MODE"


@pytest.fixture
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
@pytest.mark.parametrize("place", [0, 1], ids=["fused", "step by step"])
def test_the_vectors_are_the_model_s_own_whichever_plan_is_taken(monkeypatch, expected, dtype, place):
    monkeypatch.setattr(openvino, "_fastest", lambda plans: plans[place])
    assert cosines(packaged("openvino", dtype)(FEW).vectors, expected).min() >= LEAST[dtype]


def test_the_faster_plan_is_taken():
    """Whichever place it has; and the first call, in which kernels are made, says nothing."""

    def plan(seconds: float, first: float) -> Any:
        waits = iter([first])
        return lambda ids, mask: time.sleep(next(waits, seconds))

    slow, fast = plan(0.02, first=0.0), plan(0.001, first=0.05)
    assert openvino._fastest([slow, fast]) is fast
    assert openvino._fastest([fast, slow]) is fast


def test_a_large_model_is_compiled_once(monkeypatch, compiled):
    """A second set of weights would take as much memory as the first, for a share of attention that is small."""
    packaged("openvino")
    assert [CHOICE in settings for settings in compiled] == [False, True]
    compiled.clear()
    monkeypatch.setattr(openvino, "MAX_WEIGHT_BYTES", 1_000_000)
    packaged("openvino")
    assert [CHOICE in settings for settings in compiled] == [False]


def test_an_openvino_without_the_setting_runs_all_lengths_fused(monkeypatch, expected):
    compile_model = ov.Core.compile_model

    def refusing(core: ov.Core, model: Any, device: str, settings: dict[str, Any]) -> Any:
        if CHOICE in settings:
            raise RuntimeError(f"[ NOT_FOUND ] Unsupported property {CHOICE} by CPU plugin.")
        return compile_model(core, model, device, settings)

    monkeypatch.setattr(ov.Core, "compile_model", refusing)
    made = packaged("openvino")
    backend = made._queue.backend
    assert isinstance(backend, OpenVinoBackend)
    assert backend._short_plan is backend._plan
    assert cosines(made(FEW).vectors, expected).min() >= LEAST["float32"]
