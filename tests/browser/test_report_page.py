"""The report of a benchmark in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustflow import tables
from robustflow.report import build_report

HOSTILE = "<script>alert(1)<b>&'\""


@pytest.fixture
def plain_page(make_benchmark: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four models, one without certificate, one with a hostile name; no plots, which most tests do not look at."""
    monkeypatch.setattr("robustflow.report.draw", lambda benchmark, summary: [])
    names = ["unconstrained", "sharp", HOSTILE, "a-model-with-a-very-long-name-indeed-and-no-blank"]
    return build_report(make_benchmark(tmp_path / "out", names=names, n=80))


def test_the_page_loads_without_a_complaint_and_without_the_network(
    browser: Any, make_benchmark: Callable[..., Path], tmp_path: Path
) -> None:
    page = build_report(make_benchmark(tmp_path / "out", names=["sharp", HOSTILE], n=40))
    browser.open(page)
    assert browser.complaints() == []
    assert browser.asked() == [page.as_uri()]
    widths = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 7
    assert min(widths) > 600
    assert browser.evaluate("[...document.querySelectorAll('td.name')].map(cell => cell.innerText)").count(HOSTILE) >= 2


def test_a_broken_page_is_noticed(browser: Any, plain_page: Path) -> None:
    """The complaints above can be heard at all: a script of another hash, an exception, an image from elsewhere."""
    whole = plain_page.read_text(encoding="utf-8")
    harms = {
        "</main>": "</main><script>alert(1)</script>",
        '<section id="models">': '<section id="models"><img src="https://example.invalid/x.png">',
    }
    for old, new in harms.items():
        broken = plain_page.with_name("broken.html")
        broken.write_text(whole.replace(old, new, 1), encoding="utf-8")
        browser.open(broken)
        while not browser.complaints():
            browser.events.append(browser._next(20))


LEADERBOARD = """[...document.querySelectorAll("table.leaderboard tbody tr")].map(row => ({
  name: row.dataset.model, keys: [...row.cells].map(cell => cell.dataset.sort),
  texts: [...row.cells].map(cell => cell.innerText) }))"""


def shown(rate: dict[str, Any]) -> str:
    return f"{100 * rate['value']:.1f}\n{100 * rate['low']:.1f}–{100 * rate['high']:.1f}"


def test_the_numbers_are_those_of_the_summary(browser: Any, plain_page: Path) -> None:
    browser.open(plain_page)
    summary = json.loads(plain_page.with_name("summary.json").read_text(encoding="utf-8"))
    (evaluation,) = summary["evaluations"]
    quoted = [i for i, e in enumerate(evaluation["epsilons"]) if tables.epsilon_label(e) in QUOTED]
    rows = browser.evaluate(LEADERBOARD)
    assert [row["name"] for row in rows] == [model["name"] for model in evaluation["models"]]
    for row, model in zip(rows, evaluation["models"], strict=True):
        proved = [shown(model["certified"][i]) for i in quoted]
        areas = [f"{model['area'][key]:.3f}" for key in ("certified", "attacked")]
        if model["lipschitz_bound"] is None:
            proved, areas[0] = ["–"] * len(quoted), "–"
        attacked = [shown(model["attacked"][i]) for i in quoted]
        bound = tables.bound(model["lipschitz_bound"])
        expected = [model["name"], shown(model["clean"]), *proved, *attacked, *areas, bound, str(model["alarm_count"])]
        assert row["texts"] == expected
    browser.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    grids = browser.evaluate(
        "[...document.querySelectorAll('table.grid')].map(t => [...t.tBodies[0].rows]"
        ".map(r => [...r.cells].map(c => c.innerText)))"
    )
    for grid, model in zip(grids, evaluation["models"], strict=True):
        curves = [model[key] for key in ("certified", "attacked", "undecided", "broken")]
        curves += [model["attacked_by_set"][name] for name in evaluation["attack_sets"]]
        labels = [tables.epsilon_label(epsilon) for epsilon in evaluation["epsilons"]]
        assert grid == [[label, *(shown(curve[i]) for curve in curves)] for i, label in enumerate(labels)]


QUOTED = ("36/255", "72/255", "108/255", "1")


def test_every_column_of_every_sortable_table_sorts(browser: Any, plain_page: Path) -> None:
    browser.open(plain_page)
    assert browser.evaluate("document.querySelectorAll('table.sortable').length") == 2  # leaderboard, cost
    assert browser.sort_every_column() == 2 * (14 + 7)
    assert browser.complaints() == []


def test_it_is_readable_in_light_and_dark_and_on_a_phone(
    browser: Any, hand_benchmark: Path, alarm: Callable[[Path, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustflow.report.draw", lambda benchmark, summary: [])
    alarm(hand_benchmark, "hand")
    path = hand_benchmark / "evaluations" / "digits-test" / "plain.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": ["something to heed"]}))
    browser.open(build_report(hand_benchmark))
    papers = []
    for scheme in ("light", "dark"):
        with browser.emulated(scheme):
            papers.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
            for selector in ("body", "nav a", ".soft", "td small", ".notice.alarm", ".notice.warning", ".alarm-count"):
                assert browser.contrast(selector) >= 4.5, (scheme, selector)
            red, green, blue = browser.evaluate(
                "getComputedStyle(document.querySelector('.alarm-count')).color.match(/\\d+/g)"
            )
            assert int(red) > 1.2 * max(int(green), int(blue))
    assert len(set(papers)) == 2
    with browser.emulated(width=390):
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390  # tables scroll in themselves
        assert browser.evaluate("parseFloat(getComputedStyle(document.querySelector('p')).fontSize)") >= 14


def test_paper_shows_what_is_folded(browser: Any, plain_page: Path) -> None:
    browser.open(plain_page)
    folded = "document.querySelectorAll('details:not([open])').length"
    before = browser.evaluate(folded)
    assert before >= 6
    browser.evaluate(f"void addEventListener('beforeprint', () => {{ window.left = {folded}; }})")
    browser("Page.printToPDF", preferCSSPageSize=True)
    assert browser.evaluate("window.left") == 0
    assert browser.evaluate(folded) == before
