"""A real headless browser, driven through the DevTools protocol over a pair of pipes."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
)
# The browser reads commands from descriptor 3 and writes to 4, numbers that subprocess cannot give it directly.
SHIM = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"

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

    def contrast(self, selector: str) -> float:
        """Of an element's text with what lies behind it, as WCAG counts it."""
        ratio: float = self.evaluate(f"{CONTRAST}({selector!r})")
        return ratio

    @contextmanager
    def emulated(self, scheme: str = "light", width: int = 0) -> Iterator[None]:
        """A colour scheme, and the screen of a phone if there is a width."""
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        if width:
            self("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
        try:
            yield
        finally:
            self("Emulation.setEmulatedMedia", features=[])
            self("Emulation.clearDeviceMetricsOverride")

    def sort_every_column(self) -> int:
        """Press every column's name of every sortable table twice and look at the order; how often it was pressed."""
        pressed = 0
        for table in range(self.evaluate("document.querySelectorAll('table.sortable').length")):
            there = f"document.querySelectorAll('table.sortable')[{table}]"
            kinds = self.evaluate(
                f"[...{there}.tHead.rows[{there}.tHead.rows.length - 1].cells].map(h => h.dataset.kind)"
            )
            for column, kind in enumerate(kinds):
                press = f"[...{there}.querySelectorAll('th button')][{column}].click()"
                keys = f"[...{there}.tBodies[0].rows].map(row => row.cells[{column}].dataset.sort)"
                arrow = f"{there}.querySelector('th[aria-sort]').getAttribute('aria-sort')"
                unsorted = self.evaluate(keys)
                for press_number in range(2):
                    self.evaluate(press)
                    falling = (kind == "number") == (press_number == 0)
                    assert self.evaluate(arrow) == ("descending" if falling else "ascending")
                    got = self.evaluate(keys)
                    assert sorted(got) == sorted(unsorted)  # no row lost
                    known = [key for key in got if key != ""]
                    assert got == known + [""] * (len(got) - len(known))
                    if kind == "number":
                        assert [float(key) for key in known] == sorted(map(float, known), reverse=falling)
                    else:
                        # The order of the user's language: letters without regard to case.
                        plain = [key.lower() for key in known if key[0].isalpha()]
                        assert plain == sorted(plain, reverse=falling)
                    pressed += 1
        return pressed

    def asked(self) -> list[str]:
        """What the page asked of the network or the disk; its own pictures, which are in it, left out."""
        urls = [event["params"]["request"]["url"] for event in self.events if event["method"].endswith("WillBeSent")]
        return [url for url in urls if not url.startswith("data:image/png")]

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
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD, lowest)
    os.close(fd)
    return copy


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)}")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()
