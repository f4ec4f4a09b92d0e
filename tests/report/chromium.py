"""Opens a page in headless Chromium, wide and narrow, light and dark: does it overflow, complain or ask the network?

    python tests/report/chromium.py page.html [--screenshots FOLDER]

The browser's protocol is spoken over its pipe, so that nothing but Chromium has to be installed.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = (1280, 375)
THEMES = ("light", "dark")
# The protocol's pipes are descriptors 3 and 4 of the browser.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
# Sorts every column, toggles the theme twice, opens what is folded, focuses every mark and forgets the theme.
EXERCISE = """
(() => {
  const clicks = [...document.querySelectorAll("thead button, #theme"), document.getElementById("theme")];
  for (const button of clicks) button.click();
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  for (const mark of document.querySelectorAll(".mark, .cell")) mark.focus({ preventScroll: true });
  localStorage.clear();
  return clicks.length;
})()
"""


def find() -> str | None:
    """Return the browser's program, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab; a context manager.

    Args:
        program: of Chromium.
    """

    def __init__(self, program: str) -> None:
        theirs, self.write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in os.pipe())
        self.read, ours = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in os.pipe())
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [sys.executable, "-c", START, str(theirs), str(ours), program, *FLAGS]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={self.home.name}"], pass_fds=(theirs, ours), stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(ours)
        self.count, self.buffer, self.session, self.events = itertools.count(1), b"", "", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.read)
        os.close(self.write)
        self.home.cleanup()

    def message(self, seconds: float = 30) -> dict:
        """Return the browser's next message."""
        until = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            more = os.read(self.read, 1 << 20)
            if not more:
                raise ConnectionError("Chromium has ended")
            self.buffer += more
        first, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(first)

    def call(self, method: str, **parameters: object) -> dict:
        """Return a command's result; events that come before it are kept."""
        number = next(self.count)
        sent = {"id": number, "method": method, "params": parameters}
        if self.session:
            sent["sessionId"] = self.session
        os.write(self.write, json.dumps(sent).encode() + b"\0")
        while (got := self.message()).get("id") != number:
            self.events.append(got)
        if "error" in got:
            raise RuntimeError(f"{method}: {got['error']}")
        return got["result"]

    def open(self, page: Path, width: int, theme: str) -> None:
        """Load a page at a width, for a reader who prefers a theme."""
        phone = width < 500
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def evaluate(self, script: str) -> object:
        """Return a script's value."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        got = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(got["data"]))

    def complaints(self) -> list[str]:
        """Return errors of the console and requests other than for the page itself."""
        found = []
        for event in self.events:
            method, said = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(f"exception: {said['exceptionDetails'].get('text')}")
            elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
                found.append(f"console: {said['args']}")
            elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
                found.append(f"log: {said['entry']['text']}")
            elif method == "Network.requestWillBeSent" and not said["request"]["url"].startswith(("file:", "data:")):
                found.append(f"request: {said['request']['url']}")
        return found


def check(browser: Browser, page: Path, width: int, theme: str, pictures: Path | None = None) -> list[str]:
    """Return what is wrong with a page at a width, in a theme; screenshots go to a folder, if one is given."""
    browser.open(page, width, theme)
    found = _overflow(browser, width, "as loaded")
    if pictures is not None:
        browser.screenshot(pictures / f"{page.stem}-{width}-{theme}.png")
    browser.evaluate(EXERCISE)
    found += _overflow(browser, width, "after use")
    browser.evaluate("new Promise((done) => setTimeout(done, 100))")
    return found + browser.complaints()


def _overflow(browser: Browser, width: int, when: str) -> list[str]:
    wide = browser.evaluate("document.documentElement.scrollWidth")
    return [f"{wide} px wide {when}"] if wide > width else []


def main() -> int:
    """Return how many of the checks failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--screenshots", type=Path)
    given = parser.parse_args()
    program = find()
    if program is None:
        print("skipped: no Chromium here")
        return 0
    if given.screenshots:
        given.screenshots.mkdir(parents=True, exist_ok=True)
    failed = 0
    with Browser(program) as browser:
        for width, theme in itertools.product(SIZES, THEMES):
            found = check(browser, given.page, width, theme, given.screenshots)
            failed += bool(found)
            print(f"{width:>5} px {theme:<5} {'; '.join(found) or 'ok'}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
