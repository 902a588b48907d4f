"""The process of an actor: which engine it has, its threads, its GPU or its share of one, and its log lines."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

from engine.errors import Refused
from engine.schema import FORMAT_VERSION
from engine.version import __version__

logger = logging.getLogger(__name__)

ENGINE = (__version__, FORMAT_VERSION)
"""The engine of this process: what the driver sends beside its work, and as plain values. What else travels has fields that another
engine may take for others."""
ALLOCATED = 0.95
"""Of an actor's share of a GPU's memory: some hundred MB beside it are CUDA's own, in each process."""
SWITCH_S = 1e-4
"""In place of Python's 5 ms: for so long a thread that launches kernels waits for the interpreter after each, beside one that runs Python (decision 10)."""


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


def switch_threads_soon() -> None:
    """Let no thread that makes Python objects of tokens keep those that launch a GPU's kernels from the interpreter for long."""
    sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))


def warn_of_unseen_gpu(num_gpus: float, device: str) -> None:
    """
    Say that a GPU stands still: Ray counts them without torch, and a model that finds none runs on a core.

    Args:
        num_gpus: Of the actor.
        device: That the model runs on; empty if it does not say.
    """
    torch = sys.modules.get("torch")  # which not every model needs
    if num_gpus and torch is not None and device.partition(":")[0] == "cpu" and not torch.cuda.is_available():
        logger.warning(
            "this actor was given a GPU that torch %s does not see, and runs on a CPU core: torch is a build for CPUs, or the node's driver "
            "is too old for it (python -c 'import torch; torch.zeros(1).cuda()' tells). With --device cuda such a run ends at once; "
            "--device cpu leaves GPUs alone, and uses all cores",
            torch.__version__,
        )


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


def end(why: str) -> NoReturn:
    """End this process here and now, as a crash would: Ray starts another, and gives it the shards of this one."""
    logger.error("%s: this process ends, and another takes its place", why)
    os._exit(1)
