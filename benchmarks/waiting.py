"""Another side of a benchmark: a process that does its piece when told to, else waits.

It is sent a line for each piece and answers with a line of JSON; what else it prints is
ignored, its log is shown when it ends too early. Between pieces it takes no processor time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INSTALL = [sys.executable, str(ROOT / "scripts" / "install.py"), "--env"]
# Threads that spin between two pieces would slow the other side down.
CALM = {"GOMP_SPINCOUNT": "8000", "KMP_BLOCKTIME": "1"}


def build(environment: str) -> None:
    """Have the environment made, if it is not there; no part of what is measured."""
    subprocess.run([*INSTALL, environment], check=True, stdout=subprocess.DEVNULL)


class Side:
    """`script` of benchmarks/ in a named environment, given `job` as a file of JSON; back
    once it has said that it is ready. It is stopped while it waits, because some servers never
    rest. Raises RuntimeError when it ends before it is told to."""

    def __init__(self, environment: str, script: str, job: Mapping[str, Any], folder: Path) -> None:
        path, self._log = folder / f"{script}.json", folder / f"{script}.log"
        path.write_text(json.dumps(job))
        self._process = subprocess.Popen(
            [*INSTALL, environment, "--", "python", str(ROOT / "benchmarks" / script), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
            env=os.environ | CALM,
            start_new_session=True,
        )
        self._answer()
        self._signal(signal.SIGSTOP)

    def __call__(self) -> dict[str, Any]:
        """Let it do its piece."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        try:
            return self._answer()
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        """To it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"It ended too early:\n{self._log.read_text()[-4000:]}")
