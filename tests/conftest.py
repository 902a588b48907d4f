"""What all tests share: no network, and no token between local Rays."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"


class RayTogether(LoadScopeScheduling):
    """
    Gives one process all files with tests that start Ray, and the others the rest, test by test.

    On a machine of few cores two Rays that start at once wait so long for each other that they give up. (Groups by marker, `--dist loadgroup`,
    do not work: pytest 9.2 takes no other node ids from pytest-xdist 3.8.)
    """

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if _starts_ray(nodeid.partition("::")[0]) else nodeid


@cache
def _starts_ray(file: str) -> bool:
    return "pytest.mark.ray" in (Path(__file__).parent.parent / file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayTogether:
    return RayTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast ones first: those that start Ray go last."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)
