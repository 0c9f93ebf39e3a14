"""A real Chromium without a window, and what it said and asked for while a page was open."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--no-default-browser-check",
)  # fmt: skip
DEADLINE_S = 60


class Browser:
    """One page at a time."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, file: Path, *, width: int = 1280, scheme: str = "light") -> None:
        """Open a file, and wait until its figures are drawn."""
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.show(width, scheme)
        self.driver.get(file.as_uri())
        self.wait("return document.documentElement.dataset.drawn === 'yes'")

    def show(self, width: int, scheme: str) -> None:
        """Another width in pixels, another colour scheme."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def wait(self, script: str) -> None:
        until = time.monotonic() + DEADLINE_S
        while not self.driver.execute_script(script):
            assert time.monotonic() < until, f"never true: {script}; console: {self.console()}"
            time.sleep(0.05)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def find_all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def press(self, element: Any, key: str) -> None:
        """A key while `element` has the focus."""
        self.run("arguments[0].focus()", element)
        element.send_keys(key)

    def texts(self, selector: str) -> list[str]:
        """The text of each element that `selector` finds, hidden ones too."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def console(self) -> list[str]:
        """What was written to the console since the last look: errors and warnings of the page and of the browser."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The URLs that the page asked for since the last look, `data:` ones aside."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]


def _installed() -> tuple[str, str] | None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium as it is installed; on a Debian where it is not, it is installed (half a minute)."""
    from selenium import webdriver

    if _installed() is None and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium", "chromium-driver"], check=False, timeout=300)
    found = _installed()
    if found is None:
        pytest.skip("expected chromium and chromedriver, found none (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    options.binary_location = found[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
