"""The entry points under `ray job submit`, against a head that is started here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.builders import free_port
from tests.kills import FAILING, ROOT, Job, wait_until
from tests.ray_nodes import RAY, calls, hold, takes_jobs
from tests.strict_server import serving

pytestmark = pytest.mark.ray

CANARY_KEY = f"sk-{uuid.uuid4().hex}"
"""In the environment of the head, whose workers find it there."""
NUM_SEARCHED = 30
"""Calls at most that find the one text on which the model fails, by halving its shard of twenty."""


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory) -> Iterator[str]:
    """A head of its own: the address of its dashboard, which takes jobs."""
    port = free_port()
    # Sockets' paths are short of room, and the folder keeps other runs of this machine from joining this head.
    folder = tmp_path_factory.getbasetemp().parent / f"head-{port}"
    head = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"),
            *(f"--port={free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
            f"--dashboard-agent-listen-port={free_port()}",
        ],
        env=os.environ
        | {
            "PYTHONPATH": "",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OPENAI_API_KEY": CANARY_KEY,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: takes_jobs(address))
        wait_until(lambda: submit(address, "--no-wait", "true").returncode == 0)
        yield address
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.kill()  # SIGTERM would have it drain for half a minute
        head.wait(20)


def submit(address: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Submit a job as the README says; options for `ray job submit` come before the command."""
    options = [word for word in command if word == "--no-wait"]
    words = [word for word in command if word not in options]
    return subprocess.run(
        [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), *options, "--", *words],
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "NO_COLOR": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_a_job_that_is_stopped_and_submitted_again_goes_on_and_says_why_another_model_is_refused(dashboard, tmp_path):
    """
    It is stopped in the middle of its shards, and the second one does what is left: its log streams progress and the summary.

    The engine comes with the working directory. Of what is refused, the log and the status message have the engine's own words and exit code.
    """
    job, client = Job(tmp_path, None), JobSubmissionClient(dashboard)
    hold(tmp_path)
    model = {"folder": str(tmp_path), "fail_on": FAILING, "delay_s": 0.05}

    def command(**options: object) -> list[str]:
        place = [f"--source={job.source}", f"--output={job.output}", "--id-column=id", "--shard-rows=20"]
        options = ["--model=custom:tests.ray_nodes.PlacedModel", f"--model-args={json.dumps(model | options)}"]
        return ["python", "jobs/embed.py", *place, *options]

    first = client.submit_job(entrypoint=shlex.join(command()), runtime_env={"working_dir": str(ROOT)})
    wait_until(lambda: job.num_committed() >= 3)
    hold(tmp_path, "all")
    client.stop_job(first)
    wait_until(lambda: client.get_job_status(first).is_terminal())
    assert client.get_job_status(first) == JobStatus.STOPPED
    num_done, num_calls = job.num_committed(), len(calls(tmp_path))
    assert 3 <= num_done < 60
    assert "rows" in client.get_job_logs(first)
    hold(tmp_path)
    second = submit(dashboard, *command())
    log = second.stdout + second.stderr
    assert second.returncode == 0, log
    assert "were done already" in log
    assert re.search(r"100%  (\S+)/\1 rows", log)
    assert re.search(r"embedded  \S+ rows in \d+ shards", log)
    job.check()
    assert len(calls(tmp_path)) - num_calls <= 60 - num_done + NUM_SEARCHED
    refused = submit(dashboard, *command(dimension=9))
    log = refused.stdout + refused.stderr
    assert refused.returncode == 1  # of the command that submits, for any failure
    last = max(client.list_jobs(), key=lambda job: job.start_time or 0)
    assert last.status == JobStatus.FAILED
    assert "exit code 3" in last.message
    assert "exit code 3" in log
    for told in (last.message, log):
        assert "model_args" in told
    checked = submit(dashboard, "python", "jobs/verify.py", str(job.output), "--level", "full")
    assert checked.returncode == 0
    assert "verdict   good" in checked.stdout + checked.stderr


def test_no_key_and_no_text_is_in_anything_that_a_job_writes(dashboard, tmp_path, tmp_path_factory):
    """The output, Ray's session with all its logs, what the command prints, and the Jobs API, searched for a key and a text."""
    text = f"canary {uuid.uuid4().hex} sings"
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": [text, f"{text} again", "plain"]}), tmp_path / "in" / "a.parquet")
    quoting = {"kind": "status", "status": 400, "message": f"cannot read '{text} again' with {CANARY_KEY}", "times": -1}
    with serving(key=CANARY_KEY, dimension=16, faults=[quoting | {"containing": "again"}]) as server:
        flags = [f"--source={tmp_path}/in", f"--output={tmp_path}/out", "--debug"]
        model = ["--model=openai:text-embedding-3-small", f"--base-url={server.url}", "--dimensions=16"]
        done = submit(dashboard, "python", "jobs/embed.py", *flags, *model)
        assert server.stats()["num_embedded"] >= 2
    assert done.returncode == 0, done.stdout + done.stderr
    reject = next(tmp_path.glob("out/_engine/rejects/*.jsonl")).read_text()
    assert "cannot read" in reject
    heads = tmp_path_factory.getbasetemp().parent.glob("head-*")
    session = max(heads, key=lambda head: head.stat().st_mtime)  # others are of earlier test runs
    files = [path for folder in (tmp_path / "out", session) for path in folder.rglob("*") if path.is_file()]
    written = {str(path): path.read_bytes() for path in files} | {"printed": (done.stdout + done.stderr).encode()}
    with urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=10) as jobs:
        written["jobs"] = jobs.read()
    assert len(written) > 30
    assert b"jobs/embed.py" in written["jobs"]
    for secret in (CANARY_KEY, text):
        assert [name for name, data in written.items() if secret.encode() in data] == []
