"""Attention written out: the same numbers as OpenVINO's one operation, whatever a model gives to it; what the formula does not cover is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from sentence_transformers import SentenceTransformer

from engine.models import model_files
from engine.models.backends import openvino
from engine.models.backends.stepwise import FUSED, stepwise
from tests.tiny_models import PACKAGED

WIDTH = 8
RANDOM = np.random.default_rng(0)
QUERY, KEY, VALUE = (RANDOM.standard_normal((2, 5, 3, WIDTH)).astype(np.float32) for _ in range(3))
MASK = np.where(RANDOM.random((2, 1, 5, 5)) < 0.3, np.float32(-1e4), np.float32(0))
MASK[..., 0] = 0  # every text has a token


def model(*more: Any, turned: bool = False, causal: bool = False) -> ov.Model:
    """Make attention over three heads of tensors as a linear layer leaves them, (texts, tokens, heads, width)."""
    inputs = [ops.parameter([-1, -1, 3, WIDTH], np.float32) for _ in range(3)]
    query, key, value = (ops.transpose(one, ops.constant(np.array([0, 2, 1, 3]))) for one in inputs)
    if turned:  # as models are converted: turned around for the multiplication, and back for the operation
        key = ops.transpose(inputs[1], ops.constant(np.array([0, 2, 3, 1])))
        key = ops.transpose(key, ops.constant(np.array([0, 1, 3, 2])))
    attention = ops.scaled_dot_product_attention(query, key, value, *more, causal=causal)
    return ov.Model([ops.result(attention)], inputs)


def computed(one: ov.Model) -> np.ndarray:
    compiled = openvino._core().compile_model(one, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([QUERY, KEY, VALUE])[0])


def kinds(one: ov.Model) -> list[str]:
    return [node.get_type_name() for node in one.get_ordered_ops()]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("more", [(), (MASK,), (MASK, np.float32(0.7)), (np.float32(0), np.float32(0.7))], ids=len)
def test_attention_written_out_gives_the_same(more, turned):
    whole = model(*more, turned=turned)
    written_out = stepwise(whole)
    assert FUSED in kinds(whole), "the model itself is left as it was"
    assert FUSED not in kinds(written_out)
    assert computed(written_out) == pytest.approx(computed(whole), abs=1e-5)


def test_keys_are_turned_around_once():
    """By one transposition, as queries and values are, and not by two more."""
    assert kinds(model(MASK, turned=True)).count("Transpose") == 4
    assert kinds(stepwise(model(MASK, turned=True))).count("Transpose") == 3


@pytest.mark.parametrize(
    ("more", "causal"), [((MASK == 0,), False), ((), True)], ids=["a mask of yes and no", "a mask of its own"]
)
def test_attention_that_is_more_than_the_formula_is_left_alone(more, causal):
    left = stepwise(model(*more, causal=causal))
    assert FUSED in kinds(left)
    assert computed(left) == pytest.approx(computed(model(*more, causal=causal)), abs=1e-6)


def test_a_real_model_s_attention_is_written_out_in_every_layer():
    """As transformers and OpenVINO's converter leave it now: another version may make something else of it, and lose the speed."""
    bert = SentenceTransformer(str(model_files.folder_of(PACKAGED)), device="cpu")
    bert[0].auto_model.set_attn_implementation("eager")
    whole = openvino._converted(bert)
    assert kinds(whole).count(FUSED) == bert[0].auto_model.config.num_hidden_layers
    written_out = kinds(stepwise(whole))
    assert FUSED not in written_out
    assert written_out.count("Transpose") == 4 * bert[0].auto_model.config.num_hidden_layers
