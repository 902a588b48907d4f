"""The notebooks of examples/, and a run inside a notebook that is interrupted: on a real kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient

from tests.kills import ROOT, wait_until

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def workers_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", "")


def executed(name: str, folder: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    return NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(folder)}}).execute()


def outputs(notebook: nbformat.NotebookNode, kind: str) -> Iterator[str]:
    """Yield what cells show of one MIME type, and their streams as text/plain."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            shown = output.get("data", {}).get(kind)
            if shown is None and kind == "text/plain":
                shown = output.get("text")
            if shown is not None:
                yield shown


def test_the_quickstart_goes_from_a_dataframe_to_a_search(tmp_path):
    """On a real kernel; results are tables, progress is one line that has reached its end, and nothing warns."""
    notebook = executed("quickstart.ipynb", tmp_path)
    shown = " ".join(outputs(notebook, "text/html"))
    assert "300 rows in" in shown
    assert "<code>100%  300/300 rows" in shown
    assert "300 rows were done already" in shown
    assert "good, at level full" in shown
    assert "music" in shown.rpartition("cosine")[2]
    streams = "".join(
        output["text"] for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    assert "Warning" not in streams, streams
    assert "core_worker.cc" not in streams, streams


@pytest.mark.soak
def test_the_same_call_scales_out_on_a_cluster(tmp_path):
    """Two actors in a Ray that the notebook has joined, eight shards, and the summary of the run."""
    notebook = executed("scale_out.ipynb", tmp_path)
    assert pads.dataset(tmp_path / "scale_out/out/data").count_rows() == 200
    assert "('done', '1 node, 2 CPU, 4 GPU', 2, 200)" in " ".join(outputs(notebook, "text/plain"))


@pytest.fixture
def kernel(tmp_path) -> Iterator[tuple[KernelManager, Any]]:
    manager, client = start_new_kernel(cwd=str(tmp_path))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.soak
def test_a_notebooks_stop_button_leaves_a_resumable_job(kernel, tmp_path):
    """The call returns what it did, in the same cell; the cell again does the rest. And embed works though the kernel's loop runs."""
    manager, client = kernel
    pq.write_table(pa.table({"text": [f"text {row}" for row in range(100)]}), tmp_path / "in.parquet")
    os.makedirs(tmp_path / "out", exist_ok=True)  # noqa: PTH103
    cell = (
        "import engine\nresult = engine.run(source='in.parquet', output='out', model='custom:tests.models.HashModel', "
        "model_args={'delay_s': 0.3}, shard_rows=2)\n(result.interrupted, result.num_rows, result.pending_rows)"
    )
    records = tmp_path / "out/_engine/commits"

    def answer(message: str) -> str:
        while (reply := client.get_shell_msg(timeout=120))["parent_header"].get("msg_id") != message:
            pass
        content = reply["content"]
        assert content["status"] == "ok", content
        return str(content["user_expressions"]["told"]["data"]["text/plain"])

    told = {"told": "(result.interrupted, result.num_rows, result.pending_rows)"}
    message = client.execute(cell, user_expressions=told)
    wait_until(lambda: records.is_dir() and len(list(records.iterdir())) >= 3)
    manager.interrupt_kernel()
    interrupted, num_rows, pending_rows = eval(answer(message))
    assert interrupted
    assert pending_rows == 100 - num_rows
    again = cell.replace("shard_rows=2)", "num_actors=2)")
    message = client.execute(again, user_expressions=told)
    assert eval(answer(message))[0] is False
    assert pads.dataset(tmp_path / "out/data").count_rows() == 100
    message = client.execute(
        "import asyncio\nassert asyncio.get_running_loop()\n"
        "shape = engine.embed(['a', 'b'], model='custom:tests.models.HashModel').shape",
        user_expressions={"told": "shape"},
    )
    assert answer(message) == "(2, 8)"
