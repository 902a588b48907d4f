"""What all tests share: no network, and no token between local Rays."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"
