"""What an unfinished episode is waiting for, for the watchdog and the display.

Written by the runner, read from any thread; it controls nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class LiveEpisode:
    """What an unfinished episode is waiting for."""

    episode_id: str
    task_id: str
    waiting_for: str
    since: float
    """`time.monotonic()` when this wait began."""
    where: Callable[[], str] = field(default=lambda: "")
    """The user's lines it stands at."""

    def wait_for(self, what: str) -> None:
        self.waiting_for, self.since = what, time.monotonic()

    def watch(self, where: Callable[[], str]) -> None:
        self.where = where
