"""
Kura's checkpoints as sources of the engine, and vectors back into them.

    summaries_to_source("checkpoints", "source")          # whatever Kura wrote there: JSONL, Parquet or a Hugging Face dataset
    engine.run(source="source", output="out", id_column="id", model=...)
    filled = with_embeddings(summaries, "out")
    manager.save_checkpoint("summaries", filled.summaries)
"""

from __future__ import annotations

import json
import os
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from kura.types import Conversation, ConversationSummary

from engine.errors import ConfigError, EngineError, Refused, SourceError
from engine.integrations.kura_formats import read_checkpoint
from engine.models.embeddings import ONE_VECTOR
from engine.part import vectors_of
from engine.storage import sync_folder
from engine.survey import opened

SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("metadata", pa.string())])
CONTENT_HASH = b"embedding_engine_content"
"""Key of a source's metadata: a hash of its rows, by which the same rows are known again."""
CHUNK_ROWS = 1024
"""Rows that are in memory at once."""
NOT_THERE = "not in the output"

_Item = TypeVar("_Item", ConversationSummary, Conversation)


@dataclass(frozen=True, slots=True)
class Filled:
    """What `with_embeddings` returns."""

    summaries: list[ConversationSummary]
    """Copies, in order, of all; those without a vector as they were."""
    missing: dict[str, str]
    """The reason for each chat id that has no vector."""


def text_of_summary(summary: ConversationSummary) -> str:
    """Return the text that Kura embeds: `str(summary)`, of a summary without a vector, which would be part of it."""
    return str(summary if summary.embedding is None else summary.model_copy(update={"embedding": None}))


def text_of_conversation(conversation: Conversation) -> str:
    """Return a conversation's messages, a line for each, as Kura words them in its prompt: `role: content`."""
    return "\n".join(f"{message.role}: {message.content}" for message in conversation.messages)


def summaries_to_source(
    checkpoint: str | Path | Iterable[ConversationSummary],
    to_folder: str | Path,
    *,
    name: str = "summaries",
    text: Callable[[ConversationSummary], str] = text_of_summary,
) -> Path:
    """
    Write summaries as a source: a Parquet file with `id` (the chat id), `text` and `metadata` (JSON).

    It is there whole or not at all. Called again with the same summaries, it changes nothing, so that a run goes on.

    Args:
        checkpoint: Kura's checkpoint folder, a file or dataset in it, or summaries.
        to_folder: Of the source.
        name: Of the checkpoint in the folder, and of the file that is written.
        text: Makes a summary's text; by default what Kura embeds.

    Returns:
        The file.

    Raises:
        SourceError: If there is no such checkpoint, it cannot be read, or two summaries have one chat id.
        Refused: If the file is there with other rows.
    """
    return _to_source(_items(checkpoint, name, ConversationSummary), Path(to_folder), name, text)


def conversations_to_source(
    checkpoint: str | Path | Iterable[Conversation],
    to_folder: str | Path,
    *,
    name: str = "conversations",
    text: Callable[[Conversation], str] = text_of_conversation,
) -> Path:
    """Write conversations as a source, as `summaries_to_source` does with summaries; Kura itself never embeds them."""
    return _to_source(_items(checkpoint, name, Conversation), Path(to_folder), name, text)


def with_embeddings(summaries: Iterable[ConversationSummary], output: str | Path) -> Filled:
    """
    Give summaries the vectors of an output that was made with `id_column="id"`.

    Args:
        summaries: They are not changed.
        output: A folder of the engine's, which may be half done: what is committed counts.

    Raises:
        ConfigError: If it is no output, its ids are not chat ids, or a text may have several vectors.
    """
    kept = list(summaries)
    places: dict[str, list[int]] = {}
    for place, summary in enumerate(kept):
        places.setdefault(summary.chat_id, []).append(place)
    reasons: dict[str, str] = dict.fromkeys(places, NOT_THERE)
    for chat_id, vector in _vectors(str(output), reasons):
        for place in places[chat_id]:
            kept[place] = kept[place].model_copy(update={"embedding": vector.tolist()})
        reasons.pop(chat_id, None)
    return Filled(kept, reasons)


def _items(checkpoint: str | Path | Iterable[_Item], name: str, kind: type[_Item]) -> Iterable[_Item]:
    return read_checkpoint(Path(checkpoint), name, kind) if isinstance(checkpoint, (str, Path)) else checkpoint


def _vectors(output: str, reasons: dict[str, str]) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """Yield the ids among `reasons` that have a vector, shard by shard, and put the reasons of rejects in."""
    ledger, job = opened(output)
    column = job.config.get("id_column")
    if column is None:
        raise ConfigError(
            f"{output} was made without id_column, so that its ids are not chat ids: run with id_column=id"
        )
    if job.config.get("long_texts") == "chunk-rows":
        raise ConfigError(ONE_VECTOR)
    for record in ledger.records():
        part = ledger.part(record.shard_id)  # it has its rejects in it
        vectors = vectors_of(part.table)
        for number, chat_id in enumerate(part.table.column(column).to_pylist()):
            if chat_id in reasons:
                yield chat_id, vectors[number]
        for reject in part.rejects:
            if reject.id in reasons:
                reasons[reject.id] = reject.reason


def _to_source(items: Iterable[_Item], folder: Path, name: str, text: Callable[[_Item], str]) -> Path:
    """Write a file beside its place, hash its rows on the way, and put it there, unless it is there."""
    if not name or Path(name).name != name or name.startswith((".", "_")):
        raise ConfigError(f"name {name!r}: a file's name without a folder, and not hidden, such as summaries")
    final = folder / f"{name}.parquet"
    staging = folder / f".{name}.{uuid.uuid4().hex}.staging"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = _write(items, staging, text)
        if not _published(staging, final) and _digest_of(final) != digest:
            raise Refused(
                f"{final} is there already, with other rows: vectors may have been made of it, so it is left as it is. "
                "Use another folder or name"
            )
    except OSError as error:
        raise EngineError(
            f"cannot write to {folder} ({error.strerror or type(error).__name__}): check the disk, then call it again"
        ) from None
    finally:
        with suppress(OSError):
            staging.unlink()
    return final


def _write(items: Iterable[_Item], staging: Path, text: Callable[[_Item], str]) -> str:
    """Write rows, a chunk at a time; return the hash of all."""
    digest, ids = xxhash.xxh3_128(), array("Q")
    rows = ((item.chat_id, text(item), json.dumps(item.metadata, ensure_ascii=False, default=str)) for item in items)
    with staging.open("xb") as file:
        with pq.ParquetWriter(file, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            while chunk := list(islice(rows, CHUNK_ROWS)):
                try:
                    writer.write_table(pa.table(list(zip(*chunk, strict=True)), schema=SCHEMA))
                except UnicodeEncodeError:
                    raise SourceError(
                        f"one of rows {len(ids)} to {len(ids) + len(chunk) - 1} has a lone surrogate, which is not Unicode: mend it"
                    ) from None
                ids.extend(xxhash.xxh3_64_intdigest(row[0].encode()) for row in chunk)
                digest.update(json.dumps(chunk).encode())
            writer.add_key_value_metadata({CONTENT_HASH: digest.hexdigest()})
        file.flush()
        os.fsync(file.fileno())
    num_distinct = len(np.unique(np.frombuffer(ids, np.uint64))) if ids else 0
    if num_distinct < len(ids):
        raise SourceError(
            f"{len(ids) - num_distinct} of {len(ids)} rows have a chat id that is another's too: vectors come back by id, so make them distinct"
        )
    return digest.hexdigest()


def _published(staging: Path, final: Path) -> bool:
    """Give a file its name, if nothing has it."""
    try:
        os.link(staging, final)
    except FileExistsError:
        return False
    sync_folder(final.parent)
    return True


def _digest_of(file: Path) -> str | None:
    try:
        found = (pq.read_metadata(file).metadata or {}).get(CONTENT_HASH)
    except pa.ArrowException:
        return None
    return found.decode() if found else None
