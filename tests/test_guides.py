"""The guides: every command and every piece of code in them is run as it stands, or is named here with the reason why not."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine.cli import main
from engine.models.model_files import folder_of
from engine.storage import open_storage
from tests import strict_server
from tests.kills import ROOT
from tests.test_docs import BLOCK, DOCUMENTS
from tests.tiny_models import PACKAGED

pytestmark = pytest.mark.ray

KEY = "sk-of-the-guides"
COMMAND = re.compile(r"^(?:\.venv/bin/|[A-Z_]+=\S+ )?(?:engine|python|ray|kubectl|make|git|pip|export) ")
BY_THE_WAY = ("pip install", "export OPENAI_API_KEY", "from __future__")
"""Lines that tests find done: what is installed, and a key."""
AFTER = {"docs/output.md": "docs/resuming.md", "docs/gc.md": "docs/resuming.md"}
"""Documents that go by the output of another one."""
ELSEWHERE = {
    "docs/readers.md": "test_readers.py",
    "docs/output-dtypes.md": "test_quantization.py",
    "docs/export.md": "test_export.py",
    "CONTRIBUTING.md": "test_api_example.py",
}
"""Documents whose code another test runs."""
NOT_RUN = {
    ("README.md", "make demo"): "they run tests, and a demo of minutes, in an environment that they make",
    (
        "README.md",
        ".venv/bin/python jobs/embed.py",
    ): "it wants the texts that `make demo` writes; test_jobs.py runs that file",
    ("README.md", "ray job submit"): "its arguments are left out; test_jobs.py submits so",
    ("docs/cluster.md", "ray get-auth-token"): "several machines; test_cluster.py has nodes of one",
    ("docs/cluster.md", "git clone"): "run by hand: it installs all, and writes a token to the home folder",
    ("docs/cluster.md", "ray job status"): "of a job that is submitted: test_jobs.py does the same by the client",
    ("docs/cluster.md", "pip install boto3"): "AWS",
    ("docs/cluster.md", "kubectl"): "a Kubernetes",
    (
        "docs/kura.md",
        "from engine.integrations.kura import",
    ): "it names clusters by a language model; test_kura.py runs its parts",
    ("docs/kura.md", "items = ["): "it names clusters by a language model; test_kura.py runs its parts",
    ("docs/kura.md", "python benchmarks/"): "a benchmark of minutes",
    ("docs/long-texts.md", "python -m benchmarks"): "a benchmark of minutes",
    ("docs/benchmarks.md", "python "): "benchmarks of minutes",
    ("CONTRIBUTING.md", "make check"): "they run all tests, these among them",
}
"""By how a block of a document begins."""


def blocks() -> list[tuple[str, str, str]]:
    """Return the document, the language and the text of each block that has code or commands."""
    found = [(document, *block) for document in DOCUMENTS for block in BLOCK.findall((ROOT / document).read_text())]
    return [
        (document, language, text)
        for document, language, text in found
        if language == "python" or any(COMMAND.match(line) for line in text.splitlines())
    ]


def is_listed(document: str, text: str) -> bool:
    return any(document == named and text.startswith(begins) for named, begins in NOT_RUN)


TO_RUN = [
    (document, language, text)
    for document, language, text in blocks()
    if not is_listed(document, text) and document not in ELSEWHERE
]


# What they find


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory) -> Path:
    """A cache of the Hub that has all-MiniLM-L6-v2, the packaged one, as if it had been fetched."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub/models--sentence-transformers--all-MiniLM-L6-v2"
    commit = "1" * 40
    for name in ("refs", "snapshots"):
        (repository / name).mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(folder_of(PACKAGED))
    return home


@pytest.fixture(scope="module")
def cluster(hub_cache, s3_server) -> Iterator[None]:
    """A Ray that the commands join; its workers, and this process, find the Hub's cache, an S3, a provider and its key."""
    import huggingface_hub.constants
    import ray

    with strict_server.serving(key=KEY) as server, pytest.MonkeyPatch.context() as environment:
        settings = {"HF_HOME": str(hub_cache), "OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        for name, value in (settings | {"PYTHONPATH": str(ROOT)}).items():
            environment.setenv(name, value)
        environment.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache / "hub"))
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        environment.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
        ray.shutdown()


def texts(count: int = 40) -> pa.Table:
    rows = range(count)
    columns = {"id": [f"id-{row}" for row in rows], "text": [f"the text of row {row}" for row in rows]}
    columns |= {"title": [f"Title {row}" for row in rows], "body": [f"A body, number {row}." for row in rows]}
    return pa.table(columns | {"language": ["en" if row % 3 else "de" for row in rows]})


def write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def two_days(_: dict[str, Any]) -> None:
    write(Path("day1/a.parquet"), texts())
    write(Path("day2/a.parquet"), texts(45))
    engine.run(source="day1", output="out1", progress=False)


def an_output(_: dict[str, Any]) -> None:
    shutil.rmtree("out", ignore_errors=True)
    engine.run(source="texts", output="out", id_column="id", keep=["language"], progress=False)


def a_frame(names: dict[str, Any]) -> None:
    names["frame"] = pd.DataFrame(texts().to_pandas()[["id", "text"]])


def two_buckets(_: dict[str, Any]) -> None:
    endpoint = urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc
    for bucket in ("corpus", "vectors"):
        connection = http.client.HTTPConnection(endpoint)
        connection.request("PUT", f"/{bucket}")
        assert connection.getresponse().status == 200
        connection.close()
    open_storage("s3://corpus/2026/11").create("a.parquet", Path("texts/a.parquet").read_bytes())


def a_checkpoint(names: dict[str, Any]) -> None:
    pytest.importorskip("kura")
    from kura.checkpoints import JSONLCheckpointManager
    from kura.types import ConversationSummary

    summaries = [ConversationSummary(summary=f"about {n}", chat_id=f"chat-{n}", metadata={}) for n in range(5)]
    JSONLCheckpointManager("checkpoints").save_checkpoint("summaries", summaries)
    names |= {"summaries": summaries, "engine": engine, "JSONLCheckpointManager": JSONLCheckpointManager}


MADE_FIRST: dict[str, Callable[[dict[str, Any]], None]] = {
    "docs/changing-inputs.md": two_days,
    "docs/report.md": an_output,
    "docs/in-memory.md": a_frame,
    "docs/object-stores.md": two_buckets,
    "docs/kura.md": a_checkpoint,
}


def with_stand_ins(text: str) -> str:
    """Put what is here in place of what is not: a folder of the reader's, and the price of OpenAI's own server."""
    text = text.replace("\\\n", " ").replace("/models/minilm", str(folder_of(PACKAGED)))
    return text.replace("--max-cost", "--token-price 0.02 --max-cost")


# That they are run


def test_each_block_is_run_or_is_named_with_the_reason():
    """Of those that are named or run elsewhere, each is there still; a new block of any document is run here."""
    for document, begins in NOT_RUN:
        assert any(document == of and text.startswith(begins) for of, _, text in blocks()), (document, begins)
    for document, file in ELSEWHERE.items():
        assert Path(document).name in (ROOT / "tests" / file).read_text(), document
    assert len(TO_RUN) > 12


@pytest.mark.parametrize("document", sorted({document for document, _, _ in TO_RUN} - AFTER.keys()))
def test_what_a_guide_says_can_be_done(cluster, tmp_path, monkeypatch, document):
    """
    Its blocks one after the other, in one folder: each command ends with 0, and no code fails.

    A block that begins an output anew finds none there, since others of the document are of another model.
    """
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "texts/a.parquet", texts())
    names: dict[str, Any] = {}
    if document in MADE_FIRST:
        MADE_FIRST[document](names)
    of_others = [after for after, before in AFTER.items() if before == document]
    for language, text in (block[1:] for of in (document, *of_others) for block in TO_RUN if block[0] == of):
        if "source" in text and "memory:" not in text:
            shutil.rmtree("out", ignore_errors=True)
        if language == "python":
            exec(text, names)
            continue
        for line in with_stand_ins(text).splitlines():
            words = shlex.split(line, comments=True)
            if not words or line.startswith(BY_THE_WAY):
                continue
            assert words[0] == "engine", line
            assert main(words[1:]) == 0, line
