"""Kinds of tables in memory: what is one, what is a path, and what is near to a table and no use as a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.errors import SourceError
from engine.sources.formats import SUFFIXES

LOOKED_AT = 1000
"""Items of a list of strings that are looked up as paths."""
EXPLICIT = 'give texts as {"text": [...]}, and paths as a tuple'


def is_in_memory(source: Any) -> bool:
    """
    Tell a table in memory from the path or the paths of a source on a disk.

    Raises:
        SourceError: If a list of strings could be either.
    """
    if source is None or isinstance(source, (str, PathLike)):
        return False
    if isinstance(source, (tuple, list)):
        return bool(source) and _is_of_rows(source)
    return True


def is_ray_dataset(source: Any) -> bool:
    """Say whether a source is a Dataset of Ray Data."""
    return is_of(source, "ray.data", "Dataset", "MaterializedDataset")


def refuse_others(source: Any) -> None:
    """Say what to do with what is near to a table."""
    if is_of(source, "datasets", "DatasetDict", "IterableDatasetDict"):
        raise SourceError(
            f"a DatasetDict has several splits ({', '.join(map(str, source))}): give one, such as source[{next(iter(source), 'train')!r}]"
        )
    if is_of(source, "datasets", "IterableDataset"):
        raise SourceError(
            "an IterableDataset comes from elsewhere each time: give a Dataset, or write it to Parquet and give its path"
        )
    if is_of(source, "polars", "LazyFrame"):
        raise SourceError(
            "a LazyFrame has no rows yet: give source.collect(), or write it by sink_parquet and give its path"
        )
    known = (Mapping, Sequence, np.ndarray, pa.Table, pa.RecordBatch, pa.RecordBatchReader, pa.Array, pa.ChunkedArray)
    if isinstance(source, known) or is_frame(source) or hasattr(source, "__arrow_c_stream__"):
        return
    if is_of(source, "pandas", "Series") or is_of(source, "polars", "Series") or is_of(source, "datasets", "Dataset"):
        return
    if isinstance(source, Iterator):
        raise SourceError(
            "a generator can be read once, and a run that goes on needs its rows again: give a list of it, or write it to Parquet "
            "and give the path"
        )
    raise SourceError(
        f"source: a {type(source).__name__} is no table that is known: give paths, a list of texts, a dict of columns, a DataFrame, an Arrow "
        "table, or a Dataset"
    )


def _is_of_rows(source: Sequence[Any]) -> bool:
    """Tell a list of texts, or of rows, from one of paths."""
    if isinstance(source, tuple) or any(isinstance(item, PathLike) for item in source):
        return False
    if not all(isinstance(item, str) for item in source):
        return True
    some = source[:LOOKED_AT]
    num_paths = sum(_is_path(item) for item in some)
    if num_paths == len(some) == len(source):
        return False
    if num_paths or not any(" " in item or "\n" in item for item in some):
        raise SourceError(f"source: the list of {len(source)} strings could be of texts or of paths: {EXPLICIT}")
    return True


def _is_path(item: str) -> bool:
    """Say whether a string looks like a path, or is one."""
    if not item or "\n" in item or "\0" in item or len(item) > 4096:
        return False
    if (
        "://" in item.partition(" ")[0]
        or item.startswith(("/", "~/", "./", "../", "memory:"))
        or item.endswith(SUFFIXES)
    ):
        return True
    try:
        return Path(item).exists()
    except (OSError, ValueError):
        return False


def is_frame(source: Any) -> bool:
    """Say whether a source is a DataFrame of pandas or polars."""
    return is_of(source, "pandas", "DataFrame") or is_of(source, "polars", "DataFrame")


def is_of(value: Any, package: str, *names: str) -> bool:
    """Say whether a value is of a class of some package, which is not imported for it."""
    return any(
        kind.__name__ in names and (kind.__module__ + ".").startswith(package + ".") for kind in type(value).__mro__
    )
