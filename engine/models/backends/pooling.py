"""
Early pooling: where a text's vector is made of one of its tokens, the end of the last layer is computed for that token alone.

What comes after the last attention (a dense layer, the feed-forward layers, sums and norms) goes token by token, so that the token can be taken before
it instead of after it: nine of the twelve parts of a layer's multiplications are left out, 6% of a model of twelve layers (docs/decisions/0009).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from openvino import opset13 as ops

if TYPE_CHECKING:
    from collections.abc import Iterator

    import openvino as ov

BY_ELEMENT = frozenset(
    ("Add", "Convert", "Divide", "Erf", "Gelu", "Multiply", "Power", "Relu", "Sigmoid", "Sqrt", "Subtract", "Swish", "Tanh")
)  # fmt: skip
BY_WIDTH = frozenset(("MVN", "ReduceMean", "VariadicSplit"))
"""Along the axis that their second input names."""
TOKENS, WIDTH, RANK = 1, 2, 3
"""Axes of (texts, tokens, width), and how many they are."""


def with_early_pooling(converted: ov.Model) -> ov.Model:
    """Return a copy of a model, whose weights it shares, that takes a text's one token as early as it can; any other model as it is."""
    if all(_positions(node) is None for node in converted.get_ordered_ops()):
        return converted
    model = converted.clone()
    for pooling in model.get_ordered_ops():
        positions = _positions(pooling)
        if positions is not None:
            _take_early(model, pooling, positions)
    model.validate_nodes_and_infer_types()
    return model


def _positions(pooling: Any) -> Any:
    """Return at which token an operation takes all numbers of each text, shape (texts, 1, 1); None if that is not what it does."""
    if pooling.get_type_name() != "GatherElements" or pooling.get_attributes()["axis"] != TOKENS:
        return None
    indices = pooling.input_value(1)
    shape = indices.get_partial_shape()
    if shape.rank != RANK or shape[TOKENS] != 1:
        return None
    while indices.get_node().get_type_name() in ("Convert", "Broadcast"):
        indices = indices.get_node().input_value(0)
    shape = indices.get_partial_shape()
    if shape.rank != RANK or shape[WIDTH] != 1:  # another token for each number
        return None
    return indices


def _take_early(model: ov.Model, pooling: Any, positions: Any) -> None:
    """Have all that goes token by token and is read by the pooling alone computed behind it, and no more before it."""
    late, inputs = {pooling.get_name()}, []
    for node in reversed(model.get_ordered_ops()):
        readers = dict(_readers(node))
        if readers and readers.keys() <= late and readers.get(pooling.get_name(), 0) == 0 and _is_by_token(node):
            late.add(node.get_name())
            inputs += node.inputs()
    at_tokens = ops.squeeze(positions, ops.constant(np.int64(WIDTH)))
    taken: dict[tuple[str, int], Any] = {}
    for entry in inputs:
        source = entry.get_source_output()
        key = source.get_node().get_name(), source.get_index()
        if key[0] in late or not _has_tokens(source):
            continue
        if key not in taken:
            taken[key] = ops.gather(source, at_tokens, ops.constant(np.int64(TOKENS)), batch_dims=1)
        entry.replace_source_output(taken[key].output(0))
    if inputs:
        pooling.output(0).replace(pooling.input_value(0))


def _readers(node: Any) -> Iterator[tuple[str, int]]:
    """Yield which operations read what one makes, and as which of their inputs."""
    for output in node.outputs():
        for entry in output.get_target_inputs():
            yield entry.get_node().get_name(), entry.get_index()


def _is_by_token(node: Any) -> bool:
    """Say whether what an operation makes of a token is made of that token alone."""
    kind, values = node.get_type_name(), node.input_values()
    if kind == "MatMul":
        is_dense = _is_constant(values[1]) and values[1].get_partial_shape().rank == RANK - 1
        return is_dense and _has_tokens(values[0]) and not node.get_attributes()["transpose_a"]
    if kind in BY_WIDTH:
        return _has_tokens(values[0]) and _axes(values[1]) in ([-1], [WIDTH])
    return kind in BY_ELEMENT and all(_has_tokens(value) or _is_the_same_for_tokens(value) for value in values)


def _has_tokens(value: Any) -> bool:
    shape = value.get_partial_shape()
    return bool(shape.rank == RANK and shape[TOKENS].is_dynamic)


def _is_the_same_for_tokens(value: Any) -> bool:
    shape = value.get_partial_shape()
    return _is_constant(value) and (len(shape) < RANK - TOKENS or shape[TOKENS - RANK] == 1)


def _axes(value: Any) -> list[int] | None:
    return np.atleast_1d(value.get_node().get_data()).tolist() if _is_constant(value) else None


def _is_constant(value: Any) -> bool:
    return bool(value.get_node().get_type_name() == "Constant")
