"""
The metrics of a run, as Ray exports them to Prometheus: counted by the driver, receipt by receipt.

Labels are the model and the job's fingerprint, cut short: few, however many rows, shards or runs there are. Idle shares and rates are
ratios of counters (deploy/grafana.json has them), so that they are right over any time and any number of runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from engine.commits import Receipt

PREFIX = "engine_"
LABELS = ("model", "fingerprint")
"""None is called `job`, as Prometheus calls what it scrapes: of ours it would make `exported_job`."""
FINGERPRINT_LENGTH = 8
COUNTERS = {
    "rows": ("num_rows", "Rows that got a vector."),
    "rejects": ("num_rejects", "Rows that were rejected."),
    "tokens": ("num_tokens", "Tokens that the model took."),
    "padded_tokens": ("num_padded_tokens", "Tokens that devices computed, padding among them."),
    "device_seconds": ("embed_s", "Seconds for which devices were shards'."),
    "device_busy_seconds": ("busy_s", "Of those, seconds in which they computed."),
    "requests": ("num_requests", "Requests to a provider."),
    "refusals": ("num_refusals", "Requests to which the provider asked to wait."),
    "retries": ("num_retries", "Requests that were sent again since they had failed."),
    "dollars": ("cost", "Dollars that the provider takes."),
}
"""Name, field of a receipt, and what it says. Prometheus sees them with `ray_` before and `_total` behind."""
SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]


class Metrics:
    """
    What of a run is exported.

    Args:
        model: As the config names it.
        fingerprint: Of the job.
        pending_rows: How many there are to embed.
    """

    def __init__(self, model: str, fingerprint: str, pending_rows: int) -> None:
        self._labels = dict(zip(LABELS, (model, fingerprint[:FINGERPRINT_LENGTH]), strict=True))
        self._counters = {
            field: self._labelled(Counter(PREFIX + name, description, LABELS))
            for name, (field, description) in COUNTERS.items()
        }
        self._latency = self._labelled(
            Histogram(PREFIX + "shard_seconds", "Seconds for which a device was a shard's.", SECONDS, LABELS)
        )
        self._left = self._labelled(
            Gauge(PREFIX + "rows_left", "Rows of this run that are neither embedded nor rejected.", LABELS)
        )
        self._num_left = pending_rows
        self._left.set(pending_rows)

    def add(self, receipt: Receipt) -> None:
        """Count one shard."""
        for field, counter in self._counters.items():
            if value := getattr(receipt, field):  # Ray refuses to add nothing
                counter.inc(value)
        if receipt.embed_s:
            self._latency.observe(receipt.embed_s)
        self._num_left -= receipt.num_rows + receipt.num_rejects
        self._left.set(self._num_left)

    def _labelled(self, metric: Any) -> Any:
        metric.set_default_tags(self._labels)
        return metric
