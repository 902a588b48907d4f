"""An object as a file: pieces of it by requests for a range, all of one version."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from engine.buckets.bucket import Bucket, Found

AHEAD_BYTES = 4 * 1024**2
"""Read at once of a file that is read from front to back."""


class RangedFile(io.RawIOBase):
    """
    An object, opened to read pieces of it, each by one request; small ones that follow each other share a larger request.

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
        self._ahead = b""
        self._ahead_start = 0
        self._last_stop = -1

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
        data = self._from_ahead(size)
        if len(data) < size:
            data += self._request(size - len(data))
        return data

    def readall(self) -> bytes:
        """Return all that is left."""
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        """Read into a buffer."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _from_ahead(self, size: int) -> bytes:
        """Return what is here already of the next bytes."""
        start = self._position - self._ahead_start
        data = self._ahead[start : start + size] if start >= 0 else b""
        self._position += len(data)
        return data

    def _request(self, size: int) -> bytes:
        """Ask for the next bytes, and for more than those if they follow what was asked for last."""
        start = self._position
        asked = max(size, AHEAD_BYTES) if start == self._last_stop else size
        stop = min(start + asked, self._found.size)
        try:
            data = self._bucket.read_range(self._found.key, start, stop, self._found.e_tag)
        except FileNotFoundError:
            data = None
        if data is None or len(data) != stop - start:
            raise self._changed() from None
        self._last_stop = stop
        if asked > size:
            self._ahead, self._ahead_start = data, start
        self._position += size
        return data[:size]
