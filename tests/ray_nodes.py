"""Real Ray clusters of several raylets on this machine, whose nodes come, are told to go, and die."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated.autoscaler_pb2 import NodeStatus

from engine.models.base import PROBE
from tests.builders import free_port
from tests.kills import wait_until
from tests.models import HashModel

RAY = str(Path(sys.executable).with_name("ray"))
TRIES = 3
START_S = 150


class Node:
    """
    One `ray start --block`, and all that it starts.

    Args:
        words: Of the command, after `ray start --block`.
        folder: For its session. Each node needs one of its own: a raylet that is to run a job replaces the job's working
            directory in its session folder, and with it that of another raylet's running job, if they share the folder.
        ip: One of the loopback's. Ray would take 127.0.0.1 for the machine's address to the outside.
        environment: Of its processes, besides this one's.
    """

    def __init__(self, words: Sequence[str], folder: Path, ip: str, environment: dict[str, str]) -> None:
        self.ip = ip
        self.id = ""
        self._agent_port = free_port()
        self._process = subprocess.Popen(
            [
                *(RAY, "start", "--block", f"--node-ip-address={ip}", f"--temp-dir={folder}"),
                *(f"--dashboard-agent-listen-port={self._agent_port}", *words),
            ],
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        """SIGKILL all its processes at once, as if the machine were gone."""
        stopped: set[psutil.Process] = set()
        while found := set(self._processes()) - stopped:
            for process in found:
                process.suspend()  # so that none sees another one gone, or starts one
            stopped |= found
        for process in stopped:
            process.kill()
        self._process.wait(20)
        psutil.wait_procs(list(stopped), 20)

    def notice(self) -> None:
        """SIGTERM the command alone, as Kubernetes does with a pod, and `ray stop` with a node."""
        self._process.terminate()

    def is_gone(self) -> bool:
        return self._process.poll() is not None

    def has_agent(self) -> bool:
        return _listens(self.ip, self._agent_port)

    def _processes(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class Cluster:
    """
    A head that takes jobs, and the nodes that are added to it.

    Args:
        folder: A short path: sockets go below it.
        environment: Of its nodes. They know nothing of this repository: what they run comes with the job.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self._folder = folder
        # A raylet gives up if its agent takes longer to start than this, as it may on a busy machine.
        self._environment = {
            "PYTHONPATH": "",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # of the job's `python`
            "RAY_agent_register_timeout_ms": f"{START_S}000",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        } | environment
        self.nodes: list[Node] = []
        self._port = free_port()
        self.address = f"{_ip(0)}:{self._port}"
        self.jobs = f"http://{_ip(0)}:{free_port()}"

    def begin(self, *words: str) -> None:
        """Start the head; it is given what else `ray start` is told."""
        dashboard = [f"--dashboard-host={_ip(0)}", f"--dashboard-port={self.jobs.rpartition(':')[2]}"]
        (self.head,) = self._joined(["--head", f"--port={self._port}", *dashboard, *words])
        # Jobs are taken by the one and started by the other; the command that submits waits for it, but not for long.
        wait_until(lambda: takes_jobs(self.jobs) and self.head.has_agent(), START_S)

    def add(self, *nodes: Sequence[str]) -> list[Node]:
        """Start nodes at once, and wait until they are of the cluster; each is given what else `ray start` is told."""
        return self._joined(*[[f"--address={self.address}", *words] for words in nodes])

    def _joined(self, *nodes: Sequence[str]) -> list[Node]:
        joined = [self._start(words) for words in nodes]
        for place, words in enumerate(nodes):
            for _ in range(TRIES):
                node = joined[place]
                wait_until(lambda node=node: node.ip in self.alive() or node.is_gone(), START_S)
                if not node.is_gone():
                    break
                joined[place] = self._start(words)
            joined[place].id = self.alive()[joined[place].ip]
        return joined

    def _start(self, words: Sequence[str]) -> Node:
        number = len(self.nodes)
        self.nodes.append(Node(words, self._folder / str(number), _ip(number), self._environment))
        return self.nodes[-1]

    def alive(self) -> dict[str, str]:
        """Return the ids of the nodes that are alive, by their addresses."""
        if not _listens(_ip(0), self._port):
            return {}
        nodes = GcsClient(address=self.address).get_all_node_info(timeout=10).items()
        return {info.node_manager_address: key.hex() for key, info in nodes if info.state == info.ALIVE}

    def draining(self) -> set[str]:
        """Return the ids of the nodes that were told to go, and have not gone yet."""
        state = get_cluster_resource_state(GcsClient(address=self.address))
        return {node.node_id.hex() for node in state.node_states if node.status == NodeStatus.DRAINING}

    def close(self) -> None:
        """End all nodes."""
        for node in reversed(self.nodes):
            node.kill()


def takes_jobs(url: str) -> bool:
    """Say whether the Jobs API is there: the command that submits takes seconds to find out."""
    try:
        with urllib.request.urlopen(f"{url}/api/jobs/", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def _listens(ip: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((ip, port)) == 0


def _ip(number: int) -> str:
    return f"127.0.0.{number + 2}"


class PlacedModel(HashModel):
    """
    Notes where it works, and waits where it is told to, in the middle of a shard.

    Args:
        folder: For its notes, a line for each call with its node, GPUs and texts: in `begun` before it waits, and then in `calls`, or
            in `failed`; and for what `hold` writes.
        options: Of HashModel.
    """

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self.folder = Path(folder)

    async def embed(self, texts: list[str]) -> np.ndarray:
        context = ray.get_runtime_context()
        line = {"node": context.get_node_id(), "gpus": context.get_accelerator_ids()["GPU"], "texts": texts}
        self._note("begun", line)
        while self._is_held(line["node"], texts):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.05)
        try:
            vectors = await super().embed(texts)
        except RuntimeError:
            self._note("failed", line)
            raise
        self._note("calls", line)
        return vectors

    def _note(self, name: str, line: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _is_held(self, node: str, texts: list[str]) -> bool:
        held = json.loads((self.folder / "held").read_text())
        if texts == [PROBE]:  # the engine's own, in the middle of a shard that went through
            return False
        return (held["nodes"] == "all" or node in held["nodes"]) and not set(texts) & set(held["but"])


def hold(folder: Path, nodes: Collection[str] | str = (), but: Collection[str] = ()) -> None:
    """
    Let PlacedModel wait.

    Args:
        folder: For its notes.
        nodes: On which, by their ids; or `all`. None ends the waiting.
        but: Texts that need not.
    """
    unfinished = folder / "held-unfinished"
    unfinished.write_text(json.dumps({"nodes": nodes if nodes == "all" else list(nodes), "but": list(but)}))
    unfinished.replace(folder / "held")  # or it may be read while it is empty


def calls(folder: Path, name: str = "calls") -> list[dict[str, Any]]:
    """Return the notes of PlacedModel: `calls`, `begun` or `failed`."""
    file = folder / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
