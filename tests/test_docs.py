"""The guides: their commands and their code, run as they stand, one after the other, in one folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.main import get_command

from engine.cli import app
from tests.kills import ROOT

RUN = ("docs/resuming.md", "docs/output.md", "docs/gc.md")
"""Whose `sh` and `python` blocks are run: the others go by the output of the first."""
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


def blocks(document: str, *languages: str) -> list[tuple[str, str]]:
    return [found for found in BLOCK.findall((ROOT / document).read_text()) if found[0] in languages]


@pytest.mark.ray
def test_the_guides_do_what_they_say(tmp_path):
    """Every command ends well, on texts and a model that are really there."""
    (tmp_path / "texts").mkdir()
    for number in range(2):
        rows = [f"text {row} of file {number}" for row in range(60)]
        pq.write_table(
            pa.table({"id": [f"{number}-{row}" for row in range(60)], "text": rows}),
            tmp_path / f"texts/{number}.parquet",
        )
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for document in RUN:
        found = blocks(document, "sh", "python")
        assert found, document
        for language, text in found:
            script = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
            done = subprocess.run(
                script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False
            )
            assert done.returncode == 0, f"{document}:\n{text}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_document_names_a_verb_or_an_option_that_is_not_there(document):
    """Each `engine VERB --option` of a block is one that the command line has."""
    verbs = get_command(app).commands  # type: ignore[attr-defined] # a group
    for _, text in [
        ("", found[1]) for found in re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.M | re.S)
    ]:
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
