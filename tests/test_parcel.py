"""Parcels: shards on their way through Ray, whatever their files are like."""

from __future__ import annotations

import pyarrow as pa

from engine.pipeline.parcel import Item, pack, unpack
from engine.sources.texts import values_of
from tests.builders import make_shard


def test_files_that_hold_text_as_other_kinds_travel_together():
    """A file of nulls alone, strings, long strings, bytes and dictionaries are all text, and share a parcel."""
    kinds = [
        pa.array(["a"]),
        pa.nulls(1),
        pa.array(["a"], pa.large_string()),
        pa.array(["a"], pa.string_view()),
        pa.array([b"\xff"]),
        pa.array(["a"]).dictionary_encode(),
    ]
    items = [Item(make_shard(1), pa.table({"text": kind, "_source_row": [0]})) for kind in kinds]
    got = [values_of(item.table["text"])[0] for item in next(unpack(pack(items)))]
    assert [value if isinstance(value, str) or value is None else "bad" for value in got] == [
        "a",
        None,
        "a",
        "a",
        "bad",
        "a",
    ]
