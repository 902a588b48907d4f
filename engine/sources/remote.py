"""Sources that are not on a disk: what a bucket or the Hugging Face Hub lists, and how an object is opened and told from another."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.buckets.bucket import Bucket, Found
from engine.buckets.place import Place, is_bucket, place_of
from engine.buckets.ranged_file import RangedFile
from engine.errors import SourceChanged, SourceError
from engine.schema import InputFile
from engine.sources import hub

_NO_E_TAG = "@"
"""What a version begins with that is a time, of a store that has no e-tags."""


def is_remote(location: str) -> bool:
    """Say whether a location is not one of this machine."""
    return is_bucket(location) or hub.is_hub(location)


def normalized(source: str) -> str:
    """Return the one spelling of a location."""
    return hub.normalized(source) if hub.is_hub(source) else place_of(source).location


def joined(base: str, path: str) -> str:
    """Return the location of what lies at `path` below a base."""
    return f"{base.rstrip('/')}/{path}"


@dataclass(frozen=True, slots=True)
class _Listed:
    """What one source names."""

    root: str
    """What its paths are relative to."""
    files: dict[str, InputFile]
    """By location, with that as path."""
    is_walked: bool
    """Whether files of any depth below the root are taken."""


def list_remote(
    sources: Sequence[str], is_input: Callable[[str], bool], outside: str | None
) -> tuple[str, tuple[InputFile, ...]]:
    """
    List what `sources` name in one bucket, or in one repository of the Hub: objects, prefixes and globs.

    Args:
        sources: All of the same place.
        is_input: Says of a name whether a file below a prefix is taken.
        outside: The output.

    Returns:
        The base that paths are relative to, and the files in the order of their paths.

    Raises:
        SourceError: If a source names nothing, sources are of several places, or output and sources are not apart.
    """
    stores = {_store_of(source) if is_remote(source) else "this machine" for source in sources}
    if len(stores) > 1:
        raise SourceError(
            f"the sources are in several places ({', '.join(sorted(stores))}): a job reads from one; give each its own output"
        )
    listed = [_list(normalized(source), is_folder=source.endswith("/"), is_input=is_input) for source in sources]
    found = {location: file for one in listed for location, file in one.files.items()}
    if outside and is_bucket(outside):
        walked = [one.root for one in listed if one.is_walked]
        _refuse_inside(found, walked, place_of(outside).location)
    base = _common([one.root for one in listed])
    paths = {location: location.removeprefix(base + "/") for location in found}
    files = (
        InputFile(paths[location], file.location, file.size, file.version)
        for location, file in sorted(found.items(), key=lambda item: paths[item[0]])
    )
    return base, tuple(files)


def open_remote(file: InputFile, *, is_pinned: bool = False) -> Any:
    """
    Open an input to read pieces of it; what was written over it since it was listed is not read, but raises SourceChanged.

    Args:
        file: Its size and version are those of its object, unless it is pinned.
        is_pinned: Its name says what it is, so that it can be no other.
    """
    if hub.is_hub(file.location):
        return hub.open_file(file, lambda: changed(file))
    place = place_of(file.location)
    e_tag = "" if file.version.startswith(_NO_E_TAG) else file.version
    found = Bucket(place).look(place.key) if is_pinned else Found(place.key, file.size, e_tag, 0.0)
    if found is None:
        raise FileNotFoundError(file.location)
    return RangedFile(Bucket(place), found, lambda: changed(file))


def check_remote(file: InputFile) -> None:
    """
    Make sure that an input still is what was listed, where its store does not do so at each read.

    Raises:
        SourceChanged: If it is not.
    """
    if is_bucket(file.location) and file.version.startswith(_NO_E_TAG):
        found = Bucket(place_of(file.location)).look(place_of(file.location).key)
        if found is None or (found.size, _version(found)) != (file.size, file.version):
            raise changed(file)


def exists(location: str) -> bool:
    """Say whether something lies at a location."""
    if hub.is_hub(location):
        return hub.exists(location)
    return Bucket(place_of(location)).look(place_of(location).key) is not None


def changed(file: InputFile) -> SourceChanged:
    """Make the error for an input that is no longer what was listed."""
    return SourceChanged(
        f"the input {file.location} changed while it was being read; what was committed is kept. "
        "Let its writer finish, then run again: its new rows take the place of those of its former content"
    )


def _store_of(source: str) -> str:
    return hub.repository_of(source) if hub.is_hub(source) else place_of(source).root


def _list(source: str, *, is_folder: bool, is_input: Callable[[str], bool]) -> _Listed:
    if hub.is_hub(source):
        top, everything, one = hub.repository_of(source), hub.below, hub.look
    else:
        top, everything, one = place_of(source).root, _below, _look
    if not is_folder and source != top and (file := one(source)) is not None:
        return _Listed(source.rpartition("/")[0], {source: file}, is_walked=False)
    fixed = _fixed(source, top)
    listed = {file.path: file for file in everything(fixed)}
    if fixed == source:
        taken = {
            location: file
            for location, file in listed.items()
            if is_input(location.rpartition("/")[2]) and not _is_hidden(location.removeprefix(fixed + "/"))
        }
        if not taken:
            raise SourceError(f"there is no file {source!r}, nor one of a known format below it")
        return _Listed(source, taken, is_walked=True)
    pattern = _pattern(source.removeprefix(fixed + "/"))
    taken = {
        location: file for location, file in listed.items() if pattern.fullmatch(location.removeprefix(fixed + "/"))
    }
    if not taken:
        raise SourceError(f"no files match {source!r}")
    return _Listed(fixed, taken, is_walked="**" in source)


def _below(location: str) -> Iterator[InputFile]:
    place = place_of(location)
    prefix = f"{place.key}/" if place.key else ""
    for found in Bucket(place).list(prefix):
        if found.key.startswith(prefix):  # not what stands for the folder itself
            yield _file(place, found)


def _look(location: str) -> InputFile | None:
    place = place_of(location)
    found = Bucket(place).look(place.key)
    return _file(place, found) if found else None


def _file(place: Place, found: Found) -> InputFile:
    location = f"{place.root}/{found.key}"
    return InputFile(location, location, found.size, _version(found))


def _version(found: Found) -> str:
    return found.e_tag or f"{_NO_E_TAG}{found.modified_at}"


def _is_hidden(path: str) -> bool:
    return any(step.startswith((".", "_")) for step in path.split("/"))


def _fixed(source: str, top: str) -> str:
    """Return the steps of a pattern before the first that has a wildcard."""
    if not glob.has_magic(source.removeprefix(top)):
        return source
    steps = source.removeprefix(top).strip("/").split("/")
    number = next(number for number, step in enumerate(steps) if glob.has_magic(step))
    return "/".join((top, *steps[:number]))


def _pattern(pattern: str) -> re.Pattern[str]:
    """Translate a glob: `*`, `?` and `[]` stay in a name, `**` is any depth, and names with a leading dot are left out, as on disks."""
    steps = pattern.split("/")
    parts = [r"(?:(?!\.)[^/]+/)*" if step == "**" else _step(step) + "/" for step in steps[:-1]]
    parts.append(r"(?:(?!\.)[^/]+/)*(?!\.)[^/]+" if steps[-1] == "**" else _step(steps[-1]))
    return re.compile("".join(parts), re.DOTALL)


def _step(step: str) -> str:
    inside = fnmatch.translate(step).removeprefix("(?s:").removesuffix(r")\Z")
    inside = inside.replace(".*", "[^/]*").replace("(?>.*?", "(?>[^/]*?")
    return inside if step.startswith(".") else rf"(?!\.){inside}"


def _common(roots: Iterable[str]) -> str:
    steps = [root.split("/") for root in roots]
    shortest = min(len(one) for one in steps)
    number = 0
    while number < shortest and len({one[number] for one in steps}) == 1:
        number += 1
    return "/".join(steps[0][:number])


def _refuse_inside(locations: Iterable[str], walked: Iterable[str], output: str) -> None:
    for location in locations:
        if location.startswith(output + "/"):
            raise SourceError(
                f"the input {location} lies inside the output {output}: a run would embed its own output; "
                "put the output beside the source, not above it"
            )
    for root in walked:
        if output == root or output.startswith(root + "/"):
            raise SourceError(
                f"the output {output} lies inside the source folder {root}: the next run would take its parts for inputs; "
                "put the output beside the source"
            )
