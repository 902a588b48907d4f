"""What all tests share: no network, and no token between local Rays."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast ones first: those that start Ray go last."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)
