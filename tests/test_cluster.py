"""One job, submitted to clusters whose nodes come and die: raylets of this machine, each with its own folder and address."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from tests.kills import FAILING, ROOT, Job, wait_until
from tests.ray_nodes import RAY, Cluster, calls, hold
from tests.strict_server import serving

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

NOTES = ("begun", "calls", "failed")
KEY = "sk-of-the-strict-server"
GPUS = ("--num-cpus=2", "--num-gpus=2")
DRAIN_S = "20"
"""The grace of a node that is told to go. A shard takes a part of a second, also on a busy machine; the test waits for its end."""


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
    """`jobs/embed.py`, submitted to a cluster as the README says; the engine and the model come with the working directory."""

    def __init__(self, cluster: Cluster, *arguments: str) -> None:
        job = ["--working-dir", str(ROOT), "--", "python", "jobs/embed.py", *arguments]
        self.process = subprocess.Popen(
            [RAY, "job", "submit", "--address", cluster.jobs, *job],
            env=os.environ | {"NO_COLOR": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(self, is_true) -> None:
        """Wait for something to be true while the job runs."""
        wait_until(lambda: is_true() or self.process.poll() is not None, 200)
        if not is_true():
            raise AssertionError(f"it ended with {self.process.returncode}:\n{self.process.stdout.read()[-4000:]}")

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code of the command, which is 1 for any failure of the job, and the job's log."""
        output, _ = self.process.communicate(timeout=200)
        return self.process.returncode, output


@pytest.mark.soak
def test_nodes_come_and_die_and_the_head_too_and_every_row_is_there_once(tmp_path):
    """
    One job through all of it, submitted through the Jobs API to a head, where its driver runs: it begins on the GPUs of one node, grows
    onto a node that is added, goes on there when the first is killed in the middle of its shards, and fails with the head. Submitted
    again to a new cluster, it embeds no text a second time of which a row was committed.

    There a node is told to go (SIGTERM) while its two actors are in the middle of their shards. The one, which is let through, ends its
    shard there. The other is not done when the grace is over: its shard is given up with the node, which goes by itself, and each text is
    embedded once, elsewhere. The job ends well.
    """
    job, notes = Job(tmp_path, None), tmp_path / "notes"
    notes.mkdir()
    hold(notes)
    # Long enough for a hold to come in time: without it, all shards may be through while a node is being killed.
    model = {"folder": str(notes), "fail_on": FAILING, "delay_s": 0.2}
    arguments = [
        *(f"--source={job.source}", f"--output={job.output}", "--id-column=id", "--shard-rows=20", "--num-actors=4"),
        *("--model=custom:tests.ray_nodes.PlacedModel", f"--model-args={json.dumps(model)}"),
    ]

    def num_made_on(node: str) -> int:
        return sum(call["node"] == node for call in calls(notes))

    def in_the_middle_on(node: str) -> list[list[str]]:
        here = {name: [call["texts"] for call in calls(notes, name) if call["node"] == node] for name in NOTES}
        return [texts for texts in here["begun"] if texts not in here["calls"] + here["failed"]]

    with cluster("--num-cpus=0", "--num-gpus=0") as first:
        only_cpus, begins = first.add(("--num-cpus=2", "--num-gpus=0"), GPUS)
        run = Run(first, *arguments)
        run.until(lambda: num_made_on(begins.id) >= 1)
        hold(notes, [begins.id])
        asked_an_api_while_all_gpus_are_taken(first, tmp_path)
        (added,) = first.add(GPUS)
        run.until(lambda: num_made_on(added.id) >= 2)
        assert num_made_on(only_cpus.id) == 0
        hold(notes, "all")
        begins.kill()
        before = job.num_committed()
        hold(notes)
        run.until(lambda: job.num_committed() >= before + 3)
        hold(notes, "all")
        first.head.kill()
        code, output = run.end()
        assert code == 1, output

    committed = texts_committed(job)
    made_before = len(calls(notes))
    assert 0 < len(committed) < 1186
    hold(notes)
    before = job.num_committed()
    assert before < 40, "too few are left for what follows"
    with cluster(*GPUS) as second:
        (told,) = second.add(GPUS)
        hold(notes, "all")  # or one node may do all before the other has begun
        run = Run(second, *arguments)
        run.until(lambda: len(in_the_middle_on(told.id)) == 2)
        hold(notes, "all", but=max(in_the_middle_on(told.id), key=len))
        run.until(lambda: job.num_committed() > before)  # what publishes has begun
        run.until(lambda: len(in_the_middle_on(told.id)) == 2)
        told.notice()
        run.until(lambda: told.id in second.draining())
        given_up, finished = sorted(in_the_middle_on(told.id), key=len)
        hold(notes, "all", but=finished)
        run.until(told.is_gone)
        assert given_up in in_the_middle_on(told.id)
        hold(notes)
        code, output = run.end()
        assert code == 0, output
    job.check()
    made_again = calls(notes)[made_before:]
    assert committed.isdisjoint(text for call in made_again for text in call["texts"])
    assert {call["node"] for call in made_again} == {second.head.id, told.id}
    assert all(call["gpus"] for call in calls(notes))
    of_finished, of_given_up = (
        [[call["node"] for call in made_again if text in call["texts"]] for text in good(texts)]
        for texts in (finished, given_up)
    )
    assert of_finished
    assert all(places[0] == told.id for places in of_finished)
    assert of_given_up == [[second.head.id]] * len(of_given_up) != []


def asked_an_api_while_all_gpus_are_taken(cluster: Cluster, folder: Path) -> None:
    """A job that asks an API runs to its end beside one whose actors hold all GPUs: it needs none."""
    source, output = folder / "api" / "in", folder / "api" / "out"
    source.mkdir(parents=True)
    pq.write_table(pa.table({"text": [f"text {row}" for row in range(40)]}), source / "a.parquet")
    key_file = folder / "api" / "key"
    key_file.write_text(KEY)
    with serving(key=KEY, dimension=16) as server:
        flags = [f"--base-url={server.url}", "--dimensions=16", f"--key-file={key_file}", "--shard-rows=10"]
        run = Run(cluster, f"--source={source}", f"--output={output}", "--model=openai:text-embedding-3-small", *flags)
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


def good(texts: list[str]) -> set[str]:
    """Return the texts of which there is a row in the end."""
    return {text for text in texts if FAILING not in text}
