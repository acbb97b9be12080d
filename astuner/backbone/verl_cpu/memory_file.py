"""A file in memory that other processes of the machine can open by its path.

It has no name in any folder: it is gone when it is closed or its process dies, be it
by SIGKILL, so that no run leaves gigabytes in /dev/shm. Linux only, as verl is.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType


class MemoryFile:
    """Empty at first. Who has it open or mapped keeps its content."""

    def __init__(self, name: str) -> None:
        self._file = os.memfd_create(name)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._file}")
        """Valid on this machine, for processes of this user, until it is closed."""

    def close(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> MemoryFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def machine() -> str:
    """Two processes of which this is equal see each other's memory files."""
    return f"{socket.gethostname()}:{os.stat('/proc/self/ns/pid').st_ino}"
