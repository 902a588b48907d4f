"""What all tests share: no network, and no token between local Rays."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast ones first: those that start Ray go last; where several processes run tests, one of them has all of these."""
    items.sort(key=_starts_ray)
    for item in filter(_starts_ray, items):
        item.add_marker(pytest.mark.xdist_group("ray"))


def _starts_ray(item: pytest.Item) -> bool:
    return item.get_closest_marker("ray") is not None
