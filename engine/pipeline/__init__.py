"""The pipeline: shards in, receipts out. The only place that imports Ray."""

import os

# A lost node's actors are out of reach until Ray notices, after a quarter of a minute or more. By default a call to them counts as a
# crash after a second of that, and five of those end the run. Ray reads this as it is imported, in the driver.
os.environ.setdefault("RAY_timeout_ms_task_wait_for_death_info", "90000")

MAX_READER_CRASHES = 20
"""Of one read task. More than of an actor over a parcel: a task is long, and a node that is lost with what it has read counts too."""
# Ray counts apart what it kills for a node's memory, by default without an end. It reads this in the driver, too.
os.environ.setdefault("RAY_task_oom_retries", str(MAX_READER_CRASHES))
