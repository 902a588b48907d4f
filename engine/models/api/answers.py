"""Answers: bodies of embeddings endpoints, decoded fast and checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pybase64

from engine.models.base import BadAnswer

if TYPE_CHECKING:
    from engine.models.api.limits import Limits
    from engine.models.base import Vectors


class Malformed(BadAnswer):
    """A body that is none of an embeddings endpoint, such as a web page: what stands before a server may answer in its place."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A provider's answer to one request."""

    vectors: Vectors
    """Shape (texts, dimension), float32, in the order of the texts. What is not finite in them is for the caller to find."""
    num_tokens: int | None = None
    """That the provider says it used."""
    limits: Limits | None = None
    """That its headers tell."""


@contextmanager
def billed(num_tokens: int | None) -> Iterator[None]:
    """Note what an answer is billed for on what is raised if it is bad: it is paid all the same."""
    try:
        yield
    except BadAnswer as error:
        error.num_tokens = num_tokens
        raise


def decoded(body: bytes, num_texts: int) -> tuple[Vectors, int | None]:
    """
    Decode an answer of OpenAI's embeddings endpoint, or of a server like it: base64 or floats, in whatever order.

    Args:
        body: As it came.
        num_texts: That were sent.

    Returns:
        The vectors in the order of the texts, and the tokens that the server says it used.

    Raises:
        BadAnswer: If it is not one vector of one dimension for each text; `Malformed` if there are no vectors in it at all.
    """
    try:
        answer = orjson.loads(body)
        items = answer["data"]
        order = np.array([item.get("index", at) for at, item in enumerate(items)], np.int64)
        given = [item["embedding"] for item in items]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise Malformed("not an embeddings answer") from None
    num_tokens = _tokens_of(answer.get("usage"))
    with billed(num_tokens):
        if len(given) != num_texts:
            raise BadAnswer(f"{len(given)} vectors for {num_texts} texts")
        if not np.array_equal(np.sort(order), np.arange(num_texts)):
            raise BadAnswer("indexes are not those of the texts")
        vectors = stacked(given)
    if not np.array_equal(order, np.arange(num_texts)):
        vectors = vectors[np.argsort(order)]
    return vectors, num_tokens


def stacked(given: Sequence[Any]) -> Vectors:
    """
    Return vectors as one array of float32: each is a list of numbers, or base64 of little-endian float32.

    Raises:
        BadAnswer: If they are neither, or of several dimensions.
    """
    try:
        if all(isinstance(vector, str) for vector in given):
            raw = [pybase64.b64decode(vector, validate=True) for vector in given]
            if len({len(vector) for vector in raw}) > 1:
                raise BadAnswer("vectors of several dimensions")
            vectors = np.frombuffer(b"".join(raw), "<f4").reshape(len(raw), -1).astype(np.float32, copy=False)
        else:  # null stands for NaN and infinity, which JSON does not have
            rows = [[np.nan if x is None else x for x in v] if None in v else v for v in given]
            vectors = np.array(rows, np.float32)
    except (ValueError, TypeError):
        raise BadAnswer("vectors are ragged, or not numbers") from None
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise BadAnswer("vectors are ragged, or empty")
    return vectors


def _tokens_of(usage: Any) -> int | None:
    """Return the tokens of OpenAI's `usage`, or of servers that have only one of its fields; None if there are none."""
    if not isinstance(usage, dict):
        return None
    for name in ("prompt_tokens", "total_tokens", "input_tokens"):
        if isinstance(usage.get(name), int) and usage[name] > 0:
            return int(usage[name])
    return None
