"""The forecast of a plan knows what is reused: what it counts is what the run then sends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import engine
from engine import forecast, reuse, runner
from engine.cli import main
from engine.provider_use import Forecast
from tests.api_servers import DIMENSION, EXACT, numbered
from tests.builders import files
from tests.object_stores import BUCKET, serving
from tests.test_reuse import Run

pytest_plugins = ("tests.api_servers",)
pytestmark = pytest.mark.usefixtures("engine_logger_as_it_was")


class Asked(Run):
    """The same, of a provider's model."""

    def __init__(self, out: str | Path, given: dict[str, list[Any]], server, **options: Any) -> None:
        self.server = server
        options = {"model": f"openai:{EXACT}", "base_url": server.url, "dimensions": DIMENSION} | options
        super().__init__(out, given, token_price=1000.0, **options)

    def planned(self) -> Forecast:
        """Return what `engine plan` says, having made sure that the output is as it was."""
        before = files(self.out)  # nothing of a bucket
        found = engine.plan(**self.config.model_dump(exclude_defaults=True))
        assert files(self.out) == before
        return found.forecast

    def sent(self) -> tuple[int, int]:
        """Run it to its end; return how many texts and tokens the server was then asked for."""
        self.server.reset()
        self()
        stats = self.server.stats()
        return stats["num_embedded"], stats["tokens_paid"]


@pytest.fixture(autouse=True)
def _rooted(key: str) -> None:
    """All of these ask a provider."""


TEXTS = numbered(60, "a text of the first day, number")


def edited() -> list[str | None]:
    """Return the texts with some in front, some edited, some behind; among the new ones duplicates, and rows without a text."""
    return ["in front", *TEXTS[:20], "edited", None, *TEXTS[21:], "", "behind", "behind", TEXTS[5], "behind"]


def test_texts_of_own_former_parts_are_neither_tokens_nor_dollars(server, tmp_path):
    """Of an input that was edited: counted apart, and what is left is what the server is then paid for."""
    first = Asked(tmp_path / "out", {"a.parquet": TEXTS}, server, inputs=tmp_path / "in")
    of_all = first.planned()
    assert of_all.num_reused == 0
    assert "reused" not in of_all.lines()
    assert of_all.num_texts == 60
    assert first.sent() == (of_all.num_texts, of_all.num_tokens)
    changed = Asked(tmp_path / "out", {"a.parquet": edited()}, server, inputs=tmp_path / "in")
    found = changed.planned()
    assert (found.num_reused, found.num_texts, found.num_duplicates, found.num_rejects) == (60, 3, 2, 2)
    assert found.num_tokens < of_all.num_tokens / 20
    assert found.cost == pytest.approx(found.num_tokens / 1000)
    assert found.num_requests == 1
    assert changed.sent() == (found.num_texts, found.num_tokens)
    assert engine.status(tmp_path / "out").num_reused == found.num_reused


def test_texts_of_named_outputs_and_of_former_parts_are_told_together(server, tmp_path, capsys):
    """With `--reuse`, on a terminal and as JSON; what both have counts once, and nothing that is new is lost."""
    Asked(tmp_path / "other", {"b.parquet": [*TEXTS[:10], "only there"]}, server).sent()
    reused = {"reuse": [tmp_path / "other"]}
    fresh = Asked(tmp_path / "out", {"a.parquet": TEXTS}, server, inputs=tmp_path / "in", **reused)
    found = fresh.planned()
    assert (found.num_reused, found.num_texts) == (10, 50)
    assert not (tmp_path / "out").exists()
    assert fresh.sent() == (found.num_texts, found.num_tokens)
    changed = Asked(
        tmp_path / "out", {"a.parquet": [*edited(), "only there"]}, server, inputs=tmp_path / "in", **reused
    )
    config = changed.config
    arguments = ["plan", "--source", config.source[0], "--output", str(config.output), "--model", config.model]
    arguments += ["--base-url", server.url, "--dimensions", str(DIMENSION), "--reuse", str(tmp_path / "other")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "reused" in said
    assert "61 rows, whose vectors are there already" in said
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["forecast"]
    assert (found["num_reused"], found["num_texts"]) == (61, 3)
    assert changed.sent() == (found["num_texts"], found["num_tokens"])
    more = {"c.parquet": ["only there", "edited", *TEXTS[21:]]}
    everything = Asked(tmp_path / "out", more, server, inputs=tmp_path / "in", reuse=[tmp_path / "out"])
    none = everything.planned()
    assert (none.num_reused, none.num_texts, none.num_tokens, none.num_requests, none.cost) == (41, 0, 0, 0, 0)
    assert everything.sent() == (0, 0)


def test_int8_of_another_scale_is_sent_and_counted(server, tmp_path, caplog):
    """As in a run: a warning, and only what the output itself has is not sent; with the same scale nothing is."""
    Asked(tmp_path / "other", {"b.parquet": TEXTS}, server, output_dtype="int8").sent()
    options = {"inputs": tmp_path / "in", "output_dtype": "int8", "reuse": [tmp_path / "other"]}
    for scale, out in ((Run.scale / 2, "halved"), (Run.scale, "same")):
        first = Asked(tmp_path / out, {"a.parquet": ["new 1", "new 2"]}, server, **options)
        first.scale = scale
        first.sent()
        caplog.clear()
        changed = Asked(tmp_path / out, {"a.parquet": ["new 2", "new 3", *TEXTS]}, server, **options)
        changed.scale = scale
        found = changed.planned()
        has_warned = "have another scale" in caplog.text
        assert (has_warned, found.num_reused) == ((True, 1) if out == "halved" else (False, 61))
        assert changed.sent() == (found.num_texts, found.num_tokens)


def test_of_a_large_job_the_reused_are_estimated_from_the_sample(server, tmp_path, monkeypatch):
    """Their share of the shards that are read is that of all; a job with nothing to reuse builds no index."""
    texts = numbered(400)
    first = Asked(tmp_path / "out", {"a.parquet": texts}, server, inputs=tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(reuse, "_hashes", None)  # what reads the parts
        whole = first.planned()
    first.sent()
    changed = Asked(tmp_path / "out", {"a.parquet": [text if row % 5 else f"{text}!" for row, text in enumerate(texts)]},
                    server, inputs=tmp_path / "in")  # fmt: skip
    assert changed.planned().num_reused == 320
    monkeypatch.setattr(forecast, "SAMPLE_BYTES", changed.asked.standing.plan.pending_bytes // 4)
    found = changed.planned()
    assert not found.is_exact
    assert found.num_reused == pytest.approx(320, rel=0.1)
    assert found.num_tokens == pytest.approx(whole.num_tokens / 5, rel=0.3)
    assert changed.sent()[0] == 80


def test_a_plan_for_a_bucket_reads_parts_there_and_puts_nothing_there(server, tmp_path, monkeypatch):
    """The index is on the disk of who plans, and gone afterwards."""
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with serving() as store:
        out = f"s3://{BUCKET}/{tmp_path.name}/out"
        Asked(out, {"a.parquet": TEXTS}, server, inputs=tmp_path / "in").sent()
        changed = Asked(out, {"a.parquet": edited()}, server, inputs=tmp_path / "in")
        store.seen.clear()
        found = changed.planned()
        assert found.num_reused == 60
        assert not [request for request in store.seen if request.startswith(("PUT", "POST", "DELETE"))]
        assert store.seen
        assert changed.sent() == (found.num_texts, found.num_tokens)
    assert not list((tmp_path / "tmp").iterdir())
