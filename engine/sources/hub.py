"""
The Hugging Face Hub as a source: hf://datasets/OWNER/NAME[@REVISION]/PATH.

A listing is of one commit, and files are opened as of that commit, so what is pushed meanwhile changes nothing that is read. A file's
version is its blob's hash: the same content under a later commit is the same file. A token, if one is needed, is HF_TOKEN of the
environment, or what `hf auth login` has stored, where the engine and its workers run.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from engine.errors import EngineError, SourceError
from engine.schema import InputFile

SCHEME = "hf://"
READ_BUFFER_BYTES = 8 * 1024**2
ATTEMPTS = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0
LONGEST_WINDOW_S = 300.0
TOO_MANY = 429
_PASSING = frozenset({408, TOO_MANY, 500, 502, 503, 504})
"""Statuses that another attempt may not find."""
_CLIENTS = frozenset({"httpx2", "httpx", "requests"})
"""Libraries through which the Hub's client has asked it, by its version: their errors are of connections."""
_Answer = TypeVar("_Answer")
_TYPES = {"datasets": "dataset", "spaces": "space", "models": "model"}


@dataclass(frozen=True, slots=True)
class _Address:
    """A path in a repository."""

    kind: str
    repository: str
    revision: str | None
    path: str

    def at(self, revision: str | None, path: str) -> str:
        at = f"@{revision.replace('/', '%2F')}" if revision else ""
        prefix = "" if self.kind == "model" else f"{self.kind}s/"
        return f"{SCHEME}{prefix}{self.repository}{at}{'/' if path else ''}{path}"


def is_hub(location: str) -> bool:
    """Say whether a location is one of the Hub."""
    return location.startswith(SCHEME)


def normalized(location: str) -> str:
    """Return the one spelling of a location."""
    address = _address(location)
    return address.at(address.revision, address.path)


def repository_of(location: str) -> str:
    """Return the location of the repository that a location is in, with its revision if it names one."""
    address = _address(location)
    return address.at(address.revision, "")


def below(location: str) -> Iterator[InputFile]:
    """Yield the files of any depth below a location, each with its location now as path, and opened as of its commit."""
    address = _address(location)
    with _explained(address):
        api, commit = _commit(address)
        entries = _asked(
            lambda: list(
                api.list_repo_tree(
                    address.repository, address.path or None, recursive=True, revision=commit, repo_type=address.kind
                )
            )
        )
    yield from (_file(address, commit, entry) for entry in entries if hasattr(entry, "blob_id"))


def look(location: str) -> InputFile | None:
    """Return the file at a location, or None if there is none."""
    address = _address(location)
    with _explained(address):
        api, commit = _commit(address)
        found = _asked(
            lambda: api.get_paths_info(address.repository, [address.path], revision=commit, repo_type=address.kind)
        )
    files = [entry for entry in found if hasattr(entry, "blob_id")]
    return _file(address, commit, files[0]) if files else None


def exists(location: str) -> bool:
    """Say whether there is a file at a location."""
    return look(location) is not None


def open_file(file: InputFile, changed: Callable[[], Exception]) -> Any:
    """Open a file to read pieces of it; raise what `changed` makes if it is not what was listed."""
    from huggingface_hub import HfFileSystem

    location = file.location
    if not re.fullmatch(r"[0-9a-f]{40}", _address(location).revision or ""):
        found = look(location)
        if found is None or found.version != file.version:
            raise changed()
        location = found.location
    with _explained(_address(location)):
        opened = _asked(
            lambda: HfFileSystem(skip_instance_cache=True).open(location, "rb", block_size=READ_BUFFER_BYTES)
        )
    return _HubFile(opened, _address(location))


class _HubFile(io.RawIOBase):
    """A file of the Hub, whose errors are the engine's."""

    def __init__(self, opened: Any, address: _Address) -> None:
        super().__init__()
        self._opened = opened
        self._address = address

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._opened.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._opened.seek(offset, whence))

    def read(self, size: int | None = -1, /) -> bytes:
        with _explained(self._address):
            return bytes(self._opened.read(-1 if size is None else size))

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _address(location: str) -> _Address:
    steps = [step for step in location.removeprefix(SCHEME).split("/") if step]
    kind = _TYPES[steps.pop(0)] if steps and steps[0] in _TYPES else "model"
    if len(steps) < 2:
        raise SourceError(f"{location!r} names no repository: give hf://datasets/OWNER/NAME/PATH")
    name, _, revision = steps[1].partition("@")
    return _Address(kind, f"{steps[0]}/{name}", revision.replace("%2F", "/") or None, "/".join(steps[2:]))


def _commit(address: _Address) -> tuple[Any, str]:
    """Return the Hub's client, and the commit that a revision is at now."""
    from huggingface_hub import HfApi

    api = HfApi()
    info = _asked(lambda: api.repo_info(address.repository, repo_type=address.kind, revision=address.revision))
    return api, str(info.sha)


def _asked(question: Callable[[], _Answer]) -> _Answer:
    """Ask the Hub, and again while it does not answer as it should: its own client does that for pieces of files alone."""
    patient = Retrying(
        retry=retry_if_exception(_may_pass), stop=stop_after_attempt(ATTEMPTS), wait=_pause_s, reraise=True
    )
    return patient(question)


def _may_pass(error: BaseException) -> bool:
    """Say whether an error may be gone at the next attempt."""
    answer = getattr(error, "response", None)
    if answer is None:
        return type(error).__module__.partition(".")[0] in _CLIENTS
    return answer.status_code in _PASSING


def _pause_s(state: RetryCallState) -> float:
    """Return how long to wait: as long as the Hub says, which counts in windows of minutes, or else longer each time."""
    answer = getattr(state.outcome and state.outcome.exception(), "response", None)
    if answer is not None:
        left = re.search(r"\bt=(\d+)", answer.headers.get("ratelimit", "")) if answer.status_code == TOO_MANY else None
        asked = left[1] if left else answer.headers.get("retry-after", "")
        if asked.isdigit():
            return min(float(asked), LONGEST_WINDOW_S) + 1.0
    return wait_exponential_jitter(initial=FIRST_WAIT_S, max=LONGEST_WAIT_S)(state)


def _file(address: _Address, commit: str, entry: Any) -> InputFile:
    return InputFile(
        address.at(address.revision, entry.path), address.at(commit, entry.path), entry.size, str(entry.blob_id)
    )


@contextmanager
def _explained(address: _Address) -> Iterator[None]:
    """Turn an error of the Hub into one message; what it says itself may name a token."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository = address.at(address.revision, "")
    try:
        yield
    except OfflineModeIsEnabled:
        raise SourceError(
            f"{repository} cannot be read: HF_HUB_OFFLINE is set; unset it where the engine runs"
        ) from None
    except (GatedRepoError, RepositoryNotFoundError):
        raise SourceError(
            f"{repository} cannot be read: there is no such repository, or it is not open to everybody: check its name, and set "
            "HF_TOKEN where the engine and its workers run"
        ) from None
    except (RevisionNotFoundError, EntryNotFoundError, FileNotFoundError):
        raise SourceError(f"there is no such revision or path: {address.at(address.revision, address.path)}") from None
    except Exception as error:  # of whichever HTTP library the Hub's client uses
        if isinstance(error, EngineError):
            raise
        raise SourceError(
            f"{repository} cannot be read ({type(error).__name__}): the Hub does not answer as it should; run the same command again "
            "in a while"
        ) from None
