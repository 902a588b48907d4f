"""The process of an actor: which engine it has, its threads, its share of a GPU's memory, and its log lines."""

from __future__ import annotations

import logging
import os
import sys

from engine.errors import Refused
from engine.schema import FORMAT_VERSION
from engine.version import __version__

ENGINE = (__version__, FORMAT_VERSION)
"""The engine of this process: what the driver sends beside its work, and as plain values. What else travels has fields that another
engine may take for others."""
ALLOCATED = 0.95
"""Of an actor's share of a GPU's memory: some hundred MB beside it are CUDA's own, in each process."""


def check_engine(driver: tuple[str, int]) -> None:
    """
    Make sure that this process has the driver's engine.

    Args:
        driver: ENGINE, as the driver has it.

    Raises:
        Refused: If it is another one.
    """
    if tuple(driver) != ENGINE:
        told = [f"{version} (format {form})" for version, form in (ENGINE, driver)]
        raise Refused(
            f"the engine on a node is {told[0]}, and the driver's is {told[1]}: install the same on all nodes, or submit the job with its "
            "working directory; then run the same command again"
        )


def set_threads(num_threads: int) -> None:
    """Give the model as many threads as the actor has cores: Ray starts its processes with one."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # what torch goes by when it is imported; not every model needs it
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)  # the tokenizer's
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(num_threads)


def keep_to_share_of_gpu(num_gpus: float) -> None:
    """
    Leave the other actors of a GPU their share of its memory.

    PyTorch keeps what it has once taken: one actor would take all, and another reject texts that its own share has room for.
    """
    torch = sys.modules.get("torch")  # which not every model needs
    if torch is not None and 0 < num_gpus < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(num_gpus * ALLOCATED)


def show_logs(level: int) -> None:
    """Let the engine's log lines out of the actor; Ray carries what a worker prints to the driver."""
    root = logging.getLogger("engine")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
    root.setLevel(level)
