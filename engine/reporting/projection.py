"""The projection: vectors as points on a plane, in groups that have names."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engine.reporting.sample import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

Projection = Literal["auto", "pca", "tsne"]

TSNE_ROWS = 5000
"""Up to which t-SNE is quick enough not to be asked for: it takes seconds, PCA none."""
MIN_TSNE_ROWS = 30
DIMENSIONS = 50
"""That PCA leaves to t-SNE and to k-means."""
MAX_CLUSTERS = 8
MAX_GROUPS = 9
"""Values of a column that have a colour of their own."""
OTHER = "other values"
WORDS = 3
"""That name a cluster."""


@dataclass(frozen=True, slots=True)
class Map:
    """Points on a plane, and the group or the number of each."""

    points: np.ndarray[Any, np.dtype[np.float32]]
    """Shape (rows, 2)."""
    how: str
    """What they were made by, for a reader."""
    groups: list[str] | None
    """Of each point; None if they are coloured by numbers."""
    numbers: list[float | None] | None
    colored_by: str


def map_of(
    vectors: np.ndarray[Any, np.dtype[np.float32]],
    texts: Sequence[str] | None,
    colors: Sequence[Any] | None,
    *,
    color_by: str | None,
    projection: Projection,
) -> Map | None:
    """
    Put vectors on a plane, the same way each time.

    Args:
        vectors: Shape (rows, dimensions); only their directions count.
        texts: Of the rows, to name clusters by.
        colors: Values of the column to colour by; by default k-means clusters are.
        color_by: The column's name.
        projection: `auto` takes t-SNE up to 5,000 rows, and PCA above.

    Returns:
        None if there are no two directions in which the vectors differ.
    """
    from sklearn.decomposition import PCA

    rows = len(vectors)
    if rows < 3 or vectors.shape[1] < 2:
        return None
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    if np.ptp(units, axis=0).max() < 1e-6:
        return None
    num_kept = min(DIMENSIONS, *units.shape)
    pca = PCA(num_kept, svd_solver="randomized" if num_kept < min(units.shape) else "auto", random_state=0)
    reduced = pca.fit_transform(units)
    explained = pca.explained_variance_ratio_
    if projection == "tsne" or (projection == "auto" and MIN_TSNE_ROWS <= rows <= TSNE_ROWS):
        points = _tsne(reduced)
        how = f"t-SNE of the first {num_kept} principal components ({explained.sum():.0%} of the variance)"
    else:
        points = reduced[:, :2]
        how = f"the first two principal components ({explained[:2].sum():.0%} of the variance)"
    groups, numbers, colored_by = _coloured(reduced, texts, colors, color_by)
    return Map(np.asarray(points, np.float32), how, groups, numbers, colored_by)


def _tsne(reduced: Any) -> Any:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    rows = len(reduced)
    tsne = TSNE(perplexity=min(30.0, (rows - 1) / 3), init="pca", max_iter=750, random_state=0)
    with threadpool_limits(
        1, user_api="openmp"
    ):  # threads add up forces in any order, and then no two maps are the same
        return tsne.fit_transform(reduced)


def _coloured(
    reduced: Any, texts: Sequence[str] | None, colors: Sequence[Any] | None, color_by: str | None
) -> tuple[list[str] | None, list[float | None] | None, str]:
    if colors is not None:
        numbers = [_number(value) for value in colors]
        if len({number for number in numbers if number is not None}) > MAX_GROUPS and _all_numbers(colors):
            return None, numbers, str(color_by)
        return _frequent([shown(value)[:40] for value in colors]), None, str(color_by)
    labels = _clusters(reduced)
    names = _names(labels, texts)
    return [names[label] for label in labels], None, "k-means cluster"


def _clusters(reduced: Any) -> list[int]:
    """Return the cluster of each row; 0 is the largest."""
    from sklearn.cluster import KMeans

    num_clusters = max(1, min(MAX_CLUSTERS, len(np.unique(reduced, axis=0)), round(math.sqrt(len(reduced) / 2))))
    labels = KMeans(num_clusters, n_init=4, random_state=0).fit_predict(reduced).tolist()
    order = {label: number for number, (label, _) in enumerate(Counter(labels).most_common())}
    return [order[label] for label in labels]


def _names(labels: Sequence[int], texts: Sequence[str] | None) -> dict[int, str]:
    """Name each cluster by its number and, if there are texts, the words that set it apart."""
    names = {label: f"{label + 1}" for label in set(labels)}
    if texts is None or len(names) < 2:
        return names
    from sklearn.feature_extraction.text import TfidfVectorizer

    together = [
        " ".join(text for text, own in zip(texts, labels, strict=True) if own == label) for label in sorted(names)
    ]
    try:
        vectorizer = TfidfVectorizer(
            stop_words="english",
            max_features=5000,
            sublinear_tf=True,
            token_pattern=r"\b[^\W\d_]{3,}\b",  # noqa: S106 - words, not a password
        )
        weights = vectorizer.fit_transform(together).toarray()
    except ValueError:  # nothing but stop words
        return names
    words = vectorizer.get_feature_names_out()
    common = np.median(weights, axis=0)
    for label, row in zip(sorted(names), weights, strict=True):
        best = [words[at][:20] for at in np.argsort(common - row, kind="stable")[:WORDS] if row[at] > common[at]]
        names[label] += f": {', '.join(best)}" if best else ""
    return names


def _frequent(values: list[str]) -> list[str]:
    """Keep the most frequent values, and call all others the same."""
    counts = Counter(values)
    if len(counts) <= MAX_GROUPS + 1:
        return values
    kept = {value for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_GROUPS]}
    return [value if value in kept else OTHER for value in values]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _all_numbers(values: Sequence[Any]) -> bool:
    return all(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values)
