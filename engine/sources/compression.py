"""Compressed inputs: gzip and Zstandard, told by the end of a name, decoded as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from engine.schema import InputFile
from engine.sources.opening import open_input

CODECS = {".gz": "gzip", ".zst": "zstd"}


def bare_name(path: str) -> tuple[str, str | None]:
    """Return a name in lower case without the ending of a compression, and the codec of that, if there is one."""
    name = path.lower()
    for suffix, codec in CODECS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), codec
    return name, None


@contextmanager
def open_decoded(file: InputFile) -> Iterator[pa.NativeFile]:
    """Open an input as the bytes that it holds. Only one that is not compressed can seek."""
    codec = bare_name(file.path)[1]
    with open_input(file) as raw:
        if codec is None:
            yield raw
            return
        with pa.CompressedInputStream(raw, codec) as stream:
            yield stream
