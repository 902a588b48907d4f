"""
A place: a prefix of a bucket, or a key in it.

    s3://bucket/prefix        any endpoint, so MinIO and R2 too
    gs://bucket/prefix
    az://container/prefix     also abfs[s]://container@account.dfs.core.windows.net/prefix

Keys to a store are in no location.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import ConfigError

SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "azure": "az", "abfs": "az", "abfss": "az"}
"""What locations begin with, and the kind of store that it stands for."""


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
    if "@" in bucket or ":" in bucket or re.search(r"[?&](sig|X-Amz-Signature|X-Goog-Signature)=", rest):
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
