"""The pipeline: shards in, receipts out. The only place that imports Ray."""

import os

# A lost node's actors are out of reach until Ray notices, after a quarter of a minute or more. By default a call to them counts as a
# crash after a second of that, and five of those end the run. Ray reads this as it is imported, in the driver.
os.environ.setdefault("RAY_timeout_ms_task_wait_for_death_info", "90000")
