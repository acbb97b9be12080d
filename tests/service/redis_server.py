"""A Redis server of the tests' own, on a free port of loopback, with everything in memory."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ports import held_port

WHY = "redis-server is not installed (Debian: apt-get install redis-server)"


@dataclass(frozen=True)
class Redis:
    url: str
    process: subprocess.Popen[bytes]

    def hang(self) -> None:
        """It keeps its connections and its data, and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[Redis]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip(WHY)
    with held_port() as port:
        command = [program, "--port", str(port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--dir", str(folder)]
        with open(folder / "redis.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(port)
            yield Redis(f"redis://127.0.0.1:{port}/0", process)
        finally:
            process.kill()
            process.wait(10)


def _wait(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise AssertionError("redis-server does not listen")
