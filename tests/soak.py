"""
The soak: runs of one command that are killed at random, over and over, until they are through.

    make soak KILLS=1000

Each round is a new job. Its driver, its embedding actors and its publishers are killed at random instants, its driver is
run again whenever it died, and in the end every row must be in the output exactly once, or in the rejects.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import ray

from tests.kills import COMMITTING, EMBEDDING, PUBLISHER, ROOT, Job, kill_worker

DRIVER = "driver"
MAX_KILLS_A_ROUND = 12


def main() -> int:
    """Kill until it is enough; return 0 if nothing was ever lost or doubled."""
    parser = argparse.ArgumentParser(description="Kill runs at random, and check that no row is lost or doubled.")
    parser.add_argument("--kills", type=int, default=1000, help="how many processes to kill")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and when")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no round after so long")
    arguments = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(ROOT)}
    ray.init(
        address="local", num_cpus=8, num_gpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False
    )
    try:
        soak(ray.get_runtime_context().gcs_address, arguments.kills, arguments.seed, arguments.minutes)
    finally:
        ray.shutdown()
    return 0


def soak(address: str, num_kills: int, seed: int, minutes: float) -> None:
    """Run rounds until so many processes are killed, or the time is over."""
    killed: Counter[str] = Counter()
    started = time.monotonic()
    num_rounds = 0
    while killed.total() < num_kills and time.monotonic() - started < minutes * 60:
        chance = random.Random(f"{seed} {num_rounds}")
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            on_gpus = num_rounds % 2 == 1  # where publishers are actors of their own
            job = Job(Path(folder), address, delay_s=0.2, on_gpus=on_gpus)
            targets = [DRIVER, EMBEDDING, PUBLISHER] if on_gpus else [DRIVER, COMMITTING, COMMITTING]
            killed += kill_through(job, chance, targets, min(MAX_KILLS_A_ROUND, num_kills - killed.total()))
            job.check()
        num_rounds += 1
        counts = ", ".join(f"{count} {target}" for target, count in sorted(killed.items()))
        print(f"round {num_rounds}: every row once; killed so far: {counts}", flush=True)
    print(
        f"{killed.total()} kills in {num_rounds} rounds, {(time.monotonic() - started) / 60:.0f} min: nothing lost, nothing doubled"
    )


def kill_through(job: Job, chance: random.Random, targets: Sequence[str], most: int) -> Counter[str]:
    """Run a job to its end, killing on the way; return how many processes of each kind were killed."""
    killed: Counter[str] = Counter()
    process = job.start()
    while killed.total() < most and job.num_committed() < 60:
        target = chance.choice(targets)
        if target == DRIVER:
            job.kill_at(chance, process)
            killed["drivers"] += 1
            process = job.start()
        else:
            time.sleep(chance.uniform(0, 1.5))
            if kill_worker(target, os.getpid(), process, chance):
                killed["publishers" if target == PUBLISHER else "actors"] += 1
            elif process.poll() is not None:
                break
    _, stderr = process.communicate(timeout=600)
    if process.returncode:
        raise AssertionError(f"exit code {process.returncode}:\n{stderr.decode()[-4000:]}")
    job.finish()
    return killed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.TimeoutExpired as error:
        sys.exit(f"a run hung: {error}")
