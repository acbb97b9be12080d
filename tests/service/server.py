"""`astuner serve` in a process of its own, over the tiny Llama, on a free port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 90.0


class Server:
    """The process; `wait_ready` before anything else."""

    def __init__(
        self, model: Path, data: Path, *overrides: str, command: Sequence[str] = ()
    ) -> None:
        """`command` is an `astuner serve ...` as a user types it; overrides come after it."""
        self._data = data
        self._log = data / "server.log"
        data.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "astuner.cli", *(command[1:] or ["serve"])]
        command += [f"model.path={model}", "model.name=tiny", "model.dtype=float32", "port=0"]
        command += [f"data_dir={data}", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._started_at = self._log.stat().st_size if self._log.exists() else 0
        with open(self._log, "a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        self.url = ""

    @property
    def key(self) -> str:
        return (self._data / "api-key").read_text().strip()

    def output(self) -> str:
        """What this process has printed."""
        return self._log.read_text()[self._started_at :]

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            found = re.search(r"Serving \S+ at (http://\S+) for", self.output())
            if found:
                self.url = found[1]
                self._wait_listening(deadline)
                return
            assert self.process.poll() is None, self.output()
            time.sleep(0.05)
        raise AssertionError(f"the server does not start: {self.output()}")

    def _wait_listening(self, deadline: float) -> None:
        import httpx

        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{self.url}/api/v1/healthz", timeout=5)
                return
            time.sleep(0.05)

    def wait(self) -> int:
        """Until it ends by itself; its exit code."""
        return self.process.wait(START_SECONDS)

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def kill(self) -> None:
        """As SIGKILL does: it tidies nothing up."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)


@contextlib.contextmanager
def tiny_server(model: Path, data: Path, *overrides: str) -> Iterator[Server]:
    server = Server(model, data, *overrides)
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()
