"""
What is set for Ray before it is imported: it reads its settings from the environment as it is, and never again.

It knows nothing else of Ray, and `import engine` brings it, so that `import engine` before `import ray` is all that it takes.
"""

from __future__ import annotations

import os
import sys

MAX_READER_CRASHES = 20
"""Of one read task. More than of an actor over a parcel: a task is long, and a node that is lost with what it has read counts too."""

SETTINGS = {
    # A lost node's actors are out of reach until Ray notices, after a quarter of a minute or more. By default a call to them counts as
    # a crash after a second of that, and five of those end the run.
    "RAY_timeout_ms_task_wait_for_death_info": "90000",
    # Ray counts apart what it kills for a node's memory, by default without an end.
    "RAY_task_oom_retries": str(MAX_READER_CRASHES),
}
"""Of the driver."""

came_too_late = "ray._raylet" in sys.modules and not SETTINGS.keys() <= os.environ.keys()
"""Ray was imported before, without them."""

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
