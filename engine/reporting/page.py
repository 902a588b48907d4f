"""The page: one HTML file that needs nothing else, and asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.wording import dollars, size

PLOTLY_MISSING = "a report needs Plotly and Jinja, which are not installed: pip install 'embedding-engine[report]'"


def require_libraries() -> None:
    """Raise ConfigError if what draws a page is not installed."""
    try:
        import jinja2  # noqa: F401 - is it there?
        import plotly  # noqa: F401
    except ImportError:
        raise ConfigError(PLOTLY_MISSING) from None


def render(figures: dict[str, Any], **shown: Any) -> str:
    """
    Make the page.

    Args:
        figures: What Plotly draws, by the id of the element that it is drawn in.
        shown: What the template shows; all of it is escaped.

    Returns:
        HTML. Its policy lets the browser run the scripts that were put in here, by their hashes, and load nothing: even a
        text that escaped its place could do nothing.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    scripts = [_inline(get_plotlyjs()), _inline(_resource("page.js"))]
    environment = Environment(
        loader=PackageLoader("engine.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template("page.html.jinja").render(
        policy=_policy(scripts),
        scripts=[Markup(script) for script in scripts],  # noqa: S704 - ours and Plotly's
        style=Markup(_resource("page.css")),  # noqa: S704 - ours
        data=Markup(_data(figures)),  # noqa: S704 - escaped there
        figures=figures,
        **shown,
    )


def replace(path: Path, text: str) -> None:
    """
    Put a file in its place whole, or leave what is there.

    Raises:
        ConfigError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            Path(name).chmod(0o666 & ~umask)  # as any new file: mkstemp's are for their owner alone
            Path(name).replace(path)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {path} ({error.strerror or type(error).__name__}): give a file in a folder that can be written by --to"
        ) from None


def _resource(name: str) -> str:
    return (files("engine.reporting") / name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """Make a script fit to stand between its tags, whatever its strings hold."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\r\n", "\n").replace("\r", "\n")


def _policy(scripts: list[str]) -> str:
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    # Plotly sets styles, and makes an image of a plot as data: for its download.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _data(value: Any) -> str:
    """Return JSON in which nothing can end a script element: `<`, `>` and `&` are written as escapes, which JSON reads back."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def grouped(number: float) -> str:
    """Return a whole number with its thousands apart."""
    return f"{number:,.0f}"


def brief(number: float) -> str:
    """Return a number of few characters: 9,999, 12.4 k, 3.1 M, 1.5 T."""
    if number < 1e4:
        return f"{number:,.3g}" if number < 100 else f"{number:,.0f}"
    units = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    # What rounds to 1000 is 1 of the next.
    size, unit = next((size, unit) for size, unit in units if number >= 0.9995 * size)
    amount = number / size
    return f"{amount:,.0f} {unit}" if amount >= 999.5 else f"{amount:.3g} {unit}"


FILTERS = {"count": grouped, "size": size, "dollars": dollars, "brief": brief}
