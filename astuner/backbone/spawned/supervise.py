"""A trainer's processes as one child of the launcher: started, watched, stopped and buried.

The child is a `guard`, which ends with us and takes everything below it along. Here is
also how long silence may last: `Silence` measures it on our own clock, from any change
of what the processes show. What they show is the `following`'s, and what their end means
`watching` and `failing` say.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from astuner.backbone.spawned.files import STOP

CLOSE_SECONDS = 30.0
"""The guard needs a moment to kill what is below it."""
SHORT_TEMPORARY = "/tmp"
"""Ray puts Unix sockets some 70 characters below its folder, and they may have 107."""


class Child:
    """One command under a guard, with its output in a file `log` of the folder. Close it, or use
    it as a context manager; closing kills whatever still runs."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        *,
        log: str,
    ) -> None:
        """`environment` is added to ours; RAY_TMPDIR in it is set to a new folder of the
        child's own, which is deleted with it."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.temporary = temporary_folder()
        guard = [sys.executable, "-m", "astuner.backbone.spawned.guard", str(self.temporary)]
        with (folder / log).open("ab") as output:
            self._guard = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal goes to its whole process group: it is ours to handle.
                start_new_session=True,
                env={**os.environ, **(environment or {}), "RAY_TMPDIR": str(self.temporary)},
            )

    @property
    def pid(self) -> int:
        """Of the guard: everything that was started is below it."""
        return self._guard.pid

    def ended(self) -> int | None:
        """The command's exit code (128 + signal), None while it runs."""
        return self._guard.poll()

    def ask_to_stop(self) -> None:
        """Finish the step, save it, end."""
        (self._folder / STOP).touch()

    def close(self) -> None:
        """Kill what still runs, and wait until it is gone. Safe to call twice."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # it cannot kill something, and says so in the log
            self._guard.kill()
            self._guard.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)

    async def aclose(self) -> None:
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def temporary_folder() -> Path:
    """A new folder with a short name; below RAY_TMPDIR where the user has set it."""
    base = os.environ.get("RAY_TMPDIR") or SHORT_TEMPORARY
    usable = os.path.isdir(base) and os.access(base, os.W_OK)
    return Path(tempfile.mkdtemp(prefix="astuner-", dir=base if usable else None))


class Silence:
    """For how long nothing has changed."""

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`limit` in seconds; 0 is none."""
        self._limit = limit
        self._clock = clock
        self._seen: object = None
        self._since = clock()

    def note(self, seen: object) -> None:
        """What is visible now; anything unlike the last time is a sign of life."""
        if seen != self._seen:
            self._seen, self._since = seen, self._clock()

    @property
    def seconds(self) -> float:
        return self._clock() - self._since

    @property
    def too_long(self) -> bool:
        return 0 < self._limit <= self.seconds
