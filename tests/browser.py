"""A headless Chromium, driven over a pipe by its own protocol (no driver, no port)."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)


class Browser:
    """One tab."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        there, self._write = os.pipe()
        self._read, back = os.pipe()

        def connect() -> None:
            # Chromium reads commands from 3 and writes answers to 4. Out of the way first: the ends may be 3 and 4.
            high = [os.dup2(fd, 100 + i) for i, fd in enumerate((there, back))]
            for fd, number in zip(high, (3, 4), strict=True):
                os.dup2(fd, number)

        self._process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "--window-size=1000,1400",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=connect,  # noqa: PLW1509 (dup2 alone, which a child may do)
        )
        os.close(there)
        os.close(back)
        self._count, self._held, self._session = 0, b"", ""
        self.heard: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Run a command, and wait for its answer; events that come meanwhile are kept in `heard`."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if b"\0" not in self._held:
                ready, _, _ = select.select([self._read], [], [], 1)
                if ready:
                    chunk = os.read(self._read, 1 << 20)
                    assert chunk, "the browser has gone"
                    self._held += chunk
                continue
            raw, _, self._held = self._held.partition(b"\0")
            answer = json.loads(raw)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found
            self.heard.append(answer)
        raise AssertionError(f"no answer to {method}")

    def run(self, script: str) -> Any:
        """The value of a script in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        """Until the script's value is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}; the page: {self.run('document.body.innerText')}"
            time.sleep(0.1)

    def click(self, selector: str, times: int = 1) -> None:
        """The mouse, on the middle of an element; three times selects what is in a field."""
        where = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); "
            f"return [r.x + r.width / 2, r.y + r.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call(
                    "Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=count
                )

    def type(self, text: str) -> None:
        """The keyboard, into what was clicked on; it replaces what is selected."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """What the page looks like, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def complaints(self) -> list[str]:
        """Errors on the console, and policies that something broke."""
        return [
            json.dumps(e["params"])
            for e in self.heard
            if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
        ]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
