"""Real Ray clusters of several raylets on this machine, whose nodes come, are told to go, and die."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray._raylet import GcsClient

from tests.builders import free_port
from tests.kills import ROOT, wait_until
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
        self._process = subprocess.Popen(
            [RAY, "start", "--block", f"--node-ip-address={ip}", f"--temp-dir={folder}", *words],
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

    def _processes(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class Cluster:
    """
    A head without a dashboard, and the nodes that are added to it.

    Args:
        folder: A short path: sockets go below it.
        environment: Of its nodes.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self._folder = folder
        # A raylet gives up if its agent takes longer to start than this, as it may on a busy machine.
        self._environment = {"PYTHONPATH": str(ROOT), "RAY_agent_register_timeout_ms": f"{START_S}000"} | environment
        self.nodes: list[Node] = []
        self._port = free_port()
        self.address = f"{_ip(0)}:{self._port}"

    def begin(self, *words: str) -> None:
        """Start the head; it is given what else `ray start` is told."""
        (self.head,) = self._joined(["--head", f"--port={self._port}", "--include-dashboard=false", *words])

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
        agent = f"--dashboard-agent-listen-port={free_port()}"
        self.nodes.append(Node([agent, *words], self._folder / str(number), _ip(number), self._environment))
        return self.nodes[-1]

    def alive(self) -> dict[str, str]:
        """Return the ids of the nodes that are alive, by their addresses."""
        with socket.socket() as probe:
            if probe.connect_ex((_ip(0), self._port)):
                return {}
        nodes = GcsClient(address=self.address).get_all_node_info(timeout=10).items()
        return {info.node_manager_address: key.hex() for key, info in nodes if info.state == info.ALIVE}

    def close(self) -> None:
        """End all nodes."""
        for node in reversed(self.nodes):
            node.kill()


def _ip(number: int) -> str:
    return f"127.0.0.{number + 2}"


class PlacedModel(HashModel):
    """
    Notes where it works, and waits where it is told to.

    Args:
        folder: For its notes, `calls`, a line for each call with its node, GPUs and texts; and for `held`, in which a test writes
            the nodes that are to wait in the middle of a shard, or `all`.
        options: Of HashModel.
    """

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self.folder = Path(folder)

    async def embed(self, texts: list[str]) -> np.ndarray:
        context = ray.get_runtime_context()
        node = context.get_node_id()
        while (held := (self.folder / "held").read_text()) == "all" or node in held:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.05)
        vectors = await super().embed(texts)
        line = {"node": node, "gpus": context.get_accelerator_ids()["GPU"], "texts": texts}
        with (self.folder / "calls").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return vectors


def calls(folder: Path) -> list[dict[str, Any]]:
    """Return the notes of PlacedModel."""
    file = folder / "calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
