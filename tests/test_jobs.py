"""The entry points under `ray job submit`, against a head that is started here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.kills import ROOT, Job, wait_until

pytestmark = pytest.mark.ray

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        env=os.environ | {"PYTHONPATH": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
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


def arguments(job: Job) -> list[str]:
    model = ["--model", "custom:tests.models.HashModel", "--model-args", json.dumps({"fail_on": "poison"})]
    return ["--source", str(job.source), "--output", str(job.output), *model, "--id-column", "id", "--shard-rows", "20"]


def test_a_submitted_job_embeds_and_a_second_one_finds_nothing_left(dashboard, tmp_path):
    """The log streams progress and the summary; the engine comes with the working directory."""
    job = Job(tmp_path, None)
    first = submit(dashboard, "python", "jobs/embed.py", *arguments(job))
    assert first.returncode == 0, first.stdout + first.stderr
    log = first.stdout + first.stderr
    assert "100%  1,200/1,200 rows" in log
    assert "embedded  1,186 rows in 60 shards" in log
    job.check()
    again = submit(dashboard, "python", "jobs/embed.py", *arguments(job))
    assert "1,200 rows were done already" in again.stdout + again.stderr
    checked = submit(dashboard, "python", "jobs/verify.py", str(job.output), "--level", "full")
    assert checked.returncode == 0
    assert "verdict   good" in checked.stdout + checked.stderr


def test_a_job_that_fails_says_why_and_with_which_exit_code(dashboard, tmp_path):
    """The submit command exits with 1 for any failure; the status message has the engine's own exit code."""
    job = Job(tmp_path, None)
    failed = submit(dashboard, "python", "jobs/embed.py", *arguments(job), "--text-column", "body")
    log = failed.stdout + failed.stderr
    assert failed.returncode == 1
    assert "exit code 2" in log
    assert "has no column 'body'; it has: id, text" in log
    assert not job.output.exists()
