"""The documents: what they name is there. What they say is done in test_guides.py."""

from __future__ import annotations

import re
import shlex

import pytest
from typer.main import get_command

from engine.cli import app
from tests.kills import ROOT

BLOCK = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""Its language, which may be none, and its text."""
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


def blocks(document: str, *languages: str) -> list[tuple[str, str]]:
    return [found for found in BLOCK.findall((ROOT / document).read_text()) if found[0] in languages]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_document_names_a_verb_or_an_option_that_is_not_there(document):
    """Each `engine VERB --option` of a block is one that the command line has."""
    verbs = get_command(app).commands  # type: ignore[attr-defined] # a group
    for _, text in BLOCK.findall((ROOT / document).read_text()):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.startswith("engine ") else []
            if words:
                assert words[1] in verbs, line
                options = {name for parameter in verbs[words[1]].params for name in parameter.opts}
                unknown = {word for word in words[2:] if word.startswith("--")} - options
                assert not unknown, line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document):
    """Files, folders and images of the repository."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / document).read_text()):
        if "://" not in target:
            assert (ROOT / document).parent.joinpath(target).exists(), target
