"""The inventory of a source: which files it names, and what identifies each of them."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.disk import expanded, kind_of, real
from engine.errors import SourceError
from engine.schema import InputFile
from engine.sources.formats import SUFFIXES, is_input
from engine.sources.opening import MEMORY, local_version
from engine.sources.remote import exists, is_remote, joined, list_remote, normalized

SPLITS = "dataset_dict.json"
"""What is in a folder that a DatasetDict was saved to."""
LOST = "lost+found"
"""At the root of a disk: the file system's own, for root alone."""
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Of an error: there is no such file or folder."""
_UNMATCHED = (*_ABSENT, errno.ENAMETOOLONG)
"""So end the paths that a pattern leads along, where a link leads to a folder above."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """All files of a job's source, in the order of their paths, which are relative to `base`."""

    base: str
    files: tuple[InputFile, ...]


def list_inputs(sources: Sequence[str], *, outside: str | None = None) -> Inventory:
    """
    List the files that `sources` name: files, folders (all below them that a reader knows by name) and globs.

    Names that begin with a dot or an underscore are left out of folders, as all readers of Parquet folders do. A file that
    is named twice counts once. The base is the nearest folder above everything, so that it does not depend on the order.

    Args:
        sources: Paths or patterns, all on this machine or all in one bucket; `~` is the home folder, `**` any depth.
        outside: The output's folder: neither may lie where the other is looked for, since a run would embed what it writes.

    Raises:
        SourceError: If a source names nothing, a folder of it cannot be listed, or source and output are not apart.
    """
    if any(is_remote(source) for source in sources):
        return Inventory(*list_remote(sources, is_input, outside))
    found: dict[str, os.stat_result] = {}
    roots: list[str] = []
    real: set[str] = set()
    for source in sources:
        root, paths = _expand(source)
        roots.append(root)
        for path in paths:
            target = os.path.realpath(path)
            if path in found or target not in real:  # a link to a file that is there already would double its rows
                found[path] = _stat(path)
                real.add(target)
    if outside and not is_remote(outside):
        walked = [
            root
            for source, root in zip(sources, roots, strict=True)
            if "**" in source or kind_of(absolute(source), SourceError) == "folder"
        ]
        _refuse_inside(found, walked, outside)
    base = os.path.commonpath(sorted(roots))
    files = (
        InputFile(Path(path).relative_to(base).as_posix(), path, status.st_size, local_version(status.st_mtime_ns))
        for path, status in sorted(found.items())
    )
    return Inventory(base, tuple(files))


def absolute(source: str) -> str:
    """Return a source as it is named from anywhere."""
    if source.startswith(MEMORY):
        return source
    if is_remote(source):
        return normalized(source) + "/" * source.endswith("/")
    return os.path.normpath(expanded(source))


def location_of(base: str, path: str) -> str:
    """Return where the input of that path lies."""
    return joined(base, path) if is_remote(base) else str(Path(base, path))


def is_there(base: str, path: str) -> bool:
    """Say whether there is an input of that path, or something there that cannot be looked at."""
    if is_remote(base):
        return exists(joined(base, path))
    try:
        return Path(base, path).exists()
    except OSError:
        return True


def _expand(source: str) -> tuple[str, list[str]]:
    """Return the root that a source's paths are relative to, and the absolute paths of its files."""
    if "://" in source and not source.startswith("file://"):
        raise SourceError(
            f"source {source.partition('://')[0]}://: only files, folders and globs on disks, in s3://, gs:// and az:// and on "
            "hf:// can be read"
        )
    path = absolute(source)
    kind = kind_of(path, SourceError)
    if kind == "folder":
        _refuse_splits(path, source)
        paths = sorted(_below(path))
        if not paths:
            raise SourceError(f"the folder {source!r} holds no files of a known format ({', '.join(SUFFIXES)})")
        return path, paths
    if kind == "file":
        return str(Path(path).parent), [path]
    if not glob.has_magic(path):
        raise SourceError(f"there is no file or folder {source!r}; check the path (globs need quotes)")
    steps = Path(path).parts
    fixed = next(number for number, step in enumerate(steps) if glob.has_magic(step))
    root = str(Path(*steps[:fixed]))
    paths = sorted(match for match in _matches(root, steps[fixed:]) if _is_file(match))
    if not paths:
        raise SourceError(f"no files match {source!r}")
    return root, paths


def _refuse_splits(folder: str, source: str) -> None:
    """Refuse what a DatasetDict of Hugging Face was saved to: its splits are several sources, not one."""
    if kind_of(Path(folder, SPLITS), SourceError) != "file":
        return
    splits = sorted(path.parent.name for path in Path(folder).glob("*/state.json"))
    raise SourceError(
        f"the folder {source!r} holds a Hugging Face DatasetDict of several splits ({', '.join(splits)}): name one, "
        f"such as {source.rstrip('/')}/{splits[0] if splits else 'train'}, or several with --source for each"
    )


def _below(folder: str) -> Iterator[str]:
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, onerror=_refuse_unreadable, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link to a folder above, or a second way to the same files
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in names:
            if is_input(name) and not name.startswith((".", "_")):
                yield str(Path(where, name))


def _matches(folder: str, steps: Sequence[str]) -> Iterator[str]:
    """
    Yield the paths that the steps of a pattern match below a folder, some of them twice, and some that are not there.

    The rules are those of `glob`, but that takes a folder that cannot be listed for an empty one.
    """
    step, rest = steps[0], steps[1:]
    if not glob.has_magic(step):
        path = str(Path(folder, step))
        yield from _matches(path, rest) if rest else (path,)
        return
    if step == "**" and rest:
        yield from _matches(folder, rest)
    for name, is_file in _listed(folder):
        path = str(Path(folder, name))
        if name.startswith(".") and not step.startswith("."):
            continue
        if not rest and fnmatch.fnmatch(name, step):
            yield path
        if step == "**" and not is_file:
            yield from _matches(path, steps)
        elif rest and not is_file and fnmatch.fnmatch(name, step):
            yield from _matches(path, rest)


def _listed(folder: str) -> list[tuple[str, bool]]:
    """Return the names in a folder, and of each whether it is a file, and surely no folder."""
    try:
        with os.scandir(folder) as entries:
            return [(entry.name, entry.is_file(follow_symlinks=False)) for entry in entries]
    except OSError as error:
        _refuse_unreadable(error, _UNMATCHED)
        return []


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except OSError as error:
        _refuse_unreadable(error, _UNMATCHED)
        return False


def _refuse_unreadable(error: OSError, absent: Sequence[int] = _ABSENT) -> None:
    """Raise SourceError for what is there and cannot be looked at: inputs in it would be missing from the output, and nobody told."""
    if error.errno not in absent and Path(str(error.filename)).name != LOST:
        raise SourceError(
            f"{error.filename} cannot be read ({error.strerror}), so the files of the source cannot be told: make it readable, or name "
            "sources without it"
        ) from None


def _stat(path: str) -> os.stat_result:
    if not path.isascii() and path.encode(errors="replace").decode() != path:
        raise SourceError(f"the name of the input {path!a} is not UTF-8: rename it, or leave it out of the source")
    try:
        return Path(path).stat()
    except OSError as error:
        raise SourceError(f"the input {path} cannot be read: {error.strerror}") from None


def _refuse_inside(paths: Iterable[str], walked: Iterable[str], output: str) -> None:
    folder = real(expanded(output))
    for path in paths:
        if folder in real(path).parents:
            raise SourceError(
                f"the input {path} lies inside the output {output}: a run would embed its own output; "
                "put the output beside the source, not above it"
            )
    for root in walked:
        if real(root) in folder.parents:
            raise SourceError(
                f"the output {output} lies inside the source folder {root}: the next run would take its parts for inputs; "
                "put the output beside the source"
            )
