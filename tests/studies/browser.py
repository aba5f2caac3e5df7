"""A real browser for tests of pages: chromium without a window, driven through its driver."""

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from .common import need

FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "disable-dev-shm-usage",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)


@contextmanager
def start(profile: Path) -> Iterator[Any]:
    """Start chromium, with an empty folder for its files; nothing is downloaded for it."""
    need(find_spec("selenium"), "selenium")
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    need(program and driver_program, "chromium with its driver")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(driver_program))
    try:
        yield driver
    finally:
        driver.quit()


class Browser:
    """The page in a window of some size."""

    def __init__(self, driver, page):
        self.driver, self.page = driver, page
        self.open()

    def open(self, width=1280, scheme="light", part=""):
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=844,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.cdp(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.driver.get("about:blank")
        self.logs = {kind: self.driver.get_log(kind) for kind in ("browser", "performance")}
        self.driver.get(self.page.as_uri() + part)

    def cdp(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def run(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def find(self, selector, text=""):
        found = self.driver.find_elements("css selector", selector)
        (one,) = [each for each in found if text in each.text]
        return one

    def click(self, selector, text=""):
        one = self.find(selector, text)
        self.run("arguments[0].scrollIntoView({block: 'center'})", one)
        one.click()

    def column(self, selector, place):
        cells = f"{selector} tbody tr:not([hidden]) td:nth-child({place})"
        return self.run("[...document.querySelectorAll(arguments[0])].map(c => c.innerText)", cells)

    def background(self):
        color = self.run("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in color[4:-1].split(","))

    def screenshot(self):
        png = self.cdp("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
