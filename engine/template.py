"""Text templates: a text made of several columns, such as `{title}: {body}`."""

from __future__ import annotations

import string
from dataclasses import dataclass

_ESCAPES = {"\\n": "\n", "\\t": "\t"}


@dataclass(frozen=True, slots=True)
class Template:
    """What a template says, taken apart."""

    pieces: tuple[tuple[str, str | None], ...]
    """Plain text, and the column that comes after it; None after the last."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names, each once, in its order."""
        return tuple(dict.fromkeys(column for _, column in self.pieces if column is not None))


def unescaped(template: str) -> str:
    r"""Return a template with `\n` and `\t`, as a shell hands them on, as the characters that they stand for."""
    for written, meant in _ESCAPES.items():
        template = template.replace(written, meant)
    return template


def parse(template: str) -> Template:
    """
    Take a template apart: columns in braces, `{{` and `}}` for braces themselves.

    Raises:
        ValueError: If it names no column, or more than the plain name of one.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"{str(error)[:1].lower()}{str(error)[1:]}: write {{{{ and }}}} for braces themselves"
        ) from None
    for _, column, how, conversion in parsed:
        if column is None:
            continue
        if how or conversion or any(sign in column for sign in ".[]"):
            raise ValueError(
                f"{{{column}}} has more in it than the name of a column: no attribute, index, format or conversion is taken; "
                "rename the column, or make the text before"
            )
        if not column.strip():
            raise ValueError("{} names no column: write one between the braces, such as {title}")
    found = Template(tuple((literal, column) for literal, column, _, _ in parsed))
    if not found.columns:
        raise ValueError("it names no column: write those of the text in braces, such as {title}")
    return found
