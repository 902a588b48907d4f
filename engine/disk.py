"""A disk: what is at a path, and what it means when the disk does not say."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from engine.errors import ConfigError, EngineError

_ALMOST = re.compile(r"(s3|gs|az|hf|https?|file|memory):(?!//)")
"""How what should be an address begins, with too few slashes: as a path it would be a folder `s3:` of the current one."""
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Of an error: there is no such file or folder."""
_OF_CONTENT = (None, errno.ENOENT, errno.EINVAL)
"""Numbers of errors that are no trouble of the disk: Arrow's own have none, and damaged files lead to places that no file has."""
_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "a file may not grow that large here: raise the limit, or lower --shard-rows for a new output",
    errno.EACCES: "permission denied: make the folder writable and run the same command again",
    errno.EPERM: "not permitted (a file system without hard links?): use an output folder on a local disk",
    errno.EROFS: "the file system is read-only: use another output folder",
    errno.EIO: "the disk reports an input/output error: check it, then run the same command again",
}
_UNREADABLE = "permission denied: make all that is in the folder readable for this user and run the same command again"


def expanded(path: str) -> Path:
    """
    Return a path as it is named from anywhere; `~` is the home folder, and file:// may stand before it.

    Raises:
        ConfigError: If it begins with the home folder of a user that there is not, or almost as an address does.
    """
    if almost := _ALMOST.match(path):
        raise ConfigError(
            f"{path} is no address, which begins with {almost[0]}//, and hardly a path: correct it; ./{path} if it is one"
        )
    try:
        return Path(path.removeprefix("file://")).expanduser().absolute()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no such user's home folder here; give the whole path") from None


def kind_of(path: str | Path, error: type[ConfigError] = ConfigError) -> Literal["file", "folder", "other"] | None:
    """
    Say what is at a path, or where a link there leads; None if nothing is.

    Args:
        path: To look at.
        error: Raised if that cannot be told: something may be there, and is not to be taken for missing.
    """
    try:
        mode = Path(path).stat().st_mode
    except ValueError:  # no path at all: it has a zero byte
        return None
    except OSError as why:
        if why.errno in _ABSENT:
            return None
        raise error(
            f"{path} cannot be looked at ({why.strerror}): check the path, and that this user may enter the folders above it"
        ) from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def real(path: str | Path) -> Path:
    """Return where the links of a path lead; one that leads to itself stays as it is."""
    return Path(os.path.realpath(path))


def is_trouble(error: Exception) -> bool:
    """Say whether the disk failed, which says nothing of what is in the file."""
    return isinstance(error, OSError) and error.errno not in _OF_CONTENT


def cannot(verb: str, root: str, error: Exception) -> EngineError:
    """Make one message of trouble with an output, which says what to do; what was committed is untouched by it."""
    number = getattr(error, "errno", None) or 0
    advice = _ADVICE.get(number, "check the disk, then run the same command again")
    if number == errno.EACCES and verb in ("read", "list"):
        advice = _UNREADABLE
    why = os.strerror(number) if number else type(error).__name__
    return EngineError(f"cannot {verb} {root} ({why}): {advice}; all that was committed is kept")


@contextmanager
def advised(advice: str) -> Iterator[None]:
    """Add what else can be done to the message of trouble with an output; errors of other kinds say it themselves."""
    try:
        yield
    except EngineError as error:
        if type(error) is not EngineError:
            raise
        raise EngineError(f"{error.message}. {advice}") from None


@contextmanager
def explained(root: str, verb: str = "write to") -> Iterator[None]:
    """Turn an OSError of an output into one message."""
    try:
        yield
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        raise cannot(verb, root, error) from None
