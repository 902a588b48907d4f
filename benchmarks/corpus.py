"""Real text: the messages and the conversations of chitchat-dataset."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


def conversations() -> Iterator[str]:
    """Yield conversations whole: most are short, some very long."""
    import chitchat_dataset

    for conversation in chitchat_dataset.Dataset().values():
        yield "\n".join(message["text"] for turn in conversation["messages"] for message in turn)


def messages() -> Iterator[str]:
    """Yield single messages: about 15 tokens each."""
    import chitchat_dataset

    for conversation in chitchat_dataset.Dataset().values():
        yield from (message["text"] for turn in conversation["messages"] for message in turn)


KINDS = {"messages": messages, "conversations": conversations}


def sample(kind: str, count: int) -> list[str]:
    """Return `count` texts that can be embedded, the same ones each time, in an order that makes shards alike."""
    texts = [text for text in KINDS[kind]() if text.strip()]
    if count > len(texts):
        raise SystemExit(f"there are {len(texts)} {kind}, and {count} were asked for: ask for fewer rows")
    return random.Random(0).sample(texts, count)


def write(path: Path, texts: Sequence[str]) -> str:
    """Write texts as Parquet; return where."""
    pq.write_table(pa.table({"text": list(texts)}), path)
    return str(path)
