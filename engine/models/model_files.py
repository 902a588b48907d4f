"""Where a model lies: a folder, an installed package, or the Hugging Face Hub; and what names it for good."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import xxhash

from engine.disk import expanded, kind_of
from engine.errors import ConfigError

PACKAGE = "package:"
"""Prefix of a model that lies in an installed package: the same name finds it on every node of a cluster."""
HASH_CHUNK_BYTES = 16 * 1024**2


def folder_of(name: str) -> Path | None:
    """Return the folder that holds the model, or None if the name is one of the Hub."""
    if name.startswith(PACKAGE):
        package, _, below = name.removeprefix(PACKAGE).partition("/")
        try:
            spec = find_spec(package)
        except (ImportError, ValueError):  # of a package that is not there, or what can be no name of one
            spec = None
        places = list(spec.submodule_search_locations or []) if spec else []
        folder = Path(places[0], below) if places else None
        if folder is None or kind_of(folder) != "folder":
            raise ConfigError(f"there is no model {name}: install the package {package!r}, or correct the folder in it")
        return folder
    folder = expanded(name)
    if kind_of(folder) == "folder":
        return folder
    if name.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"there is no model folder {name}")
    return None


def hub_name(name: str) -> str:
    """Return the full name on the Hub: those without an owner are sentence-transformers' own."""
    return name if "/" in name else f"sentence-transformers/{name}"


def commit_of(name: str, revision: str | None) -> str:
    """Return the commit that a revision of a model names: as the Hub says, or else as it was last downloaded."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().model_info(name, revision=revision, timeout=20).sha)
    except Exception as error:  # offline, or any of what a network's libraries raise: perhaps it was downloaded before
        why = type(error).__name__
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True)).name
    except (OSError, ValueError, HfHubHTTPError):
        raise ConfigError(
            f"there is no model {name}{f' at {revision}' if revision else ''}: the Hugging Face Hub does not give it ({why}), "
            "and it was not downloaded before. Check the name and the network, or give a folder"
        ) from None


def content_hash_of(folder: Path) -> str:
    """Hash the names and bytes of a model folder's files, except what is only read by people."""
    digest = xxhash.xxh3_128()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".md" or any(step.startswith(".") for step in Path(name).parts):
            continue
        digest.update(name.encode() + b"\0")
        try:
            with path.open("rb") as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise ConfigError(f"the model's file {path} cannot be read ({error.strerror}): make it readable") from None
    return digest.hexdigest()
