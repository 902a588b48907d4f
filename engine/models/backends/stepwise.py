"""
Stepwise attention: what OpenVINO has as one operation, written out, for texts that its fused kernels are not made for.

OpenVINO takes the operation apart itself where it does not fuse it, and then turns all keys around for the multiplication with the queries; multiplying
by the transpose of keys that lie as the queries do costs less (docs/decisions/0009).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from openvino import opset13 as ops

if TYPE_CHECKING:
    import openvino as ov

FUSED = "ScaledDotProductAttention"
"""Of queries, keys and values, each (texts, heads, tokens, width), and, where a model has them, of a mask and a scale."""
LAST_TWO = [0, 1, 3, 2]


def stepwise(converted: ov.Model) -> ov.Model:
    """Return a copy of a model, whose weights it shares, with attention written out: softmax(scale * query @ key.T + mask) @ value."""
    model = converted.clone()
    for attention in model.get_ordered_ops():
        if attention.get_type_name() == FUSED and _is_plain(attention):
            attention.output(0).replace(_written_out(attention).output(0))
    model.validate_nodes_and_infer_types()
    return model


def _is_plain(attention: Any) -> bool:
    """Say whether the formula is all that an attention does: no mask of its own making, nor one that is not added, nor sinks."""
    query, _, _, *rest = attention.input_values()
    is_added = not rest or rest[0].get_element_type().is_real()
    knows_scale = len(rest) > 1 or query.get_partial_shape()[-1].is_static
    return not attention.get_attributes()["causal"] and is_added and knows_scale and len(rest) <= 2


def _written_out(attention: Any) -> Any:
    query, key, value, *rest = attention.input_values()
    scores = ops.matmul(ops.multiply(query, _scale(query, rest)), _as_queries_lie(key), False, True)
    if rest:
        scores = ops.add(scores, rest[0])
    return ops.matmul(ops.softmax(scores, -1), value, False, False)


def _scale(query: Any, rest: list[Any]) -> Any:
    """Return what the products are scaled by: a model's own factor, or one over the root of a head's width."""
    if len(rest) > 1:
        return rest[1]
    return ops.constant(np.float32(query.get_partial_shape()[-1].get_length() ** -0.5))


def _as_queries_lie(key: Any) -> Any:
    """Take two transpositions of keys, one after the other, for the one that they come to."""
    order, inner = _transposed(key)
    before, source = _transposed(inner) if order == LAST_TWO else (None, None)
    if before is None:
        return key
    return ops.transpose(source, ops.constant(np.array([before[axis] for axis in LAST_TWO], np.int64)))


def _transposed(value: Any) -> tuple[list[int] | None, Any]:
    """Return the order of axes of a transposition, and of what it is one; None if `value` is none, or the order is not settled."""
    node = value.get_node()
    if node.get_type_name() == "Transpose" and node.input_value(1).get_node().get_type_name() == "Constant":
        return node.input_value(1).get_node().get_data().tolist(), node.input_value(0)
    return None, value
