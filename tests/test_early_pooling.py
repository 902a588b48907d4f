"""Early pooling: of a text whose vector is made of one token, the end of the last layer is computed for that token alone, to the same vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

from engine.models.backends import openvino
from engine.models.backends.pooling import with_early_pooling
from tests.test_backends import KINDS, LEAST, Kind
from tests.tiny_models import BERT, bert_tokenizer, cosines, mixed, packed

WIDTH, NUM_TOKENS = 8, 5
RANDOM = np.random.default_rng(0)
WEIGHTS = RANDOM.standard_normal((WIDTH, WIDTH)).astype(np.float32)
HIDDEN = RANDOM.standard_normal((3, NUM_TOKENS, WIDTH)).astype(np.float32)
AT = np.array([[0], [2], [4]])
"""Of each text the token that its vector is made of."""


def dense(hidden: Any) -> Any:
    return ops.matmul(hidden, ops.constant(WEIGHTS), False, True)


def model(layer: Callable[[Any], Any], *, one_token: bool = True, times: int = 1, read: bool = False) -> ov.Model:
    """Make what comes after the last attention: a dense layer, another one behind what a test is about, and the pooling, as it is traced."""
    hidden, at = ops.parameter([-1, -1, WIDTH], np.float32), ops.parameter([-1, 1], np.int64)
    last = dense(layer(dense(hidden)))
    shape = ops.constant(np.array([1, times, WIDTH]))
    wide = ops.broadcast(ops.unsqueeze(at, ops.constant(2)), shape, broadcast_spec="BIDIRECTIONAL")
    if not one_token:  # of each number of the vector another token
        wide = ops.mod(ops.add(wide, ops.constant(np.arange(WIDTH))), ops.constant(np.int64(NUM_TOKENS)))
    results = [ops.result(ops.gather_elements(last, wide, 1))]
    return ov.Model(results + [ops.result(last)] * read, [hidden, at])


def computed(one: ov.Model) -> np.ndarray:
    compiled = openvino._core().compile_model(one, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([HIDDEN, AT])[0])


def of_one_token(one: ov.Model) -> list[bool]:
    """Say of each dense layer, the first one first, whether it is computed for one token of a text."""
    layers = [node for node in one.get_ordered_ops() if node.get_type_name() == "MatMul"]
    return [node.get_output_partial_shape(0)[1] == 1 for node in layers]


def normed(hidden: Any, axis: int) -> Any:
    return ops.mvn(hidden, ops.constant(np.array([axis])), True, 1e-6, "INSIDE_SQRT")


def gated(hidden: Any) -> Any:
    halves = ops.variadic_split(hidden, ops.constant(np.int64(-1)), ops.constant(np.array([4, 4])))
    return ops.concat([ops.multiply(ops.swish(halves.output(0)), halves.output(1))] * 2, -1)


def root_mean_squared(hidden: Any) -> Any:
    mean = ops.reduce_mean(ops.power(hidden, ops.constant(np.float32(2))), ops.constant(np.array([-1])), True)
    return ops.multiply(hidden, ops.divide(ops.constant(np.float32(1)), ops.sqrt(mean)))


@pytest.mark.parametrize(
    "layer",
    [
        lambda hidden: ops.gelu(hidden, "erf"),
        lambda hidden: ops.add(hidden, ops.constant(np.arange(WIDTH, dtype=np.float32))),
        lambda hidden: ops.add(hidden, dense(ops.tanh(hidden))),
        lambda hidden: normed(hidden, -1),
        root_mean_squared,
    ],
    ids=["an activation", "a bias", "a sum", "a layer norm", "a root mean square"],
)
def test_what_goes_token_by_token_is_computed_for_one_token(layer):
    whole = model(layer)
    early = with_early_pooling(whole)
    assert not any(of_one_token(whole)), "the model itself is left as it was"
    assert all(of_one_token(early))
    assert computed(early) == pytest.approx(computed(whole), abs=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        lambda hidden: normed(hidden, 1),
        lambda hidden: ops.softmax(hidden, 1),
        lambda hidden: ops.reverse_sequence(hidden, ops.constant(np.full(3, NUM_TOKENS)), 0, 1),
        lambda hidden: ops.reshape(hidden, ops.constant(np.array([0, -1, WIDTH])), True),
        lambda hidden: ops.matmul(ops.matmul(hidden, hidden, False, True), hidden, False, False),
        gated,
    ],
    ids=[
        "a norm of tokens",
        "a softmax",
        "an order",
        "a shape",
        "attention",
        "a joint, which is not known",
    ],
)
def test_what_does_not_go_token_by_token_sees_all_tokens(layer):
    """The token is taken behind it; what it is not known of is taken for that."""
    whole = model(layer)
    early = with_early_pooling(whole)
    *before, last = of_one_token(early)
    assert last
    assert not any(before)
    assert computed(early) == pytest.approx(computed(whole), abs=1e-5)


@pytest.mark.parametrize(
    ("layer", "other"),
    [
        (ops.relu, {"one_token": False}),
        (ops.relu, {"times": 2}),
        (ops.relu, {"read": True}),
        (lambda hidden: ops.add(hidden, ops.constant(HIDDEN[0])), {}),
    ],
    ids=["many tokens", "a token twice", "read elsewhere", "a number of tokens that is settled"],
)
def test_a_model_that_needs_all_tokens_is_left_as_it_is(layer, other):
    whole = model(layer, **other)
    early = with_early_pooling(whole)
    assert not any(of_one_token(early))
    assert computed(early) == pytest.approx(computed(whole), abs=1e-6)


FIRST = {
    "BERT": Kind(BERT, bert_tokenizer, lambda: [Pooling(32, "cls"), Dense(32, 16), Normalize()]),
    "ModernBERT": Kind(KINDS["ModernBERT"].settings, bert_tokenizer, lambda: [Pooling(32, "cls")]),
}


@pytest.mark.parametrize("kind", FIRST)
def test_real_models_that_pool_the_first_token_are_computed_so(tmp_path, monkeypatch, kind):
    """As transformers and OpenVINO's converter leave them now: another version may make something else of it, and lose the speed."""
    reference = FIRST[kind].save(tmp_path)
    expected = reference.encode(mixed())
    made: list[tuple[ov.Model, ov.Model]] = []

    def spied(converted: ov.Model) -> ov.Model:
        made.append((converted, with_early_pooling(converted)))
        return made[-1][1]

    monkeypatch.setattr(openvino, "with_early_pooling", spied)
    encoder = packed(reference, "openvino")
    assert encoder.backend_name == "openvino"
    assert cosines(encoder(mixed()).vectors, expected).min() >= LEAST
    [(converted, early)] = made
    assert sum(of_one_token(early)) == sum(of_one_token(converted)) + 3


@pytest.mark.parametrize("pooling", ["mean", ("cls", "mean"), "lasttoken"])
def test_real_models_that_pool_otherwise_are_left_as_they_are(tmp_path, pooling):
    kind = Kind(BERT, bert_tokenizer, lambda: [Pooling(32, pooling)])
    converted = openvino._converted(kind.save(tmp_path))
    assert of_one_token(with_early_pooling(converted)) == of_one_token(converted)
