"""A real browser for a test: headless Chromium, driven by its own protocol as a user drives it, by keys and clicks."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.waiting import until

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--remote-debugging-port=0"]
MIDDLE = """element => {
  element.scrollIntoView({block: 'center'});
  const box = element.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
}"""
KEYS = {"Tab": 9, "Enter": 13, "Space": 32}


class Tab:
    """A tab. Its methods return once the browser has done it."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0
        self.ask("Page.enable")

    def ask(self, method: str, **told: Any) -> Any:
        """Call a method of the protocol."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": told}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def see(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def go(self, url: str) -> None:
        """Open an address."""
        self.ask("Page.navigate", url=url)
        self.shows("true")

    def shows(self, expression: str) -> Any:
        """The value of an expression as soon as it is true of a whole page; pages come and go meanwhile."""
        return until(lambda: self.see(f"document.readyState === 'complete' && ({expression})"))

    def click(self, selector: str) -> None:
        """Click into the middle of an element."""
        x, y = self.see(f"({MIDDLE})(document.querySelector({json.dumps(selector)}))")
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, text: str) -> None:
        """Write into what has the focus."""
        self.ask("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key."""
        told = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"Enter": "\r", "Space": " "}.get(key)
        self.ask("Input.dispatchKeyEvent", type="keyDown", **told, **({"text": text} if text else {}))
        self.ask("Input.dispatchKeyEvent", type="keyUp", **told)

    def picture(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        """A picture of the whole page."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=True)
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A browser with one tab."""
    from websockets.sync.client import connect

    assert CHROMIUM is not None
    log = profile / "log"
    with log.open("w") as stream:
        process = subprocess.Popen([CHROMIUM, *QUIET, f"--user-data-dir={profile}", "about:blank"], stderr=stream)
    try:
        port = until(lambda: re.search(r"DevTools listening on ws://127.0.0.1:(\d+)/", log.read_text()))[1]
        with connect(_tab_of(int(port)), max_size=None) as socket:
            yield Tab(socket)
    finally:
        process.terminate()
        process.wait(60)


def _tab_of(port: int) -> str:
    import httpx

    def page() -> str:
        found = httpx.get(f"http://127.0.0.1:{port}/json", timeout=60).json()
        return next((one["webSocketDebuggerUrl"] for one in found if one["type"] == "page"), "")

    return until(page)
