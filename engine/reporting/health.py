"""The health of a sample of vectors: near-duplicates, identical vectors, norms that stand out, dimensions that say nothing."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

NEAR = 0.98
"""Cosine above which two vectors are near-duplicates."""
MAX_PAIRS = 50
"""That are kept, the nearest."""
MAX_SETS = 20
"""Of identical vectors that are kept, the largest."""
BLOCK = 512
NORM_DEVIATIONS = 8
"""Median absolute deviations from the median, beyond which a norm stands out."""
NORM_TOLERANCE = 1e-3
"""Relative, within which norms do not stand out at all: normalised vectors differ by rounding."""
MIN_ROWS = 10
"""With fewer, nothing is said of dimensions and norms."""


@dataclass(frozen=True, slots=True)
class Health:
    """What was found in a sample; rows are positions in it."""

    pairs: list[tuple[float, int, int]]
    """Cosine and two rows of different vectors, the nearest first; of identical vectors only the first takes part."""
    num_pairs: int
    """All that were found, whether they are kept or not."""
    identical: list[list[int]]
    """Rows whose vectors are the same to the bit, the largest sets first."""
    num_identical: int
    """Rows whose vector another row before them has."""
    norm_range: tuple[float, float, float]
    """Lowest, median, highest."""
    odd_norms: list[int]
    constant_dimensions: list[int]


def health_of(vectors: np.ndarray[Any, np.dtype[np.float32]]) -> Health:
    """Look at vectors of shape (rows, dimensions), of which none is zero."""
    first, sets = _identical(vectors)
    norms = np.linalg.norm(vectors, axis=1)
    pairs, num_pairs = _near(vectors[first] / norms[first, None], first)
    enough = len(first) >= MIN_ROWS
    return Health(
        pairs=pairs,
        num_pairs=num_pairs,
        identical=sets[:MAX_SETS],
        num_identical=len(vectors) - len(first),
        norm_range=(float(norms.min()), float(np.median(norms)), float(norms.max())),
        odd_norms=_odd(norms) if enough else [],
        constant_dimensions=np.flatnonzero(np.ptp(vectors, axis=0) == 0).tolist() if enough else [],
    )


def _identical(vectors: Any) -> tuple[Any, list[list[int]]]:
    """Return the first row of each distinct vector, and the rows of each that is there more than once."""
    rows: dict[bytes, list[int]] = {}
    for number, vector in enumerate(np.ascontiguousarray(vectors)):
        rows.setdefault(vector.tobytes(), []).append(number)
    sets = sorted((some for some in rows.values() if len(some) > 1), key=len, reverse=True)
    return np.array([some[0] for some in rows.values()]), sets


def _near(units: Any, rows: Any) -> tuple[list[tuple[float, int, int]], int]:
    """Compare all unit vectors with each other, a block at a time."""
    kept: list[tuple[float, int, int]] = []
    num_found = 0
    for start in range(0, len(units), BLOCK):
        cosines = units[start : start + BLOCK] @ units[start:].T
        one, other = np.nonzero(np.triu(cosines > NEAR, k=1))
        num_found += len(one)
        values = cosines[one, other]
        best = np.argsort(-values, kind="stable")[:MAX_PAIRS]
        here = [(min(float(values[at]), 1.0), int(rows[start + one[at]]), int(rows[start + other[at]])) for at in best]
        kept = list(islice(heapq.merge(kept, here, key=lambda pair: -pair[0]), MAX_PAIRS))
    return kept, num_found


def _odd(norms: Any) -> list[int]:
    """Return the rows whose norms stand out, those farthest from the median first."""
    distances = np.abs(norms - np.median(norms))
    allowed = max(NORM_DEVIATIONS * float(np.median(distances)), NORM_TOLERANCE * float(np.median(norms)))
    odd = np.flatnonzero(distances > allowed)
    return [int(row) for row in odd[np.argsort(-distances[odd], kind="stable")]]
