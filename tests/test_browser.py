"""The report in a real headless browser, driven through the DevTools protocol over a pair of pipes."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from robustflow import tables
from robustflow.report import build_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
)
# The browser reads commands from descriptor 3 and writes to 4, numbers that subprocess cannot give it directly.
SHIM = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
HOSTILE = "<script>alert(1)<b>&'\""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser here: none of {', '.join(NAMES)}")


class Browser:
    """One tab: commands and their answers as JSON ended by a zero byte; events are kept in `events`."""

    def __init__(self, profile: Path) -> None:
        theirs_in, self.write = os.pipe()
        self.read, theirs_out = os.pipe()
        high = [_above(10, fd) for fd in (theirs_in, theirs_out)]
        assert CHROMIUM
        command = [sys.executable, "-c", SHIM, *map(str, high), CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in high:
            os.close(fd)
        self.buffer, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        tab = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Page.setLifecycleEventsEnabled", enabled=True)

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self, seconds: float = 60.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            chunk = os.read(self.read, 1 << 20)
            assert chunk, "the browser ended"
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, page: Path) -> None:
        """Load a page and draw it once; `events` then tells of it and of nothing before."""
        self.events.clear()
        loader = self("Page.navigate", url=page.as_uri())["loaderId"]
        while not any(e["params"].get("loaderId") == loader for e in self.events if e["params"].get("name") == "load"):
            self.events.append(self._next())
        self.evaluate("new Promise(drawn => requestAnimationFrame(() => setTimeout(drawn)))")

    def evaluate(self, expression: str) -> Any:
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Exceptions, errors and warnings on the console, what the page's policy refused, dialogs."""
        loud = ("Runtime.exceptionThrown", "Page.javascriptDialogOpening", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in loud]

    def close(self) -> None:
        os.close(self.write)
        os.close(self.read)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _above(lowest: int, fd: int) -> int:
    """The same pipe under a number from 10 on, lest the copies to 3 and 4 overwrite it."""
    import fcntl

    copy = fcntl.fcntl(fd, fcntl.F_DUPFD, lowest)
    os.close(fd)
    return copy


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def plain_page(make_benchmark: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four models, one without certificate, one with a hostile name; no plots, which most tests do not look at."""
    monkeypatch.setattr("robustflow.report.draw", lambda benchmark, summary: [])
    names = ["unconstrained", "sharp", HOSTILE, "a-model-with-a-very-long-name-indeed-and-no-blank"]
    return build_report(make_benchmark(tmp_path / "out", names=names, n=80))


def test_the_page_loads_without_a_complaint_and_without_the_network(
    browser: Browser, make_benchmark: Callable[..., Path], tmp_path: Path
) -> None:
    page = build_report(make_benchmark(tmp_path / "out", names=["sharp", HOSTILE], n=40))
    browser.open(page)
    assert browser.complaints() == []
    asked = [event["params"]["request"]["url"] for event in browser.events if event["method"].endswith("WillBeSent")]
    assert [url for url in asked if not url.startswith("data:image/png")] == [page.as_uri()]
    widths = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 7
    assert min(widths) > 600
    assert browser.evaluate("[...document.querySelectorAll('td.name')].map(cell => cell.innerText)").count(HOSTILE) >= 2


def test_a_broken_page_is_noticed(browser: Browser, plain_page: Path) -> None:
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


def test_the_numbers_are_those_of_the_summary(browser: Browser, plain_page: Path) -> None:
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


def test_every_column_of_every_sortable_table_sorts(browser: Browser, plain_page: Path) -> None:
    browser.open(plain_page)
    tables_found = browser.evaluate("document.querySelectorAll('table.sortable').length")
    assert tables_found == 2  # leaderboard, cost
    checked = 0
    for table in range(tables_found):
        there = f"document.querySelectorAll('table.sortable')[{table}]"
        kinds = browser.evaluate(
            f"[...{there}.tHead.rows[{there}.tHead.rows.length - 1].cells].map(h => h.dataset.kind)"
        )
        for column, kind in enumerate(kinds):
            press = f"[...{there}.querySelectorAll('th button')][{column}].click()"
            keys = f"[...{there}.tBodies[0].rows].map(row => row.cells[{column}].dataset.sort)"
            arrow = f"{there}.querySelector('th[aria-sort]').getAttribute('aria-sort')"
            unsorted = browser.evaluate(keys)
            for press_number in range(2):
                browser.evaluate(press)
                falling = (kind == "number") == (press_number == 0)
                assert browser.evaluate(arrow) == ("descending" if falling else "ascending")
                got = browser.evaluate(keys)
                assert sorted(got) == sorted(unsorted)  # no row lost
                known = [key for key in got if key != ""]
                assert got == known + [""] * (len(got) - len(known))
                if kind == "number":
                    assert [float(key) for key in known] == sorted(map(float, known), reverse=falling)
                else:
                    # The order of the user's language: letters without regard to case.
                    plain = [key.lower() for key in known if key[0].isalpha()]
                    assert plain == sorted(plain, reverse=falling)
                checked += 1
    assert checked == 2 * (14 + 7)
    assert browser.complaints() == []


CONTRAST = """(selector => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const element = document.querySelector(selector);
  let behind = element, paper = [0, 0, 0, 0];
  while (behind && paper[3] === 0) {
    paper = channels(getComputedStyle(behind).backgroundColor);
    if (paper.length === 3) paper.push(1);
    behind = behind.parentElement;
  }
  const [a, b] = [luminance(channels(getComputedStyle(element).color)), luminance(paper)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
})"""


def test_it_is_readable_in_light_and_dark_and_on_a_phone(
    browser: Browser, hand_benchmark: Path, alarm: Callable[[Path, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustflow.report.draw", lambda benchmark, summary: [])
    alarm(hand_benchmark, "hand")
    path = hand_benchmark / "evaluations" / "digits-test" / "plain.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": ["something to heed"]}))
    browser.open(build_report(hand_benchmark))
    papers = []
    for scheme in ("light", "dark"):
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        papers.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector in ("body", "nav a", ".soft", "td small", ".notice.alarm", ".notice.warning", ".alarm-count"):
            assert browser.evaluate(f"{CONTRAST}({selector!r})") >= 4.5, (scheme, selector)
        red, green, blue = browser.evaluate(
            "getComputedStyle(document.querySelector('.alarm-count')).color.match(/\\d+/g)"
        )
        assert int(red) > 1.2 * max(int(green), int(blue))
    assert len(set(papers)) == 2
    browser("Emulation.setEmulatedMedia", features=[])
    browser("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    try:
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390  # tables scroll in themselves
        assert browser.evaluate("parseFloat(getComputedStyle(document.querySelector('p')).fontSize)") >= 14
    finally:
        browser("Emulation.clearDeviceMetricsOverride")


def test_paper_shows_what_is_folded(browser: Browser, plain_page: Path) -> None:
    browser.open(plain_page)
    folded = "document.querySelectorAll('details:not([open])').length"
    before = browser.evaluate(folded)
    assert before >= 6
    browser.evaluate(f"void addEventListener('beforeprint', () => {{ window.left = {folded}; }})")
    browser("Page.printToPDF", preferCSSPageSize=True)
    assert browser.evaluate("window.left") == 0
    assert browser.evaluate(folded) == before
