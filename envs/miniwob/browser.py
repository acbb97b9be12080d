"""A headless Chromium of one's own: started, spoken to, and gone with whoever started it.

Chromium is spoken to through ChromeDriver, and lives as long as that: it ends when the pipe
between them closes. ChromeDriver in turn is ended by its process id, or by the system when the
thread that started it dies. Knows nothing of MiniWoB.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from typing import Any

import psutil
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains

from astuner.errors import EnvError

ANSWER_SECONDS = 30.0
"""A browser that answers nothing for so long has failed."""
END_SECONDS = 5.0
CHROMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--window-size=500,320",
    "--remote-debugging-pipe",
)


class Browser:
    """One browser with one page."""

    def __init__(self, chrome: str, chromedriver: str) -> None:
        """Raises EnvError when it does not start."""
        self._profile = tempfile.TemporaryDirectory(prefix="miniwob-", ignore_cleanup_errors=True)
        options = webdriver.ChromeOptions()
        options.binary_location = chrome
        for flag in (*FLAGS, f"--user-data-dir={self._profile.name}"):
            options.add_argument(flag)
        self._service = _Driver(chromedriver, log_output=subprocess.DEVNULL)
        try:
            self._driver = webdriver.Chrome(service=self._service, options=options)
        except WebDriverException as error:
            self.close()
            raise EnvError(
                f"Chromium ({chrome}, by {chromedriver}) did not start: {error.msg}. Are the two "
                "of one version?",
                cause="unavailable",
            ) from None
        self._driver.command_executor.client_config.timeout = ANSWER_SECONDS

    @property
    def pid(self) -> int:
        """Chromium's first process."""
        return int(self._driver.capabilities["goog:processID"])

    def open(self, url: str) -> None:
        self._driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self._driver.execute_script(script, *arguments)

    def press(self, keys: str) -> None:
        """Press and let go one key after the other, where the page's focus is."""
        chain = ActionChains(self._driver, duration=0)
        for key in keys:
            chain.key_down(key).key_up(key)
        chain.perform()

    def click_at(self, x: int, y: int) -> None:
        chain = ActionChains(self._driver, duration=0)
        chain.w3c_actions.pointer_action.move_to_location(x, y).click()
        chain.w3c_actions.perform()

    def close(self) -> None:
        """End it; not asked for politely, for it may not answer any more."""
        _end(self._service)
        self._profile.cleanup()


class _Driver(Service):
    """ChromeDriver, tied to this thread's life where the system can do that."""

    def __init__(self, chromedriver: str, **options: Any) -> None:
        tie = shutil.which("setpriv")
        self._before = ["--pdeathsig", "KILL", chromedriver] if tie else []
        super().__init__(executable_path=tie or chromedriver, **options)

    def env_path(self) -> str | None:
        """Nothing: which program it is was decided before."""
        return None

    def command_line_args(self) -> list[str]:
        return [*self._before, *super().command_line_args()]


def _end(service: Service) -> None:
    """Kill ChromeDriver; what it started ends with it, or is killed after a while."""
    process = getattr(service, "process", None)
    if process is None:
        return
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(started, timeout=END_SECONDS)
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def find_chromium(chrome: str, chromedriver: str) -> tuple[str, str]:
    """The two programs, as given, as the environment says, or as they are found. Raises EnvError
    with what to install."""
    given = chrome or os.environ.get("MINIWOB_CHROME_BINARY", "")
    driver = chromedriver or os.environ.get("MINIWOB_CHROMEDRIVER", "")
    found = given or next(filter(None, map(shutil.which, CHROMES)), "")
    driver = driver or shutil.which("chromedriver") or ""
    for name, path in (("Chromium", found), ("ChromeDriver", driver)):
        if not path or shutil.which(path) is None:
            raise EnvError(
                f"The environment miniwob needs {name}, which is not {path or 'on the PATH'}. On "
                "Debian or Ubuntu: apt-get install chromium chromium-driver. Elsewhere set "
                "params.chrome and params.chromedriver, or MINIWOB_CHROME_BINARY and "
                "MINIWOB_CHROMEDRIVER, to the two programs of one version.",
                cause="refused",
            )
    return found, driver
