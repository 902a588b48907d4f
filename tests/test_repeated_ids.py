"""Repeated ids: kept, counted within shards and over the whole output, in bounded memory."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import repeated_ids
from engine.repeated_ids import RepeatedIds, num_repeated

IDS = st.none() | st.integers(-3, 3)
TYPES = {
    "int8": lambda ids: pa.array(ids, pa.int8()),
    "uint64": lambda ids: pa.array([None if i is None else 2**64 - 4 + i for i in ids], pa.uint64()),
    "string": lambda ids: pa.array([None if i is None else f"id {i}" for i in ids], pa.string()),
    "dictionary": lambda ids: pa.array(
        [None if i is None else f"id {i}" for i in ids], pa.string()
    ).dictionary_encode(),
    "binary": lambda ids: pa.array([None if i is None else bytes([i + 3, 255]) for i in ids], pa.binary()),
    "double": lambda ids: pa.array(ids, pa.float64()),
    "timestamp": lambda ids: pa.array(ids, pa.timestamp("us")),
    "list": lambda ids: pa.array([None if i is None else [i, None] for i in ids], pa.list_(pa.int64())),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("held", [1 << 20, 3])
@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(IDS, max_size=6), max_size=5))
def test_as_many_repeat_as_counting_says(kind, held, parts):
    """Of ids of any type, null among them, whether they are in memory or went to a disk."""
    before = repeated_ids.MAX_IN_MEMORY
    repeated_ids.MAX_IN_MEMORY = held
    try:
        with RepeatedIds() as found:
            for number, ids in enumerate(parts):
                column = pa.chunked_array([TYPES[kind](ids)])
                assert num_repeated(column) == len(ids) - len(set(ids))
                found.add(f"{number:032}", column, np.arange(len(ids)))
            warnings = found.warnings()
    finally:
        repeated_ids.MAX_IN_MEMORY = before
    counts = Counter(one for ids in parts for one in ids)
    more = [times for times in counts.values() if times > 1]
    if not more:
        assert warnings == []
    else:
        number = "1 id occurs" if len(more) == 1 else f"{len(more)} ids occur"
        assert warnings[0].startswith(f"{number} more than once, in {sum(more)} rows, such as row ")
