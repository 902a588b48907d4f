"""
Buckets: places in object stores, connected to with what the environment says, and what their errors mean.

    s3://bucket/prefix        AWS_*: any endpoint, so MinIO and R2 too
    gs://bucket/prefix        GOOGLE_*
    az://container/prefix     AZURE_STORAGE_*; also abfs[s]://container@account.dfs.core.windows.net/prefix

Keys come from the environment, or the role of the machine, wherever a bucket is opened: they are in no location, and an error of a
store, which may quote what was sent, is never shown.
"""

from __future__ import annotations

import io
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import ConfigError, EngineError, Refused

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_Answer = TypeVar("_Answer")

SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "azure": "az", "abfs": "az", "abfss": "az"}
"""What locations begin with, and the kind of store that it stands for."""
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
_PASSING = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class Place:
    """A prefix of a bucket, or a key in it."""

    kind: str
    """s3, gs or az."""
    bucket: str
    key: str
    account: str = ""
    """Of Azure, if the location names it."""

    @property
    def root(self) -> str:
        """The bucket as a location."""
        if self.account:
            return f"abfss://{self.bucket}@{self.account}.dfs.core.windows.net"
        return f"{self.kind}://{self.bucket}"

    @property
    def location(self) -> str:
        """The place in its one spelling."""
        return f"{self.root}/{self.key}" if self.key else self.root


@dataclass(frozen=True, slots=True)
class Found:
    """An object, as a store lists it."""

    key: str
    size: int
    e_tag: str
    """Without quotes, which some stores put around it in one answer and not in another; empty if the store has none."""
    modified_at: float
    """Seconds since 1970, by the store's clock."""


def is_bucket(location: str) -> bool:
    """Say whether a location is one in an object store."""
    scheme, separator, _ = location.partition("://")
    return bool(separator) and scheme.lower() in SCHEMES


def place_of(location: str) -> Place:
    """
    Read a location.

    Raises:
        ConfigError: If it is none, or has keys in it.
    """
    scheme, _, rest = location.partition("://")
    kind = SCHEMES[scheme.lower()]
    bucket, _, key = rest.partition("/")
    account = ""
    if kind == "az" and "@" in bucket:
        bucket, _, host = bucket.partition("@")
        account = host.partition(".")[0]
    if "@" in bucket or ":" in bucket or (kind == "az" and re.search(r"\?.*sig=", rest)):
        raise ConfigError(
            f"a location in {kind}:// has keys in it, and they would be written into records: leave them out, and set them "
            "in the environment of all that run"
        )
    steps = key.strip("/").split("/")
    if not bucket or (key.strip("/") and any(step in ("", ".", "..") for step in steps)):
        raise ConfigError(
            f"{location!r} is not a place in a bucket: give {kind}://BUCKET/FOLDER, with one / between names"
        )
    return Place(kind, bucket, "/".join(steps), account)


class Bucket:
    """
    An object store's bucket. What fails and may pass is tried again for a while; what remains is one error.

    Args:
        place: In the bucket; its key is not looked at.
    """

    def __init__(self, place: Place) -> None:
        self.root = place.root
        self._once, self._patient = _connected(place.root, place, _environment(), PATIENCE_S)

    def read(self, key: str) -> bytes:
        """Return the bytes of an object; raise FileNotFoundError if it is not there."""
        return self._persistently("read", lambda: bytes(self._patient.get(key).bytes()))

    def read_range(self, key: str, start: int, stop: int, e_tag: str) -> bytes | None:
        """Return some bytes of an object, if it still has that e-tag (an empty one fits all), else None; raise FileNotFoundError if it is gone."""
        from obstore.exceptions import PreconditionError

        options: Any = {"range": (start, stop)}
        if e_tag:
            options["if_match"] = f'"{e_tag}"'
        try:
            return self._persistently("read", lambda: bytes(self._patient.get(key, options=options).bytes()))
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
                    raise _TurnedAway from None
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
        ends = time.monotonic() + PATIENCE_S
        wait = FIRST_WAIT_S
        while True:
            with self._explained(verb):
                try:
                    return act()
                except Exception as error:
                    pause = random.uniform(wait / 2, wait)  # noqa: S311 - so that many do not come back at once
                    if not _may_pass(error) or time.monotonic() + pause > ends:
                        raise
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT_S)

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        """Turn an error of the store into one message that says what to do."""
        from obstore.exceptions import BaseError, PreconditionError

        try:
            yield
        except FileNotFoundError as error:
            if _code(error) in _ADVICE or verb == "write to":
                raise _explanation(error, verb, self.root) from None
            raise FileNotFoundError(self.root) from None
        except PreconditionError:
            raise
        except (BaseError, ValueError, _TurnedAway) as error:
            raise _explanation(error, verb, self.root) from None


class RangedFile(io.RawIOBase):
    """
    An object, opened to read pieces of it, each by one request.

    Args:
        bucket: That it is in.
        found: The object; what was written over it since is not read.
        changed: Makes the error for an object that is another by now, or gone.
    """

    def __init__(self, bucket: Bucket, found: Found, changed: Callable[[], Exception]) -> None:
        super().__init__()
        self._bucket = bucket
        self._found = found
        self._changed = changed
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, as in any file."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._found.size}[whence]
        self._position = max(origin + offset, 0)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next `size` bytes, or all that are left; fewer only at the end."""
        left = max(self._found.size - self._position, 0)
        size = left if size is None or size < 0 else min(size, left)
        if not size:
            return b""
        try:
            data = self._bucket.read_range(self._found.key, self._position, self._position + size, self._found.e_tag)
        except FileNotFoundError:
            data = None
        if data is None or len(data) != size:
            raise self._changed() from None
        self._position += size
        return data

    def readall(self) -> bytes:
        """Return all that is left."""
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        """Read into a buffer."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _found(meta: Mapping[str, Any]) -> Found:
    return Found(meta["path"], meta["size"], (meta["e_tag"] or "").strip('"'), meta["last_modified"].timestamp())


def _environment() -> int:
    """Return what changes when the environment does: keys are renewed in a notebook, and the next run goes by the new ones."""
    known = ("AWS_", "GOOGLE_", "AZURE_")
    return hash(tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(known))))


@lru_cache(maxsize=16)
def _connected(root: str, place: Place, _settings: int, patience_s: float) -> tuple[ObjectStore, ObjectStore]:
    """Connect twice: for what may be done once, and for what a library may do again by itself."""
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
        return _store(place, {"max_retries": 0}), _store(place, patient)
    except (BaseError, ValueError) as error:
        raise _explanation(error, "open", root) from None


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


class _TurnedAway(Exception):
    """An object could not be created and is not there: of several that write at once all may be turned away."""


def _may_pass(error: Exception) -> bool:
    """Say whether what failed may work in a moment."""
    from obstore.exceptions import AlreadyExistsError, GenericError

    if isinstance(error, (_TurnedAway, AlreadyExistsError)):  # the second, 409, also where no condition was asked for
        return True
    if not isinstance(error, GenericError) or _has_no_keys(error):
        return False
    status = _status(error)
    return status in _PASSING if status else "HTTP error" in str(error)


def _status(error: Exception) -> int:
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found.group(1)) if found else 0


def _code(error: Exception) -> str:
    """Return the name that the store has for an error; empty if it gave none."""
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return found.group(1) if found else ""


def _has_no_keys(error: Exception) -> bool:
    """Say whether it was the role of the machine that was asked for keys, in vain: the last place that a library looks at."""
    said = str(error)
    return any(sign in said for sign in ("/latest/api/token", "/latest/meta-data", "token request", "MissingAccount"))


_EXPIRED = "its credentials have expired: renew them where the engine and its workers run"
_UNKNOWN = "the store does not accept the credentials: set the right ones where the engine and its workers run"
_DENIED = "permission denied: the credentials need the right to list, read, create and delete there"
_NO_BUCKET = "there is no such bucket: create it, or check the name, the endpoint and the region"
_REGION = "the bucket is in another region, or at another endpoint: set AWS_REGION, or AWS_ENDPOINT_URL"
_CLOCK = "the clock of this machine is wrong: set it"
_BUSY = "the store did not answer, or asked to slow down, for {patience:g} s: let it recover"
_NO_KEYS = (
    "no credentials were found: set them in the environment of the engine and its workers (docs/object-stores.md), "
    "or give the machines a role"
)
_ADVICE = {
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"), _EXPIRED),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthenticationFailed"), _UNKNOWN),
    **dict.fromkeys(("NoSuchBucket", "ContainerNotFound", "InvalidBucketName"), _NO_BUCKET),
    **dict.fromkeys(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"), _REGION
    ),
    "RequestTimeTooSkewed": _CLOCK,
}
_NO_CONDITIONS = (
    "the store cannot refuse to overwrite an object (PUT with If-None-Match): use one that can, or --unsafe-single-writer if only "
    "one run will ever write there at a time"
)
_OF_STATUS = {401: _UNKNOWN, 403: _DENIED, 301: _REGION, 507: "the store is full: free some space"}


def _explanation(error: Exception, verb: str, root: str) -> EngineError:
    """Say what is wrong, and what to do, without a word of what the store said."""
    code, status = _code(error), _status(error)
    what = f"{code or type(error).__name__}{f', {status}' if status else ''}"
    if _has_no_keys(error):
        return ConfigError(f"cannot {verb} {root}: {_NO_KEYS}")
    advice = _ADVICE.get(code) or _OF_STATUS.get(status)
    if advice is None and "redirect without LOCATION" in str(error):
        advice = _REGION
    if advice is None and (isinstance(error, FileNotFoundError) or status == 404):
        advice = _NO_BUCKET
    if advice is None and isinstance(error, ValueError):
        advice = "an object's name has an empty, `.` or `..` step, which cannot be asked for: rename it"
    if advice is None:
        advice = (
            _BUSY.format(patience=PATIENCE_S) if _may_pass(error) else "the store refuses the request: see its logs"
        )
    if status == 501:
        return Refused(f"cannot {verb} {root} ({what}): {_NO_CONDITIONS}")
    if advice in (_NO_BUCKET, _REGION):
        return ConfigError(f"cannot {verb} {root} ({what}): {advice}")
    return EngineError(
        f"cannot {verb} {root} ({what}): {advice}, then run the same command again; all that was committed is kept"
    )
