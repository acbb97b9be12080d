"""The process between the launcher and a trainer: nothing that was started outlives it.

    python -m astuner.backbone.spawned.guard TEMPORARY_FOLDER COMMAND ...

Runs the command, and ends when it ends or when standard input closes, which happens
when the launcher dies, however it dies. Then every process below it is killed: Ray's
servers and workers go into groups of their own and lose their parents, so the guard
makes itself the heir of all orphans (Linux; elsewhere Ray's own reaper has to do). Its
exit code is the command's. Last, the temporary folder is deleted.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
"""For what is ending by itself, after a command that ended by itself."""
KILL_SECONDS = 20.0
LOST = 128 + signal.SIGKILL
"""The exit code when the launcher is gone."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(arguments: Sequence[str]) -> int:
    """Guard one command."""
    temporary, *command = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides when to stop
    signal.signal(signal.SIGTERM, _end)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    grace = 0.0
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_guard)
        code = _watch(child)
        grace = GRACE_SECONDS if child.returncode is not None else 0.0
        return code
    finally:
        kill_descendants(grace)
        shutil.rmtree(temporary, ignore_errors=True)


def _end(signum: int, _: object) -> None:
    sys.exit(LOST)


def _watch(child: subprocess.Popen[bytes]) -> int:
    """The child's exit code, as a shell tells it; LOST when standard input ends first."""
    while child.poll() is None:
        ready, _, _ = select.select([0], [], [], POLL_SECONDS)
        if ready and not os.read(0, 1):
            return LOST
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def kill_descendants(grace: float) -> None:
    """Kill all below this process, until there are none; `grace` seconds to end by themselves."""
    started = time.monotonic()
    while alive := _descendants():
        waited = time.monotonic() - started
        if waited > KILL_SECONDS + grace:
            print(f"guard: cannot kill {[p.pid for p in alive]}", flush=True)
            return
        if waited >= grace:
            for process in alive:
                with suppress(psutil.Error):
                    process.kill()
        time.sleep(0.05)


def _descendants() -> list[psutil.Process]:
    """Those that run; the dead are buried."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [p for p in psutil.Process().children(recursive=True) if _runs(p)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _die_with_guard() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
