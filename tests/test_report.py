"""The report: its numbers, its sample, that nothing in an output becomes markup, and how it looks in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine.calibration import Calibration, fix
from engine.cli import main
from engine.commits import Usage
from engine.config import load_config
from engine.errors import ConfigError
from engine.ledger import Ledger, part_name
from engine.reporting.health import NEAR, health_of
from engine.reporting.page import brief
from engine.reporting.timeline import MAX_SLOTS, Timeline
from engine.schema import EMBEDDING, SOURCE_ROW, TEXT_HASH, Reject, Shard, vectors_type
from engine.storage import LocalStorage
from engine.survey import survey
from engine.switches import Switch
from tests.browser import NoBrowser, browser
from tests.builders import hashes_of

DIMENSION = 16
ROWS, SHARD_ROWS = 240, 40
NASTY = (
    "</script><script>alert(1)</script><!-- <img src='http://evil.example/x.png' onerror=alert(2)> &lt;b&gt; %{y} $x$"
)
START = datetime(2026, 11, 25, 9, tzinfo=UTC)
SUBJECTS = ("whales swim in deep water", "bread wants flour and patience", "trains leave the station late")


def vectors() -> np.ndarray:
    """Three clouds; rows 1 and 2 the same, 3 and 4 nearly, 5 far too long, and the last dimension says nothing."""
    chance = np.random.default_rng(0)
    made = np.eye(3, DIMENSION)[np.arange(ROWS) % 3] + 0.12 * chance.normal(size=(ROWS, DIMENSION))
    made[:, -1] = 0
    made *= np.sqrt(1 - 0.25**2) / np.linalg.norm(made, axis=1, keepdims=True)
    made[2] = made[1]
    made[4] = made[3] + 0.01 * made[0]
    made[4] *= np.linalg.norm(made[3]) / np.linalg.norm(made[4])
    made[5] *= 3
    made[:, -1] = 0.25
    return made.astype(np.float32)


def make_output(
    folder: Path, *, keep: tuple[str, ...] = ("text", "subject", "number"), num_shards: int = 6, **options: Any
) -> Path:
    """Publish an output as a run leaves it, without Ray: six shards of 40 rows, of which rows 7 and 50 are rejects."""
    (folder / "in").mkdir(parents=True)
    texts: list[str | None] = [f"{SUBJECTS[row % 3]}, says number {row}. " * (1 + row % 7) for row in range(ROWS)]
    texts[0], texts[7] = NASTY, None
    subjects = [SUBJECTS[row % 3].split()[0] for row in range(ROWS)]
    source = pa.table(
        {
            "id": [f"<i>{row}</i>" if row in (0, 7) else f"row-{row}" for row in range(ROWS)],
            "text": texts,
            "subject": subjects,
            "number": list(range(ROWS)),
        }
    )
    pq.write_table(source, folder / "in/a.parquet")
    config = load_config(
        source=str(folder / "in"),
        output=str(folder / "out"),
        model="custom:tests.models.HashModel",
        id_column="id",
        keep=keep,
        shard_rows=SHARD_ROWS,
        **options,
    )
    asked = survey(config)
    asked.ledger.claim(asked.job)
    reasons = {7: "null", 50: "refused: <b>policy</b>"}
    for number, shard in enumerate(asked.standing.plan.pending[:num_shards]):
        rows = [row for row in range(shard.start, shard.stop) if row not in reasons]
        flat = pa.array(vectors()[rows].reshape(-1))
        table = source.select(["id", *keep]).take(rows)
        table = table.append_column(EMBEDDING, pa.FixedSizeListArray.from_arrays(flat, type=vectors_type(DIMENSION)))
        table = table.append_column(TEXT_HASH, hashes_of(rows))
        table = table.append_column(SOURCE_ROW, pa.array(rows, pa.int64()))
        asked.ledger.publish(
            table,
            shard=shard,
            fingerprint=asked.job.fingerprint,
            rejects=[Reject(row, source["id"][row].as_py(), why) for row, why in reasons.items() if _is_in(shard, row)],
            usage=usage(number),
        )
    return folder / "out"


def usage(number: int) -> Usage:
    """Ten seconds a shard, one after the other; the last three an hour later."""
    stop = START + timedelta(seconds=10 * (number + 1) + (3600 if number > 2 else 0))
    return Usage(
        num_tokens=4000,
        num_padded_tokens=5000,
        embed_s=10.0,
        busy_s=6.0,
        num_requests=3,
        num_long=2,
        num_duplicates=5,
        cost=0.25,
        device="api",
        created_at=stop.isoformat(timespec="seconds"),
    )


def write_runs(out: Path) -> None:
    """Three runs: one done, one that failed later, and one of which nothing can be read."""
    folder = out / "_engine/runs"
    folder.mkdir()
    done = {
        "num_rows": 117,
        "num_rejects": 2,
        "seconds": 31.0,
        "rows_per_s": 3.9,
        "provider": {"tokens_per_minute_limit": 60_000.0},
    }
    who = {"host": "node-7", "user": "kim", "engine": "0.1.0"}
    run = {"started_at": "2026-11-25T09:00:00+00:00", "outcome": "done", "error": "", "result": done}
    (folder / "1.json").write_text(json.dumps(run | who))
    failed = {
        "started_at": "2026-11-25T10:00:00+00:00",
        "outcome": "failed",
        "error": "no <route> to host",
        "result": None,
    }
    (folder / "2.json").write_text(json.dumps(failed))
    (folder / "3.json").write_text("{")


def _is_in(shard: Shard, row: int) -> bool:
    return shard.start <= row < shard.stop


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_output(tmp_path_factory.mktemp("report"))
    write_runs(made)
    return made


class Page(HTMLParser):
    """A page as a browser takes it apart: its elements with their attributes, its text, its scripts, its figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text())
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))
        self.figures: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem != "style":
            self.texts.append(data)


def test_a_page_goes_to_the_home_folder_and_to_no_address(out, tmp_path, monkeypatch):
    """From Python, where no shell has read `~`; and not into folders that are named after an address."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert engine.report(out, "~/page.html").report == str(tmp_path / "home/page.html")
    assert (tmp_path / "home/page.html").exists()
    for to in ("http://host/page.html", "s3://bucket/page.html"):
        with pytest.raises(ConfigError, match=f"--to {to}: --to names a file on this machine"):
            engine.report(out, to)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_report_adds_up_what_records_say(out, tmp_path, capsys):
    """Rows, rejects with their reasons and rows, cost, share of the limit, runs and signs; `--json` says where the page is."""
    page = tmp_path / "page.html"
    assert main(["report", str(out), "--to", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["report"], told["num_rows"], told["sampled_rows"]) == (str(page), 238, 238)
    assert told["projection"].startswith("t-SNE")
    assert told["num_bytes"] == page.stat().st_size
    text = Page(page).text
    for wanted in (
        "238 rows nothing left to do",
        "2 rejects 0.83% of all",
        "24 k tokens",
        "$1.50 cost",
        "16 dimensions",
        "2 runs",
        "worked 1:00 min",
        "in 2 sessions",
        "device waited 40.0% of its time",
        "padding 20.0% of 30,000 tokens",
        "of the limit 40% of 60,000 tokens/min",
        "longer than the model takes 12",
        "duplicates, not sent again 30",
        "2026-11-25 09:00:00 done 117 2 3.9 31 s kim@node-7",
        "no <route> to host",
        "refused: <b>policy</b> row-50 row 50 of a.parquet",
        "null <i>7</i> row 7 of a.parquet",
    ):
        assert wanted in text
    signs = "\n".join(told["warnings"])
    for wanted in ("last run failed: no <route> to host", "1 record of a run cannot be read", "12 texts were longer"):
        assert wanted in signs
    for wanted in (
        "1 of 16 dimensions",
        "1 row of the 238 sampled has the very vector",
        "near-duplicates",
        "1 sampled vector",
    ):
        assert wanted in signs


def test_the_cost_is_that_of_all_runs_as_status_says_it(out, tmp_path):
    """Of the sample that calibrated int8 too, and of what was switched out or set aside since."""
    shutil.copytree(out, tmp_path / "out")
    ledger = Ledger(LocalStorage(str(tmp_path / "out")))
    fix(ledger.storage, Calibration(0.1, "texts", usage=Usage(cost=2.0)))
    former = Switch(1, frozenset(), frozenset(), {}, 4.0, START.isoformat())
    for name, data in ((former.name(), former.to_bytes()), (former.done_name(), b"")):
        ledger.storage.create(name, data)
    ledger.set_aside(min(ledger.committed()))
    engine.report(tmp_path / "out", tmp_path / "page.html")
    assert engine.status(tmp_path / "out").provider.cost == pytest.approx(7.5)
    assert "$7.50 cost" in Page(tmp_path / "page.html").text


def test_the_plots_hold_the_rows_of_the_output(out, tmp_path):
    """Bars add up to all rows; the map has a point a row with its text; a column of words or of numbers colours it."""
    page = tmp_path / "page.html"
    engine.report(out, page)
    figures = Page(page).figures
    bars = figures["throughput"]["data"]
    assert sum(y * width for y, width in zip(bars[0]["y"], bars[0]["width"], strict=True)) == pytest.approx(238)
    assert sum(y * width for y, width in zip(bars[1]["y"], bars[1]["width"], strict=True)) == pytest.approx(24_000)
    assert figures["throughput"]["layout"]["shapes"][0]["y0"] == 1000  # the limit, a second
    assert sum(figures["lengths"]["data"][0]["y"]) == 238
    clouds = figures["map"]["data"]
    assert sum(len(cloud["x"]) for cloud in clouds) == 238
    assert any("whales" in cloud["name"] for cloud in clouds)
    hover = "\n".join(text for cloud in clouds for text in cloud["text"])
    assert "says number 100." in hover.replace("<br>", " ")
    assert engine.report(out, page, color_by="subject", projection="pca").projection.startswith("the first two")
    assert {cloud["name"] for cloud in Page(page).figures["map"]["data"]} == {
        "bread (79)",
        "trains (79)",
        "whales (80)",
    }
    engine.report(out, page, color_by="number", projection="pca")
    (cloud,) = Page(page).figures["map"]["data"]
    assert sorted(cloud["marker"]["color"])[:3] == [0, 1, 2]


def test_a_sample_is_bounded_fair_and_always_the_same(out, tmp_path):
    """Fifty rows of 238: of all parts, each by its share; a second report draws the very same figures."""
    first, second = tmp_path / "1.html", tmp_path / "2.html"
    assert engine.report(out, first, sample_rows=50).sampled_rows == 50
    engine.report(out, second, sample_rows=50)
    pages = Page(first), Page(second)
    assert pages[0].figures == pages[1].figures
    assert "50 of 238 rows, of 6 of 6 parts; the same ones each time" in pages[0].text
    ids = [
        int(match)
        for cloud in pages[0].figures["map"]["data"]
        for match in re.findall(r"row-(\d+)", " ".join(cloud["text"]))
    ]
    assert min(np.bincount(np.array(ids) // SHARD_ROWS, minlength=6)) >= 7


def test_nothing_in_an_output_becomes_markup_and_nothing_is_loaded(out, tmp_path):
    """Texts, ids and reasons full of tags stay texts; the policy allows the page's own two scripts, by hash, and no request."""
    path = tmp_path / "page.html"
    engine.report(out, path, projection="pca")
    page = Page(path)
    assert [attrs.get("type") for tag, attrs in page.elements if tag == "script"] == ["application/json", None, None]
    assert not {"img", "iframe", "object", "embed", "a", "i", "b", "base"} & {tag for tag, _ in page.elements}
    for _, attrs in page.elements:
        assert not {"src", "srcset", "action"} & attrs.keys()
        assert attrs.get("href", "data:,") == "data:,"
        assert not any(name.startswith("on") for name in attrs)
    policy = next(
        attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == "'none'"
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in hashes]
    style = path.read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    hover = next(text for cloud in page.figures["map"]["data"] for text in cloud["text"] if "alert" in text)
    assert set(re.findall(r"<[^>]*>", hover)) == {"<b>", "</b>", "<br>"}  # Plotly's own tags, around what is escaped


def test_texts_are_shown_only_where_the_output_keeps_them(tmp_path):
    """Without the text column the page has ids and mean tokens, and says why; no text of the source is in it."""
    out = make_output(tmp_path, keep=("subject",))
    engine.report(out, projection="pca")
    page = Page(out / "_engine/report.html")
    assert "does not keep the column 'text'" in page.text
    assert "says number" not in (out / "_engine/report.html").read_text()
    assert "<b>row-100</b>" in {text for cloud in page.figures["map"]["data"] for text in cloud["text"]}
    assert engine.verify(out, "full").ok  # the page in the output disturbs nobody


def test_a_report_of_little_or_damaged_is_a_report(tmp_path):
    """No row yet, one shard of six, a part that is gone or damaged: each is said, and the rest is shown."""
    empty = make_output(tmp_path / "a", num_shards=0)
    assert "240 of 240 rows are not embedded yet" in engine.report(empty).warnings
    assert "The output holds no vectors yet." in Page(empty / "_engine/report.html").text
    out = make_output(tmp_path / "b", num_shards=2)
    assert any("160 of 240 rows" in sign for sign in engine.report(out, sample_rows=1).warnings)
    assert "too few different vectors for a map" in Page(out / "_engine/report.html").text
    ids = [path.stem.removeprefix("part-") for path in sorted((out / "data").iterdir())]
    (out / part_name(ids[0])).unlink()
    (out / part_name(ids[1])).write_bytes(b"PAR1 no more")
    shutil.rmtree(tmp_path / "b/in")
    signs = "\n".join(engine.report(out).warnings)
    assert "2 parts of the sample cannot be read" in signs
    assert "what is left to do cannot be told" in signs


def test_a_column_is_not_taken_for_the_texts_where_these_are_made_of_several(tmp_path):
    """A column `text` that is kept may be anything; the page says that there are no texts, and not to keep them."""
    out = make_output(tmp_path, text_template="{subject} {number}")
    engine.report(out, tmp_path / "page.html", sample_rows=50)
    text = Page(tmp_path / "page.html").text
    assert "texts made of several columns, and tokens row by row, are not stored" in text
    assert "--keep" not in text
    assert "says number" not in (tmp_path / "page.html").read_text()


def test_what_cannot_be_done_is_one_message_and_the_old_page_stays(out, tmp_path, monkeypatch):
    """No output, no such column, no place to write, no Plotly."""
    with pytest.raises(ConfigError, match="is not an output of the engine"):
        engine.report(tmp_path)
    with pytest.raises(ConfigError, match="no column 'colour' to colour by; it has id, text, subject, number"):
        engine.report(out, color_by="colour")
    with pytest.raises(ConfigError, match="sample_rows 0"):
        engine.report(out, sample_rows=0)
    with pytest.raises(ConfigError, match="projection 'umap': there are auto, pca, tsne"):
        engine.report(out, projection="umap")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"cannot be written to .*: give a file"):
        engine.report(out, tmp_path / "file/page.html", sample_rows=20)
    (tmp_path / "folder/page.html").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be written"):
        engine.report(out, tmp_path / "folder/page.html", sample_rows=20)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["page.html"]  # nothing half-written is left
    old = tmp_path / "old.html"
    old.write_text("the old page")
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ConfigError, match=r"pip install 'embedding-engine\[report\]'"):
        engine.report(out, old)
    assert old.read_text() == "the old page"


def test_a_timeline_is_exact_and_bounded_however_long_it_is():
    """A shard every few minutes for years, with pauses: few slots, and no row more or less than there were."""
    timeline = Timeline()
    chance = np.random.default_rng(0)
    for number in range(30_000):
        at = START + timedelta(seconds=number * 300 + (30 * 86400 if number > 20_000 else 0) + float(chance.random()))
        timeline.add(at.isoformat(), 50 + 300 * float(chance.random()), 7, 70)
    timeline.add("no date", 1, 7, 70)
    sessions = timeline.sessions()
    assert timeline.num_undated == 1
    assert len(timeline._slots) <= MAX_SLOTS
    assert len(sessions) == 2
    bars = [bar for session in sessions for bar in session.bars]
    assert len(bars) <= 200
    assert sum(bar.rows_per_s * bar.width_s for bar in bars) == pytest.approx(30_000 * 7)
    assert sum(bar.tokens_per_s * bar.width_s for bar in bars) == pytest.approx(30_000 * 70)
    rates = [bar.rows_per_s for bar in bars][1:-1]
    assert min(rates[:40]) == pytest.approx(7 / 300, rel=0.05)


def test_health_finds_what_comparing_all_with_all_finds():
    """Near-duplicates across blocks, sets of identical vectors, odd norms, constant dimensions."""
    chance = np.random.default_rng(1)
    made = chance.normal(size=(1300, 12)).astype(np.float32)
    made[1250] = made[3] + 0.02 * made[4]
    made[700:703] = made[5]
    made[9] *= 100
    made[:, 2] = 1
    units = made.astype(np.float64) / np.linalg.norm(made.astype(np.float64), axis=1, keepdims=True)
    cosines = np.triu(units @ units.T, k=1)
    cosines[:, 700:703] = 0  # of identical vectors, only the first takes part
    cosines[700:703] = 0
    found = health_of(made)
    assert {(one, other) for _, one, other in found.pairs} == set(zip(*np.nonzero(cosines > NEAR), strict=True))
    assert found.num_pairs == len(found.pairs) > 0
    assert found.identical == [[5, 700, 701, 702]]
    assert found.num_identical == 3
    assert 9 in found.odd_norms
    assert found.constant_dimensions == [2]


SIZES = """[...document.querySelectorAll('.plot .main-svg')].map(svg => [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height])"""


NASTY_POINT = """document.getElementById('map').data.flatMap((trace, curve) => trace.text.map((text, number) => [curve, number, text]))
    .find(([, , text]) => text.includes('alert')).slice(0, 2)"""


def test_a_browser_draws_the_page_wide_and_narrow(out, tmp_path):
    """A real Chromium, with no network: all plots are there, hover shows a text, nothing sticks out at 420 pixels, no error."""
    path = tmp_path / "page.html"
    engine.report(out, path, projection="pca")
    try:
        with browser() as chromium:
            for width in (1400, 420):
                look(chromium, path, width)
    except NoBrowser as reason:
        pytest.skip(str(reason))


def look(chromium: Any, path: Path, width: int) -> None:
    """Open the page in a window of some width, and check what is drawn."""
    page = chromium.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=60_000)
    assert page.evaluate("document.querySelectorAll('.plot').length") == 3
    sizes = page.evaluate(SIZES)
    assert len(sizes) >= 3
    assert all(wide > 100 and high > 100 for wide, high in sizes)
    assert page.evaluate("document.querySelectorAll('#map .point').length") == 238
    assert page.evaluate("document.querySelectorAll('#throughput .point path').length") > 2
    assert page.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth")
    point = page.locator("#map .point").first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#map .hoverlayer .hovertext", timeout=10_000)
    assert "number" in page.text_content("#map .hoverlayer") or "alert" in page.text_content("#map .hoverlayer")
    page.mouse.move(1, 1)  # or the page goes on showing what is under the mouse
    page.wait_for_selector("#map .hoverlayer .hovertext", state="detached", timeout=10_000)
    curve, number = page.evaluate(NASTY_POINT)
    page.evaluate(f"Plotly.Fx.hover('map', [{{curveNumber: {curve}, pointNumber: {number}}}])")
    page.wait_for_selector("#map .hoverlayer .hovertext", timeout=10_000)
    shown = page.text_content("#map .hoverlayer")
    assert "<script>alert(1)</script>" in shown
    assert "%{y} $x$" in shown
    assert asked == [path.as_uri()]
    assert said == []
    page.close()


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0"), (99.6, "99.6"), (9_999, "9,999"), (12_400, "12.4 k"), (999_600, "1 M"), (999_700_000, "1 G"), (1.5e12, "1.5 T"), (1.5e15, "1,500 T")],
)  # fmt: skip
def test_numbers_on_a_tile_are_short_and_of_one_unit(number, said):
    """Also just below the next unit, and where there is none."""
    assert brief(number) == said
