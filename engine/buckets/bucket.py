"""
A bucket: read, list, create, replace, delete, again and again while a store fails.

It is connected to with what the environment says where it is opened, or with the role of the machine: AWS_*, GOOGLE_*, AZURE_STORAGE_*.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from engine.buckets.place import Place
from engine.buckets.trouble import TurnedAway, explanation, is_known, may_pass

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_Answer = TypeVar("_Answer")

PATIENCE_S = 120.0
"""For which a store that fails is asked again, before the run ends with its error; what is asked is whole each time."""
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
REQUEST_TIMEOUT_S = 300
"""For a whole request: a part of 100 MB over a slow line."""
CONNECT_TIMEOUT_S = 10
LISTED_AT_ONCE = 1000
WRITER = "enginewriter"
"""Metadata of what was created: who did. An answer may be lost, and "it is there already" may be one's own."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object, as a store lists it."""

    key: str
    size: int
    e_tag: str
    """Without quotes, which some stores put around it in one answer and not in another; empty if the store has none."""
    modified_at: float
    """Seconds since 1970, by the store's clock."""


class Bucket:
    """
    An object store's bucket. What fails and may pass is tried again for a while; what remains is one error.

    Args:
        place: In the bucket; its key is not looked at.
    """

    def __init__(self, place: Place) -> None:
        self.root = place.root
        self._once, self._patient = _connected(replace(place, key=""), _environment(), PATIENCE_S)

    def read(self, key: str) -> bytes:
        """Return the bytes of an object; raise FileNotFoundError if it is not there."""
        return self._persistently("read", lambda: bytes(self._patient.get(key).bytes()))

    def read_range(self, key: str, start: int, stop: int, e_tag: str) -> bytes | None:
        """Return some bytes of an object, if it still has that e-tag (an empty one fits all), else None; raise FileNotFoundError if it is gone."""
        from obstore.exceptions import PreconditionError

        options: Any = {"range": (start, stop)}
        if e_tag:
            options["if_match"] = f'"{e_tag}"'

        def get() -> bytes | None:
            answer = self._patient.get(key, options=options)
            is_same = not e_tag or _found(answer.meta).e_tag in ("", e_tag)  # not every store heeds If-Match
            return bytes(answer.bytes()) if is_same else None

        try:
            return self._persistently("read", get)
        except PreconditionError:
            return None

    def look(self, key: str) -> Found | None:
        """Return what is known of an object, or None if it is not there."""
        try:
            return self._persistently("read", lambda: _found(self._patient.head(key)))
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[Found]:
        """Yield all objects below a prefix, which ends where a name does, as pages of the listing come in."""
        with self._explained("list"):
            for page in self._patient.list(prefix or None, chunk_size=LISTED_AT_ONCE):
                yield from map(_found, page)

    def create(self, key: str, data: bytes) -> bool:
        """
        Create an object, whole, or return False if it is there already.

        The answer is true even where the store's was lost: an object says who wrote it.
        """
        from obstore.exceptions import AlreadyExistsError, NotModifiedError, PreconditionError

        writer = uuid.uuid4().hex

        def put() -> bool:
            try:
                self._once.put(key, data, mode="create", use_multipart=False, attributes={WRITER: writer})
            except (AlreadyExistsError, PreconditionError, NotModifiedError):
                try:
                    there = self._once.get(key, options={"head": True})
                except FileNotFoundError:
                    raise TurnedAway from None
                return there.attributes.get(WRITER) == writer
            return True

        return self._persistently("write to", put)

    def replace(self, key: str, data: bytes) -> None:
        """Put an object, whole, whatever was there."""
        self._persistently("write to", lambda: self._once.put(key, data, use_multipart=False))

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        try:
            self._persistently("delete from", lambda: self._once.delete(key))
        except FileNotFoundError:
            return

    def _persistently(self, verb: str, act: Callable[[], _Answer]) -> _Answer:
        """Do something again and again, while it fails with what may pass and the time is not up."""
        patient = Retrying(
            retry=retry_if_exception(may_pass),
            stop=stop_before_delay(PATIENCE_S),
            wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S, min=FIRST_WAIT_S / 2),
            reraise=True,
        )
        with self._explained(verb):
            return patient(act)

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        """Turn an error of the store into one message that says what to do."""
        from obstore.exceptions import BaseError, PreconditionError

        try:
            yield
        except FileNotFoundError as error:
            if verb == "write to" or is_known(error):
                raise explanation(error, verb, self.root, PATIENCE_S) from None
            raise FileNotFoundError(self.root) from None
        except PreconditionError:
            raise
        except (BaseError, ValueError, TurnedAway) as error:
            raise explanation(error, verb, self.root, PATIENCE_S) from None


def _found(meta: Mapping[str, Any]) -> Found:
    return Found(meta["path"], meta["size"], (meta["e_tag"] or "").strip('"'), meta["last_modified"].timestamp())


def _environment() -> int:
    """Return what changes when the environment does: keys are renewed in a notebook, and the next run goes by the new ones."""
    known = ("AWS_", "GOOGLE_", "AZURE_")
    return hash(tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(known))))


@lru_cache(maxsize=16)
def _connected(bucket: Place, _settings: int, patience_s: float) -> tuple[ObjectStore, ObjectStore]:
    """
    Connect twice: for what may be done once, and for what a library may do again by itself.

    All objects of a bucket share both: connections, and what a role gives for a while, are asked for once.
    """
    from obstore.exceptions import BaseError

    patient = {
        "max_retries": 100,
        "retry_timeout": timedelta(seconds=patience_s),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_WAIT_S),
            "max_backoff": timedelta(seconds=LONGEST_WAIT_S),
            "base": 2,
        },
    }
    try:
        return _store(bucket, {"max_retries": 0}), _store(bucket, patient)
    except (BaseError, ValueError) as error:
        raise explanation(error, "open", bucket.root, patience_s) from None


def _store(place: Place, retry_config: Any) -> ObjectStore:
    from obstore.store import AzureStore, GCSStore, S3Store

    options: Any = {"timeout": f"{REQUEST_TIMEOUT_S}s", "connect_timeout": f"{CONNECT_TIMEOUT_S}s"}
    endpoints = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT")
    if any(os.environ.get(name, "").startswith("http://") for name in endpoints):
        options["allow_http"] = True  # who names such an endpoint means it
    shared = {"client_options": options, "retry_config": retry_config}
    if place.kind == "s3":
        # One at a time by a plain DELETE, which every store knows and none charges for.
        return S3Store(place.bucket, disable_bulk_delete=True, **shared)
    if place.kind == "gs":
        return GCSStore(place.bucket, **shared)
    account: Any = {"account_name": place.account} if place.account else {}
    return AzureStore(place.bucket, **account, **shared)
