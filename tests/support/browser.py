"""Headless Chromium, and what a test wants to know of it: what it logged, and whom it asked for what."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.support.requests import wait_until

# Set where a missing browser must not go unnoticed, as in continuous integration.
REQUIRED_VARIABLE = "MINI_VLLM_REQUIRE_BROWSER"


def chromium() -> tuple[str, str]:
    """The programs of browser and driver. Skips the test if they are not installed, or fails it where they must be."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = "needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get(REQUIRED_VARIABLE):
            pytest.fail(f"{reason}; {REQUIRED_VARIABLE} is set")
        pytest.skip(reason)
    return browser, driver


class Browser:
    """One browser window of its own, without a profile."""

    def __init__(self, width: int = 1440, height: int = 900) -> None:
        binary, driver = chromium()
        options = Options()
        options.binary_location = binary
        # Containers have no user namespaces for the sandbox, and little shared memory.
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, Service(driver))
        self.driver.set_script_timeout(60)
        self.resize(width, height)

    def resize(self, width: int, height: int, scale: float = 1.0, *, is_phone: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": is_phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """What the system would say: "light" or "dark"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def open(self, url: str) -> None:
        self.driver.get(url)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The text of what matches first, hidden or not."""
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script's `return`; a promise is waited for."""
        return self.driver.execute_script(script, *arguments)

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
        try:
            wait_until(lambda: bool(condition()), what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text('body')}\n{self.driver.get_log('browser')}") from None

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self.driver.save_screenshot(str(path))

    def errors(self) -> list[str]:
        """What the page has logged as an error or a warning since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def hosts(self) -> set[str]:
        """Hosts and ports of every request since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        return {urlsplit(url).netloc for url in urls}

    def close(self) -> None:
        self.driver.quit()
