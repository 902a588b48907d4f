"""Kura's three forms of a checkpoint, read a piece at a time into Kura's own objects: JSON lines, Parquet, Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from kura.types import Conversation, ConversationSummary
from pydantic import ValidationError

from engine.errors import SourceError

CHUNK_ROWS = 1024
"""Rows that are in memory at once."""
DATASET = "state.json"
"""What makes a folder a Hugging Face dataset: the list of its files."""
ROLES = ("user", "assistant")
"""As Kura numbers them in datasets."""

_Item = TypeVar("_Item", ConversationSummary, Conversation)


def read_checkpoint(path: Path, name: str, kind: type[_Item]) -> Iterator[_Item]:
    """
    Find a checkpoint, and yield what Kura would load from it.

    Args:
        path: A folder of checkpoints, or one of them.
        name: Of the checkpoint in the folder.
        kind: `ConversationSummary` or `Conversation`.

    Raises:
        SourceError: If there is none, or more than one, or it cannot be read.
    """
    found = _found(path, name)
    with _readable(found):
        if found.is_dir():
            yield from _of_dataset(found, kind)
        elif found.suffix == ".parquet":
            yield from _of_parquet(found, kind)
        else:
            yield from _of_lines(found, kind)


def _found(path: Path, name: str) -> Path:
    if path.is_file() or (path / DATASET).is_file():
        return path
    if not path.is_dir():
        raise SourceError(f"there is no checkpoint folder {path}; check the path")
    candidates = [path / f"{name}.jsonl", path / f"{name}.parquet"]
    found = [file for file in candidates if file.is_file()]
    found += [path / name] if (path / name / DATASET).is_file() else []
    if not found:
        raise SourceError(
            f"{path} has no checkpoint {name!r}: neither {name}.jsonl, {name}.parquet nor a dataset {name}/"
        )
    if len(found) > 1:
        raise SourceError(
            f"{path} has {name!r} in {len(found)} forms; give the path of one: {', '.join(map(str, found))}"
        )
    return found[0]


def _of_lines(file: Path, kind: type[_Item]) -> Iterator[_Item]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield kind.model_validate_json(line)


def _of_parquet(file: Path, kind: type[_Item]) -> Iterator[_Item]:
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=1024**2) as parquet:
        for batch in parquet.iter_batches(CHUNK_ROWS):
            for row in batch.to_pylist():
                for column in ("messages", "languages", "assistant_errors", "metadata"):
                    if row.get(column):
                        row[column] = json.loads(row[column])
                yield kind.model_validate(row)


def _of_dataset(folder: Path, kind: type[_Item]) -> Iterator[_Item]:
    """Read the Arrow files that a dataset lists, with no need for the library."""
    convert: Callable[[dict[str, Any]], dict[str, Any]] = _conversation if kind is Conversation else _summary
    for part in json.loads((folder / DATASET).read_text(encoding="utf-8"))["_data_files"]:
        with pa.memory_map(str(folder / part["filename"])) as source, pa.ipc.open_stream(source) as stream:
            for batch in stream:
                for start in range(0, batch.num_rows, CHUNK_ROWS):
                    for row in batch.slice(start, CHUNK_ROWS).to_pylist():
                        yield kind.model_validate(convert(row))


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    """Undo what Kura does to None for datasets, as Kura undoes it."""
    empty = (
        "request",
        "topic",
        "task",
        "concerning_score",
        "user_frustration",
        "languages",
        "assistant_errors",
        "embedding",
    )
    return row | {name: row[name] or None for name in empty} | {"metadata": _metadata(row["metadata"])}


def _conversation(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["messages"]
    if isinstance(messages, dict):  # a list of structs is stored as a struct of lists
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    for message in messages:
        message["created_at"] = _time(message["created_at"])
        if isinstance(message["role"], int):
            message["role"] = ROLES[message["role"]]
    return row | {"created_at": _time(row["created_at"]), "messages": messages, "metadata": _metadata(row["metadata"])}


def _metadata(stored: dict[str, list[str]]) -> dict[str, Any]:
    """Read Kura's keys and values: JSON where it is, and else the text."""
    found: dict[str, Any] = {}
    for key, value in zip(stored["keys"], stored["values"], strict=True):
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _time(value: Any) -> datetime:
    """Return a time as Python's: Arrow gives pandas' for nanoseconds, or a datetime."""
    return value.to_pydatetime() if hasattr(value, "to_pydatetime") else value  # type: ignore[no-any-return]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what is wrong with a checkpoint into a message that names it and quotes nothing of it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:  # ValidationError is a ValueError
        at = ""
        if isinstance(error, ValidationError):
            at = f" at {'.'.join(map(str, error.errors()[0]['loc'])) or 'a line'}"
        raise SourceError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}{at}): it is damaged, or another version of Kura's"
        ) from None
