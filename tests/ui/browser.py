"""A headless Chromium for the tests of the pages."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Where this variable is "required", as in CI, a missing browser is a failure.
_IS_REQUIRED = os.environ.get("ATB_PLLAVA_BROWSER_TESTS") == "required"


class Browser:
    """A window of Chromium on one page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def find(self, selector: str) -> Any:
        """The first element that a CSS selector names."""
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """The visible texts of all elements that a CSS selector names."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
        return [text.strip() for text in self.driver.execute_script(script, selector)]

    def wait(self, what: Callable[[], T], seconds: float = 60) -> T:
        """The first result of `what` that counts as true. Elements may come and go meanwhile."""
        from selenium.common.exceptions import WebDriverException

        deadline = time.monotonic() + seconds
        while True:
            try:
                if result := what():
                    return result
            except WebDriverException:
                pass
            if time.monotonic() > deadline:
                raise AssertionError(f"the page does not show it: {self.texts('body')}")
            time.sleep(0.1)

    def set_width(self, width: int) -> None:
        """Lay the page out as on a screen of so many pixels."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        script = "return document.documentElement.scrollWidth - window.innerWidth"
        return max(0, int(self.driver.execute_script(script)))


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile. Skips the test, with the reason, where there is none."""
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver_program = shutil.which("chromedriver")
    if program is None or driver_program is None:
        missing = "chromium or chromedriver is missing: apt-get install chromium chromium-driver"
        if _IS_REQUIRED:
            pytest.fail(missing)
        pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={profile}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
