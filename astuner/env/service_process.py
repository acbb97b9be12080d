"""An environment service as a child process, owned by its pid.

The child is `python -m astuner env serve ... --with-parent`: it says where it listens in its
first line and ends when its standard input closes, so also when this process is killed. It
has a process group of its own, which is ended with it (browsers, for one). A service that
dies is started again at the same address, a few times.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Any
from urllib.parse import urlsplit

from astuner.errors import EnvError

log = logging.getLogger(__name__)
STOP_SECONDS = 5.0
LAST_LINES = 15
MOST_RESTARTS = 3
LOOK_SECONDS = 0.2
"""How often it is looked at whether the service still runs."""


class ServiceProcess:
    """Runs from `__enter__`, which raises EnvError when it does not start, to `__exit__`."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        start_timeout: float = 120.0,
        create_timeout: float = 60.0,
        step_timeout: float = 60.0,
        max_instances: int = 1024,
    ) -> None:
        self.url = ""
        self.restarts = 0
        """How often it had to be started again."""
        self._names = list(names)
        self._start_timeout = start_timeout
        self._limits = ["--create-timeout", f"{create_timeout:g}"]
        self._limits += ["--step-timeout", f"{step_timeout:g}"]
        self._limits += ["--max-instances", str(max_instances)]
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None
        self._stopping = threading.Event()
        self._changing = threading.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def __enter__(self) -> ServiceProcess:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        try:
            self._start(port=0)
        except BaseException:
            self._stop()
            raise
        threading.Thread(target=self._watch, name="environment service", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self, port: int) -> None:
        command = [sys.executable, "-m", "astuner.cli", "env", "serve", *self._names]
        self._process = subprocess.Popen(
            [*command, "--port", str(port), "--with-parent", *self._limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self.url = self._first_line(self._process)

    def _watch(self) -> None:
        """Start the service again when it has died."""
        while not self._stopping.wait(LOOK_SECONDS):
            with self._changing:
                process = self._process
                if process is None or (code := exit_code(process.pid)) is None:
                    continue
                self.restarts += 1
                told = f"The environment service ended with exit code {code}; its last lines:\n"
                log.warning("%s%s", told, self._last_lines())
                if self.restarts > MOST_RESTARTS:
                    log.error("It ended too often (%d times) to be started again.", self.restarts)
                    return
                _end(process)
                self._process = None
                try:
                    self._start(port=urlsplit(self.url).port or 0)
                except EnvError as error:
                    log.error("It could not be started again: %s", error)
                    return

    def _first_line(self, process: subprocess.Popen[str]) -> str:
        told: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:  # to its end, so that the child never blocks on it
                if line.startswith("{"):
                    told.append(line)

        threading.Thread(target=read, name="environment service's lines", daemon=True).start()
        ends = time.monotonic() + self._start_timeout
        while not (told or self._stopping.is_set() or time.monotonic() > ends):
            if exit_code(process.pid) is not None:
                break
            time.sleep(0.02)
        if told:
            said: dict[str, Any] = json.loads(told[0])
            return str(said["url"])
        how = (
            f"was not ready within env.start_timeout = {self._start_timeout:g} s"
            if (code := exit_code(process.pid)) is None
            else f"ended with exit code {code}"
        )
        raise EnvError(
            f"The environment service {' '.join(self._names)!r} {how}. Its last lines:\n"
            f"{self._last_lines()}",
            cause="unavailable",
        )

    def _last_lines(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-LAST_LINES:])

    def _stop(self) -> None:
        self._stopping.set()
        with self._changing:
            if self._process is not None:
                _end(self._process)
                self._process = None
            if self._log is not None:
                self._log.close()


def _end(process: subprocess.Popen[str]) -> None:
    """Politely first: it releases its instances and ends when its input closes."""
    with suppress(OSError):
        assert process.stdin is not None
        process.stdin.close()
    ends = time.monotonic() + STOP_SECONDS
    while exit_code(process.pid) is None and time.monotonic() < ends:
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own group, which we made
    process.wait()


def exit_code(pid: int) -> int | None:
    """The exit code of our child, None while it runs. It is not collected, so that the number
    of its group, which we still have to end, cannot become another's."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
