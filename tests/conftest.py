"""What all tests share: no network, and no token between local Rays."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from tests.object_stores import Store

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # so that Rays listen on loopback; those of several nodes cannot
# Ray ends workers that are idle for a second, and a new one takes two seconds of CPU: most of what a small run costs.
os.environ |= {"RAY_idle_worker_killing_time_threshold_ms": "600000", "RAY_num_workers_soft_limit": "8"}

import engine  # noqa: F401 - before ray, as a user is told to

settings.register_profile("tests", deadline=None, database=None, derandomize=True)
settings.load_profile("tests")

GUIDES = "tests/test_docs.py"
"""They take minutes, and the process that has all other tests with Ray is the last one to be done."""


class RayTogether(LoadScopeScheduling):
    """
    Gives one process all files with tests that start Ray, but the guides, and the others the rest, test by test.

    On a machine of few cores Rays that start at once wait so long for each other that they give up; the guides start one, and keep it. (Groups
    by marker, `--dist loadgroup`, do not work: pytest 9.2 takes no other node ids from pytest-xdist 3.8.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if _starts_ray(file) and file != GUIDES else nodeid


@cache
def _starts_ray(file: str) -> bool:
    return "pytest.mark.ray" in (Path(__file__).parent.parent / file).read_text()


@cache
def _shares_ray(file: Path) -> bool:
    return "shared_ray" in file.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayTogether:
    return RayTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast ones first: those that start Ray go last, and of these the files that share one go before those that have their own."""
    items.sort(key=lambda item: (item.get_closest_marker("ray") is not None, not _shares_ray(item.path)))


@pytest.fixture(scope="module", autouse=True)
def _own_ray(request: pytest.FixtureRequest) -> None:
    """End the Ray that files share, before a file begins that has its own."""
    if _starts_ray(request.node.nodeid) and not _shares_ray(request.path):
        import ray

        ray.shutdown()


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[str]:
    """
    The address of a Ray in this process, which outlives what is run on it, with the workers that former runs left idle.

    It has two cores and four GPUs that are only numbers, and its workers have a provider's key.
    """
    import ray

    if not ray.is_initialized():
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
            environment.setenv("OPENAI_API_KEY", "sk-of-the-cluster")
            ray.init(
                address="local",
                num_cpus=2,
                num_gpus=4,
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
            )
    yield ray.get_runtime_context().gcs_address
    assert ray.is_initialized(), "the engine leaves a Ray of the caller's running"


@pytest.fixture
def engine_logger_as_it_was() -> Iterator[None]:
    """For tests that call an actor as Ray does: it lets the engine's lines out, and here it is no process of its own."""
    logger = logging.getLogger("engine")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Store]:
    """An S3 on loopback, for the tests of a file."""
    from tests.object_stores import serving

    with serving() as store:
        yield store


@pytest.fixture
def s3(s3_server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The same, which is well at first, and has seen nothing; and waits that are short."""
    from engine.buckets import bucket

    monkeypatch.setattr(bucket, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(bucket, "LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(bucket, "PATIENCE_S", 20.0)
    s3_server.seen.clear()
    yield s3_server
    s3_server.heal()


@pytest.fixture(autouse=True)
def _actors_have_left(request: pytest.FixtureRequest) -> None:
    """
    Wait until the cores of a shared Ray are free.

    After a run that failed, an actor keeps its own until Python collects what led to it: up to a second, so it is asked to only then.
    """
    if "shared_ray" not in request.fixturenames:
        return
    import ray

    from tests.kills import wait_until

    def are_free() -> bool:
        return bool(ray.available_resources().get("CPU") == 2)

    def are_freed() -> bool:
        gc.collect()
        return are_free()

    request.getfixturevalue("shared_ray")
    if not are_free():
        wait_until(are_freed)
