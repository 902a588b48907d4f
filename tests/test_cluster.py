"""One job on clusters whose nodes come and die: raylets of this machine, each with its own folder and address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from tests.kills import FAILING, ROOT, Job, wait_until
from tests.ray_nodes import Cluster, calls
from tests.strict_server import serving

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

KEY = "sk-of-the-strict-server"
GPUS = ("--num-cpus=2", "--num-gpus=2")
DRAIN_S = "4"


@contextmanager
def cluster(*words: str) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        environment = {
            "RAY_health_check_period_ms": "1000",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": DRAIN_S,
            "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        }
        with closing(Cluster(Path(folder), **environment)) as made:
            made.begin(*words)
            yield made


class Run:
    """`jobs/embed.py` on a cluster, as a driver of its own."""

    def __init__(self, address: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs/embed.py"), "--address", address, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_gcs_rpc_server_reconnect_timeout_s": "5"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(self, is_true) -> None:
        """Wait for something to be true while the run goes on."""
        wait_until(lambda: is_true() or self.process.poll() is not None, 200)
        if not is_true():
            raise AssertionError(f"it ended with {self.process.returncode}:\n{self.process.stdout.read()[-4000:]}")

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=200)
        return self.process.returncode, output


@pytest.mark.soak
def test_nodes_come_and_die_and_the_head_too_and_every_row_is_there_once(tmp_path):
    """
    One job through all of it: it begins on the GPUs of one node, grows onto a node that is added, goes on there when the first is
    killed in the middle of its shards, fails with the head, and is run again on a new cluster, where a node is told to go in the middle.
    """
    job, notes = Job(tmp_path, None), tmp_path / "notes"
    notes.mkdir()
    held = notes / "held"
    model = {"folder": str(notes), "fail_on": FAILING}
    arguments = [
        *(f"--source={job.source}", f"--output={job.output}", "--id-column=id", "--shard-rows=20", "--num-actors=4"),
        *("--model=custom:tests.ray_nodes.PlacedModel", f"--model-args={json.dumps(model)}"),
    ]

    def num_made_on(node: str) -> int:
        return sum(call["node"] == node for call in calls(notes))

    with cluster("--num-cpus=0", "--num-gpus=0") as first:
        only_cpus, begins = first.add(("--num-cpus=2", "--num-gpus=0"), GPUS)
        held.write_text("")
        run = Run(first.address, *arguments)
        run.until(lambda: num_made_on(begins.id) >= 1)
        held.write_text(begins.id)
        asked_an_api_while_all_gpus_are_taken(first.address, tmp_path)
        (added,) = first.add(GPUS)
        run.until(lambda: num_made_on(added.id) >= 2)
        assert num_made_on(only_cpus.id) == 0
        before = job.num_committed()
        begins.kill()
        run.until(lambda: job.num_committed() >= before + 3)
        held.write_text("all")
        first.head.kill()
        code, output = run.end()
        assert code == 1, output

    committed = texts_committed(job)
    made_before = len(calls(notes))
    assert 0 < len(committed) < 1186
    held.write_text("")
    with cluster(*GPUS) as second:
        (told,) = second.add(("--num-cpus=2", "--num-gpus=1"))
        held.write_text(second.head.id)  # or it may do all before the other has begun
        run = Run(second.address, *arguments)
        run.until(lambda: num_made_on(told.id) >= 1)
        held.write_text("all")
        told.notice()
        wait_until(lambda: told.ip not in second.alive() or told.is_gone(), 60)
        held.write_text("")
        code, output = run.end()
        assert code == 0, output
    job.check()
    made_again = calls(notes)[made_before:]
    assert committed.isdisjoint(text for call in made_again for text in call["texts"])
    assert {call["node"] for call in made_again} == {second.head.id, told.id}
    assert all(call["gpus"] for call in calls(notes))


def asked_an_api_while_all_gpus_are_taken(address: str, folder: Path) -> None:
    """A job that asks an API runs to its end beside one whose actors hold all GPUs: it needs none."""
    source, output = folder / "api" / "in", folder / "api" / "out"
    source.mkdir(parents=True)
    pq.write_table(pa.table({"text": [f"text {row}" for row in range(40)]}), source / "a.parquet")
    key_file = folder / "api" / "key"
    key_file.write_text(KEY)
    with serving(key=KEY, dimension=16) as server:
        flags = [f"--base-url={server.url}", "--dimensions=16", f"--key-file={key_file}", "--shard-rows=10"]
        run = Run(address, f"--source={source}", f"--output={output}", "--model=openai:text-embedding-3-small", *flags)
        code, printed = run.end()
        assert code == 0, printed
    verdict = engine.verify(output, "full")
    assert verdict.ok
    assert verdict.num_rows == 40


def texts_committed(job: Job) -> set[str]:
    """Return the texts of the rows that are in the output."""
    ids = pq.read_table(job.output / "data", columns=["id"])["id"].to_pylist()
    assert len(ids) == len(set(ids))
    return {f"text {name}" for name in ids}
