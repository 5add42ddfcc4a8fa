"""A headless Chromium, driven by its own protocol (https://chromedevtools.github.io/devtools-protocol/)."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page:
    """The one page of a browser."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._count = socket, 0
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **how: Any) -> dict[str, Any]:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": how}))
        while True:
            found = json.loads(self._socket.recv(timeout=20))
            entry = found.get("params", {}).get("entry", {"level": "error"})
            if found.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded") and entry["level"] == "error":
                self.errors.append(json.dumps(found["params"]))
            if found.get("id") == self._count:
                assert "error" not in found, found
                return found["result"]

    def js(self, expression: str) -> Any:
        found = self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> Any:
        """What it gives as soon as that is true."""
        deadline = time.monotonic() + seconds
        while not (found := self.js(expression)):
            assert time.monotonic() < deadline, (expression, self.js("document.body.innerText"), self.errors)
            time.sleep(0.05)
        return found

    def open(self, address: str) -> None:
        self.do("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && !!document.querySelector('option')")

    def key(self, type: str, key: str = " ") -> None:
        self.do("Input.dispatchKeyEvent", type=type, key=key, code="Space", windowsVirtualKeyCode=32)

    def choose_file(self, path: Path) -> None:
        root = self.do("DOM.getDocument")["root"]["nodeId"]
        node = self.do("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        self.do("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def picture(self, path: Path, width: int, height: int, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.do("Emulation.setEmulatedMedia", features=features)
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(folder: Path, *, microphone: Path | None = None) -> Iterator[Page]:
    """A page in a new browser.

    microphone: what it hears, once: a WAV file that begins with half a second of silence; None: it is refused.
    """
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--use-fake-device-for-media-stream"]
    if microphone:
        flags += ["--use-fake-ui-for-media-stream", f"--use-file-for-fake-audio-capture={microphone}%noloop"]
    else:
        flags += ["--deny-permission-prompts"]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=log, stderr=log, env=environment)
    try:
        active = folder / "DevToolsActivePort"
        deadline = time.monotonic() + 30
        while not active.exists() or len(active.read_text().split()) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        port = active.read_text().split()[0]
        with connect(f"ws://127.0.0.1:{port}{active.read_text().split()[1]}", proxy=None) as whole:
            whole.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
            targets = json.loads(whole.recv(timeout=20))["result"]["targetInfos"]
        target = next(x["targetId"] for x in targets if x["type"] == "page")
        address = f"ws://127.0.0.1:{port}/devtools/page/{target}"
        with connect(address, proxy=None, max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(20)
