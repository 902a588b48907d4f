"""What no option may hold, since options are stored with the output: a secret; and arguments of a custom model are JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_SECRET_NAME = re.compile(
    r"api[-_]?keys?|secret|passw|pwd|credential|authorization|bearer|cookie|dsn|connection[-_]string"
    r"|(access|auth|hf|id|api|refresh)[-_]?tokens?|(^|[-_])(token|auth|key)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(sk-|hf_|ghp_|xox[a-z]-)[A-Za-z0-9_-]{8,}|AKIA[0-9A-Z]{16}|^Bearer |://[^/\s:@]+:[^/\s@]+@"
)
_LONG_NAME = re.compile(r"[A-Za-z0-9_-]{32,}")
"""What keys without a known beginning look like, and hardly a file's name."""
_CAMEL = re.compile(r"([a-z0-9])([A-Z])")


def check_arguments(arguments: dict[str, Any]) -> None:
    """
    Make sure that arguments are JSON, and that none of them looks like a key.

    Raises:
        ValueError: Names the argument, and never its value.
    """
    advice = "and arguments are stored with the output; let the model read it from the environment of its worker"
    for name, item in _leaves("", arguments):
        if _SECRET_NAME.search(_CAMEL.sub(r"\1_\2", name)):
            raise ValueError(f"{name!r} looks like a secret, {advice}")
        if isinstance(item, str) and _SECRET_VALUE.search(item):
            raise ValueError(f"the value of {name!r} looks like a secret, {advice}")
        if not isinstance(item, (str, int, float, bool, type(None))):
            raise ValueError(f"{name!r} is a {type(item).__name__}, which JSON does not have; quote it")  # noqa: TRY004 - pydantic's way


def has_key(address: str) -> bool:
    """Say whether a path of an address, or another part of it, looks like a key."""
    return _SECRET_VALUE.search(address) is not None


def is_key(name: str) -> bool:
    """Say whether what should be a file's name looks like a key itself; none that has its folder does."""
    return "/" not in name and bool(_SECRET_VALUE.match(name) or _LONG_NAME.fullmatch(name))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each name in nested arguments with its value, containers' as None."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key), None
            yield from _leaves(str(key), item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(name, item)
    else:
        yield name, value
