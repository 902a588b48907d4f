"""How results show themselves."""

from __future__ import annotations

import pytest

from engine.results import Finding, PlanResult, VerifyResult
from engine.wording import dollars


@pytest.fixture
def plan() -> PlanResult:
    return PlanResult(
        output="/out/<b>", model="m", fingerprint="f", num_files=1, num_rows=2000, num_bytes=5, num_shards=2, shard_rows=1000,
        done_shards=1, done_rows=1000, pending_files=1, pending_shards=1, pending_rows=1000, pending_bytes=1200, warnings=["a & b"],
    )  # fmt: skip


def test_a_result_is_a_table_in_a_notebook(plan):
    """The lines of the terminal, and the warnings; what looks like HTML in a path is text."""
    shown = plan._repr_html_()
    assert "1,000 rows in 1 shard of 1 file, about 1.2 kB of text" in shown
    assert "/out/&lt;b&gt;" in shown
    assert "warning: a &amp; b" in shown
    assert shown.count("<tr>") == len(plan.lines())


def test_a_verification_shows_what_it_found():
    """In a notebook too."""
    found = VerifyResult("out", "full", 1, 2, 3, None, [Finding("s", "the part <x> is missing", "run again")])
    assert "problem: the part &lt;x&gt; is missing" in found._repr_html_()


def test_money_is_never_said_with_an_exponent():
    """Cents and parts of them; whole dollars with their cents."""
    said = {0: "$0", 0.00003: "$0.00003", 1.2345e-7: "$0.000000123", 0.5: "$0.5", 1: "$1.00", 1234.5: "$1,234.50"}
    assert {amount: dollars(amount) for amount in said} == said
