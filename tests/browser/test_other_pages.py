"""The pages over seeds and of a structured system in a real browser."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustflow import cli
from robustflow.seeds.reading import seed_directories
from robustflow.seeds.report import build_seeds_report
from robustflow.structured import catalogue

HOSTILE = "<script>alert(1)<b>&'\""
LONG = "a-model-with-a-very-long-name-indeed-and-no-blank"


@pytest.fixture(scope="module")
def seeds_page(tmp_path_factory: pytest.TempPathFactory, make_benchmark: Callable[..., Path]) -> Path:
    out = tmp_path_factory.mktemp("seeds")
    names = ["unconstrained", "sharp", HOSTILE, LONG]
    for seed in (0, 1, 2):
        folder = make_benchmark(out / f"seed-{seed}", names=names, n=80, scale=0.5 + 0.1 * seed)
        for number, card in enumerate(sorted(folder.glob("models/*/card.json"))):
            told = json.loads(card.read_text(encoding="utf-8"))
            card.write_text(json.dumps(told | {"seed": seed, "sha256": f"{seed}{number}" * 32}), encoding="utf-8")
    return build_seeds_report(out, seed_directories(out))


@pytest.fixture(scope="module")
def structured_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the planted system that the tests of the structured stages use, too."""
    there = Path(__file__).parent.parent / "structured" / "conftest.py"
    spec = importlib.util.spec_from_file_location("planted_for_browser", there)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    out = tmp_path_factory.mktemp("structured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        (out / "decay.toml").write_text(module.CONFIG, encoding="utf-8")
        patch.setitem(catalogue.SYSTEMS, "decay", module.Decay())
        assert cli.main(["bench", str(out / "decay.toml"), "--out", str(out / "out"), "--device", "cpu"]) == 0
    return out / "out" / "report.html"


@pytest.fixture(params=["seeds", "structured"])
def page(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{request.param}_page")
    return found


def test_a_page_loads_without_a_complaint_and_without_the_network(browser: Any, page: Path) -> None:
    browser.open(page)
    assert browser.complaints() == []
    assert browser.asked() == [page.as_uri()]
    widths = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert widths
    assert min(widths) > 300
    assert browser.evaluate("[...document.images].every(image => image.alt)")
    enlarged = "[...document.images].filter(i => i.clientWidth > Math.max(620, i.naturalWidth)).length"
    assert browser.evaluate(enlarged) == 0
    broken = "[...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.querySelector(a.hash)).length"
    assert browser.evaluate(broken) == 0


def test_every_column_of_every_sortable_table_sorts(browser: Any, page: Path) -> None:
    browser.open(page)
    heads = browser.evaluate("document.querySelectorAll('table.sortable th button').length")
    assert heads >= 4
    assert browser.sort_every_column() == 2 * heads
    assert browser.complaints() == []


def test_a_name_is_text(browser: Any, seeds_page: Path) -> None:
    browser.open(seeds_page)
    assert browser.evaluate("[...document.querySelectorAll('td.name')].map(cell => cell.innerText)").count(HOSTILE) >= 2


def test_it_is_readable_in_light_and_dark_and_on_a_phone(browser: Any, page: Path) -> None:
    browser.open(page)
    papers = []
    for scheme in ("light", "dark"):
        with browser.emulated(scheme):
            papers.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
            for selector in ("body", "nav a", ".soft", "td small", "figcaption", "td.name a", "th"):
                assert browser.contrast(selector) >= 4.5, (scheme, selector)
    assert len(set(papers)) == 2
    with browser.emulated(width=390):
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390  # tables scroll in themselves
        assert browser.evaluate("parseFloat(getComputedStyle(document.querySelector('p')).fontSize)") >= 14
        # The names stay in sight, and leave most of the screen to the figures.
        names = "[...document.querySelectorAll('td.name, .figures td.text:first-child')]"
        assert browser.evaluate(f"Math.max(...{names}.map(cell => cell.getBoundingClientRect().width))") <= 200
