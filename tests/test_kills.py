"""Whatever is killed, and whenever: the same command again, and every row is there once."""

from __future__ import annotations

import os
import platform
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import ray

import engine
from engine.lease import LEASE
from tests.kills import COMMITTING, EMBEDDING, PUBLISHER, ROOT, BucketJob, Job, kill_worker, wait_until
from tests.object_stores import BUCKET, KEYS

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def address(s3_server):
    """A cluster that outlives the drivers that are killed on it."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["PYTHONPATH"] = str(ROOT)
    ray.init(
        address="local", num_cpus=8, num_gpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def job(address, tmp_path: Path) -> Job:
    return Job(tmp_path, address, num_actors=1)


@pytest.mark.parametrize("seed", [0])
def test_drivers_killed_at_any_time_lose_and_repeat_nothing(address, tmp_path, seed):
    """SIGKILL of the driver, as it starts and then as it starts or commits; then the same command to its end."""
    job = Job(tmp_path, address)
    chance = random.Random(seed)
    process = job.start()
    time.sleep(chance.uniform(0, 3))
    assert process.poll() is None
    process.kill()
    process.communicate()
    job.kill_at(chance, job.start())
    job.finish()
    job.check()


def test_a_job_from_a_bucket_into_a_bucket_survives_a_kill_and_a_bad_store(s3_server, address, tmp_path):
    """SIGKILL of the driver in the middle, and a resume while answers are lost and refused: the output is that of disks, without a key."""
    job = BucketJob(tmp_path, address, f"s3://{BUCKET}")
    process = job.start()
    job.wait_for_commits(5, process)
    process.kill()
    _, said = process.communicate()
    assert 5 <= job.num_committed() < 60
    for number, fault in enumerate(
        ("lost", "unsent", "cut", (503, "SlowDown"), (409, "ConditionalRequestConflict")) * 5
    ):
        s3_server.fail(fault, "GET" if fault == "cut" else "PUT", part="/data/", after=3 * number)
    job.finish()
    s3_server.heal()
    job.check()
    assert engine.verify(job.output, "sample").lowest_cosine > 0.9999
    assert not any("uploads" in request for request in s3_server.seen)
    logs = Path(ray._private.worker._global_node.get_session_dir_path(), "logs")
    written = [path for folder in (logs, job.local_output()) for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 100
    for data in (said, *(path.read_bytes() for path in written)):
        assert not any(key.encode() in data for key in KEYS.values())


@pytest.mark.parametrize(("title", "kills"), [(COMMITTING, 2), (EMBEDDING, 2), (PUBLISHER, 3)])
def test_workers_killed_in_the_middle_are_replaced_and_the_run_goes_on(address, tmp_path, title, kills):
    """SIGKILL of actors that embed and commit, that only embed, and of publishers, several times in one run, which ends well all the same."""
    job = Job(tmp_path, address, delay_s=0.3, on_gpus=title != COMMITTING)
    chance = random.Random(title)
    process = job.start()
    killed = 0
    for number in range(kills):
        job.wait_for_commits(1 + 3 * number, process)
        time.sleep(chance.uniform(0, 0.2))
        killed += kill_worker(title, os.getpid(), process, chance)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr.decode()[-4000:]
    assert killed == kills
    job.check()


def test_a_driver_killed_with_its_own_ray_and_a_ray_killed_under_its_driver_lose_nothing(address, tmp_path):
    """SIGKILL of a driver that had started Ray itself: the same command resumes at once, beside what is left of that Ray, whose actor may
    commit what is inside it. SIGKILL of Ray itself under a live driver: the run ends with an error, and the same command resumes.
    """
    job = Job(tmp_path, None, delay_s=0.1, num_actors=1)
    process = job.start()
    job.wait_for_commits(5, process)
    process.kill()
    process.communicate()
    before = job.num_committed()
    assert 5 <= before < 60
    process = job.start()
    wait_until(lambda: bool(raylets_of(process)))
    before = job.num_committed()
    job.wait_for_commits(before + 5, process)
    raylets_of(process)[0].kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0, stderr.decode()[-2000:]
    assert before + 5 <= job.num_committed() < 60
    job.finish("--address", address)
    job.check()


def raylets_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if child.name() == "raylet"]


@pytest.mark.soak
def test_two_drivers_at_once_end_with_every_row_once(job):
    """With the lease taken away from the first, both think that they own the output, do all they can, and end well."""
    first = job.start()
    job.wait_for_commits(1, first)
    shutil.rmtree(Path(job.output, LEASE))
    second = job.start()
    for process in (first, second):
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr.decode()[-4000:]
    job.check()


def test_a_run_is_refused_beside_a_live_one_and_may_take_its_place(address, tmp_path):
    """The second says who owns the output, and touches nothing; a third takes over, and the first leaves with 3."""
    job = Job(tmp_path, address)
    first = job.start()
    job.wait_for_commits(1, first)
    job.held.touch()
    refused = job.start()
    _, stderr = refused.communicate(timeout=60)
    assert refused.returncode == 3
    assert f"is in use by a run on {platform.node()} (process {first.pid}, ".encode() in stderr
    third = job.start("--if-in-use", "take-over")
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 3
    assert b"was taken over by another run" in stderr
    job.held.unlink()
    _, stderr = third.communicate(timeout=60)
    assert third.returncode == 0, stderr.decode()[-4000:]
    job.check()


@pytest.mark.soak
def test_a_driver_that_slept_through_another_run_doubles_nothing(job):
    """SIGSTOP of a driver in the middle, another run to the end, SIGCONT: the sleeper finds all done, or that it was replaced."""
    sleeper = job.start()
    job.wait_for_commits(5, sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    assert job.num_committed() < 60
    job.finish()
    job.check()
    sleeper.send_signal(signal.SIGCONT)
    _, stderr = sleeper.communicate(timeout=240)
    assert sleeper.returncode in (0, 3), stderr.decode()[-4000:]
    job.check()
