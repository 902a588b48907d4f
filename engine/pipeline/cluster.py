"""The cluster: join the one that is there, or start one on this machine, and leave the caller's as it was."""

from __future__ import annotations

import gc
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import ray
import ray.data
import ray.util.client
from ray._private import ray_constants
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import (
    AuthenticationError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.placement_group import placement_group, remove_placement_group

from engine import ray_settings
from engine.errors import ConfigError, EngineError
from engine.pipeline.address import Address

if TYPE_CHECKING:
    from engine.pipeline.resources import Resources

logger = logging.getLogger(__name__)

NO_NODE_S = 1800.0
"""An autoscaler that has not brought a node that fits by then is not going to."""
POLL_S = 1

RAYS_ADVICE = "\nFailed to apply UDF"
"""How what Ray Data adds to an error's own message begins: its retries, which the engine's errors are none of."""
RAY_LOGGERS = ("ray", "ray.data")
NOTICES_OF_TOKENS = "ray._private.authentication"


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """
    Have a Ray to run on: the process's own if it has one, else that at `address`, else one on this machine.

    What was started or joined here is left at the end.

    Raises:
        ConfigError: If there is no cluster at `address`, or none that lets this process in, or the process has joined one by Ray Client.
    """
    if ray.is_initialized():
        _check_joined()
        try:
            yield
        except BaseException:
            gc.collect()  # what an error came through in Ray is in cycles, handles to actors among it: until then they keep their GPUs
            raise
        return
    # Ray's workers are nice to others by default, its own daemons among them, for which the models' threads would wait.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if (found := Address.of(address)) is not None:
        found.check()
    try:
        with nullcontext() if found else _on_loopback():
            ray.init(address=address, logging_level=logging.WARNING, include_dashboard=None if found else False)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        what = f"join the Ray at {found.text}, by {found.origin}" if found else "start a Ray on this machine"
        raise ConfigError(f"cannot {what} ({_reason(error)})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_joined() -> None:
    """Make sure that a run can be driven from this process, which has a Ray already."""
    if ray.util.client.ray.is_connected():
        raise ConfigError(
            "this process has joined a cluster by Ray Client (ray://), through which a run cannot be driven: submit it as a job (ray job "
            "submit), or run it on a node of the cluster"
        )
    if ray_settings.came_too_late:
        logger.warning(
            "Ray was imported before the engine, and does without its settings: a node that is lost, or out of memory, may end the run. "
            "`import engine` before `import ray`"
        )


@contextmanager
def _on_loopback() -> Iterator[None]:
    """
    Let a Ray that is started here listen for this machine alone: it is for one run.

    By default all its processes listen on every interface. This is what Ray does on macOS and Windows; it reads the variable for it
    (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER) as it is imported, when nobody knows yet whether one is to be joined.
    """
    before, notices = ray_constants.ENABLE_RAY_CLUSTER, logging.getLogger(NOTICES_OF_TOKENS)
    level = notices.level
    ray_constants.ENABLE_RAY_CLUSTER = False
    notices.setLevel(logging.ERROR)  # that it asks for a token is nobody's concern: it is the engine's own
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        notices.setLevel(level)


def _reason(error: Exception) -> str:
    """Say why Ray did not start or was not joined. Of values that do not suit it only that: they may be of a runtime_env, with keys."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, (OSError, RuntimeError, AuthenticationError)) else name


@contextmanager
def settings(**wanted: object) -> Iterator[None]:
    """
    Set fields of Ray Data's context for a while, and keep its own bars and notices off the screen.

    The engine shows the progress and says what failed itself; Ray's log files still tell all. What the caller had set is put
    back at the end.
    """
    wanted |= dict.fromkeys(
        ("enable_progress_bars", "enable_operator_progress_bars", "print_on_execution_start"), False
    )
    wanted["raise_original_map_exception"] = True  # else Ray passes on the text of an error, and not the error
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in wanted}
    for name, value in wanted.items():
        setattr(context, name, value)
    try:
        with _quiet_console(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")
            # max_task_retries has no named parameter yet; pyproject.toml holds Ray below the version that needs it.
            warnings.filterwarnings("ignore", message=r"\s*`ray_remote_args` is deprecated")
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


@contextmanager
def _quiet_console() -> Iterator[None]:
    """Let Ray Data's loggers write to their files alone."""
    loggers = [logging.getLogger(name) for name in RAY_LOGGERS]
    handlers = [
        handler for logger in loggers for handler in logger.handlers if isinstance(handler, logging.StreamHandler)
    ]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


@contextmanager
def translated() -> Iterator[None]:
    """Turn what Ray wraps around an error of a task back into that error."""
    try:
        yield
    except Exception as error:
        found = _engine_error(error)
        if found is not None:
            _let_go(error)
            found.args = (found.message.partition(RAYS_ADVICE)[0], *found.args[1:])
            raise found from None
        if isinstance(error, RayActorError):
            raise EngineError(
                "an actor that embeds, or a publisher, died again and again over the same shard: a text, its GPU, its node's memory or the output's "
                "disk may be the cause. What was committed is kept. Smaller shards in a new output (--shard-rows) narrow it down; Ray's "
                "logs are in /tmp/ray/session_latest/logs"
            ) from error
        if isinstance(error, OutOfMemoryError):
            raise EngineError(
                "Ray killed the same reader or actor again and again, since its node was out of memory. What was committed is kept. Smaller "
                "shards in a new output (--shard-rows), or fewer actors (--num-actors), need less; Ray's logs are in "
                "/tmp/ray/session_latest/logs"
            ) from error
        if isinstance(error, WorkerCrashedError):  # of a task, and only readers are tasks
            raise EngineError(
                "a reader died again and again over the same files: one that makes its library crash, or a node's memory, may be the "
                "cause. What was committed is kept. Runs over some of the files into a new output (--source) narrow it down; what the "
                "reader said last is in Ray's logs in /tmp/ray/session_latest/logs (worker-*.err)"
            ) from error
        if isinstance(error, ExecutionTimeoutError):
            raise EngineError(_stalled()) from error
        if isinstance(error, RayError):
            raise EngineError(
                f"Ray failed ({type(error).__name__}); what was committed is kept, and the same command resumes. "
                "Its logs are in /tmp/ray/session_latest/logs"
            ) from error
        raise


def _let_go(error: BaseException) -> None:
    """
    Take the tracebacks off an error of Ray's and all that led to it.

    Their frames have handles to actors: for as long as somebody kept the error, as a notebook does with its last one, an actor would keep
    its GPU. They say where in Ray an error of ours came through, which nobody is shown.
    """
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            left += [getattr(one, "cause", None), one.__cause__, one.__context__]


def wait_for_room(chosen: Resources, seconds: float, still_ours: Callable[[], None]) -> None:
    """
    Wait for a node that can hold an actor, where there is none; an autoscaler is asked for one.

    Not the stream's to wait for: Ray Data has one limit for all that may stand still, and a shard may take longer than a node to come.

    Args:
        chosen: What an actor gets.
        seconds: After which the run is given up.
        still_ours: Called now and then; raises if the output is not this run's any more.

    Raises:
        EngineError: If none came.
    """
    needs = {kind: amount for kind, amount in (("CPU", chosen.num_cpus), ("GPU", chosen.num_gpus)) if amount}
    asked = placement_group([needs])
    until = time.monotonic() + seconds
    try:
        while not asked.wait(POLL_S):
            still_ours()
            if time.monotonic() > until:
                raise EngineError(_stalled())
    finally:
        remove_placement_group(asked)


def _stalled() -> str:
    return (
        "nothing moved for as long as --stall-s allows, and the run was given up; what was committed is kept, and the same command "
        f"resumes. {_who_waits()} Ray's logs are in /tmp/ray/session_latest/logs"
    )


def _who_waits() -> str:
    """Say what may be the matter with a run that stands still."""
    try:
        free = ray.available_resources()
        has = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
        return f"Of {summary(capacity())}, {has} are free: do the actors fit on a node, or does the model hang?"
    except Exception:  # Ray itself may be what stands still
        return "Is the cluster well?"


def _engine_error(error: BaseException | None) -> EngineError | None:
    """Find the engine's own error in a chain of causes; Ray's hybrids, which are of its class too, are not it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, EngineError) and not isinstance(error, RayTaskError):
            return error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def summary(nodes: Sequence[Mapping[str, float]]) -> str:
    """Return what a cluster has, such as `3 nodes, 24 CPU, 4 GPU`."""
    totals = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    has = "".join(f", {total:g} {kind}" for kind, total in totals.items() if total)
    return f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}{has}"


def capacity() -> list[dict[str, float]]:
    """Return the resources of each node, such as {"CPU": 8.0, "GPU": 2.0}."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
