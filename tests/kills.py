"""A job that is killed and run again, and what its output must be in the end: for the kill tests and the soak."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

import engine
from engine.buckets.place import place_of
from engine.ledger import COMMITS
from engine.storage import open_storage
from tests.hub import SET, Hub
from tests.models import HashModel
from tests.object_stores import keys

ROOT = Path(__file__).parent.parent
COMMITTING = "ray::MapWorker(MapBatches(CommittingWorker))"
"""On CPUs, the only kind."""
EMBEDDING, PUBLISHER = "ray::MapWorker(MapBatches(EmbedWorker))", "ray::MapWorker(MapBatches(Publisher))"
"""On GPUs; the first for providers too."""
FAILING = "poison"


class Job:
    """
    One command over 1,200 small texts in 60 shards, 14 of which cannot be embedded.

    Args:
        folder: Where its source and its output go.
        address: Of the Ray cluster that it runs on; None lets each run start its own.
        delay_s: Seconds that the model takes for a shard.
        num_actors: On one core each.
        on_gpus: On half a GPU each instead, which on this machine is only a number.

    While there is a file `held` in the folder, the model waits.
    """

    def __init__(
        self,
        folder: Path,
        address: str | None,
        delay_s: float = 0.05,
        num_actors: int = 2,
        *,
        on_gpus: bool = False,
    ) -> None:
        self.held = folder / "held"
        self.output: Path | str = folder / "out"
        self.source: Path | str = folder / "in"
        self._folder = folder
        self._address = address
        self._num_actors = num_actors
        self._share = ["--gpus-per-actor", "0.5"] if on_gpus else ["--cpus-per-actor", "1", "--device", "cpu"]
        self._model_args = {"fail_on": FAILING, "delay_s": delay_s, "hold": str(self.held)}
        self.id_column: str | None = "id"
        self.num_shards = 60
        self.expected = self._write()
        self.rejected = {"1-7", "1-390", *(f"1-{row}" for row in range(40, 52))}

    def _write(self) -> dict[str, np.ndarray]:
        """Write the source; return the vectors that belong to its ids."""
        source = self._folder / "in"
        source.mkdir(parents=True)
        model, expected = HashModel(), {}
        for number in range(3):
            ids = [f"{number}-{row}" for row in range(400)]
            texts: list[str | None] = [f"text {name}" for name in ids]
            if number == 1:
                texts[7], texts[390] = None, f"{FAILING} here"
                texts[40:52] = [""] * 12
            pq.write_table(pa.table({"id": ids, "text": texts}), source / f"{number}.parquet", row_group_size=100)
            good = {name: text for name, text in zip(ids, texts, strict=True) if text and FAILING not in text}
            expected |= {name: model.vector(text) for name, text in good.items()}
        return expected

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start the command, always the same one but for options of who owns the output."""
        address = ["--address", self._address] if self._address else []
        return subprocess.Popen(
            [
                *(
                    sys.executable,
                    str(ROOT / "jobs/embed.py"),
                    "--source",
                    str(self.source),
                    "--output",
                    str(self.output),
                ),
                *("--model", "custom:tests.models.HashModel", "--model-args", json.dumps(self._model_args)),
                *(
                    *(("--id-column", self.id_column) if self.id_column else ()),
                    "--shard-rows",
                    "20",
                    "--num-actors",
                    str(self._num_actors),
                    *self._share,
                    *address,
                    *options,
                ),
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def finish(self, *options: str) -> None:
        """Run the command to its end."""
        process = self.start(*options)
        _, stderr = process.communicate(timeout=240)
        if process.returncode:
            raise AssertionError(f"exit code {process.returncode}:\n{stderr.decode()[-4000:]}")

    def num_committed(self) -> int:
        """Count the commit records."""
        return len(list(open_storage(str(self.output)).names(COMMITS)))

    def wait_for_commits(self, number: int, process: subprocess.Popen[bytes]) -> None:
        """Wait until so many shards are committed, or the command ends."""
        wait_until(lambda: self.num_committed() >= number or process.poll() is not None)

    def kill_at(self, chance: random.Random, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL the command's own process at some instant: while it starts, or between its first commit and its last."""
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0, 6))
        else:
            self.wait_for_commits(self.num_committed() + 1, process)
            time.sleep(chance.uniform(0, 1))
        process.kill()
        process.communicate()

    def local_output(self) -> Path:
        """Return where the output can be read."""
        return Path(self.output)

    def check(self) -> None:
        """Make sure that every row is in the output exactly once, with its own vector, or in the rejects."""
        output = self.local_output()
        table = pads.dataset(output / "data").to_table()
        ids = table["id"].to_pylist()
        assert sorted(ids) == sorted(self.expected)
        for name, vector in zip(ids, table["embedding"].to_pylist(), strict=True):
            np.testing.assert_array_equal(np.float32(vector), self.expected[name])
        lines = [line for path in output.glob("_engine/rejects/*") for line in path.read_text().splitlines()]
        assert sorted(json.loads(line)["id"] for line in lines) == sorted(self.rejected)
        verdict = self.verdict()
        assert verdict["ok"], verdict["findings"]
        assert not any("cannot be told" in warning for warning in verdict["warnings"])
        assert (verdict["num_rows"], verdict["num_rejects"], verdict["num_shards"]) == (1186, 14, self.num_shards)

    def verdict(self) -> dict[str, Any]:
        """Verify the output, every byte of it, against its source."""
        return engine.verify(self.output, "full").as_json()


class BucketJob(Job):
    """The same job, from a bucket into a bucket."""

    def __init__(self, folder: Path, address: str | None, bucket: str) -> None:
        super().__init__(folder, address)
        self.source, self.output = f"{bucket}/{folder.name}/in", f"{bucket}/{folder.name}/out"
        for path in (folder / "in").iterdir():
            open_storage(self.source).create(path.name, path.read_bytes())

    def num_committed(self) -> int:
        """Count the commit records where the server keeps them: who waits for them asks again and again."""
        prefix = place_of(f"{self.output}/{COMMITS}").key
        return sum(key.startswith(prefix) for key in keys())

    def local_output(self) -> Path:
        copy = self._folder / "copy"
        prefix = place_of(str(self.output)).key + "/"
        for key, found in keys().items():
            if key.startswith(prefix):
                path = copy / key.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(found.value)
        return copy


class HubJob(Job):
    """The same job, from a data set of the Hub; the environment has to lead to it."""

    def __init__(self, folder: Path, address: str | None, hub: Hub) -> None:
        super().__init__(folder, address)
        hub.push({f"data/{path.name}": path.read_bytes() for path in (folder / "in").iterdir()})
        self.source = f"{SET}/data"

    def verdict(self) -> dict[str, Any]:
        """Verify it in another process: this one has settled that there is no Hub."""
        command = [sys.executable, str(ROOT / "jobs/verify.py"), str(self.output), "--level", "full", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def wait_until(is_true: Callable[[], bool], timeout_s: float = 120) -> None:
    """Wait for something to be true; fail if it does not get so in time."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_s} s")
        time.sleep(0.01)


def kill_worker(title: str, below: int, while_running: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """SIGKILL one of Ray's workers whose title begins so, below the process `below`, as soon as there is one; say if one was."""
    while while_running.poll() is None:
        found = [
            process
            for process in psutil.Process(below).children(recursive=True)
            if " ".join(_command_of(process)).startswith(title)
        ]
        if found:
            try:
                os.kill(chance.choice(found).pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            return True
        time.sleep(0.001)
    return False


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
