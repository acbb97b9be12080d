"""What an unfinished episode is waiting for, for the watchdog and the display.

Written by the runner, read from any thread; it controls nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class LiveEpisode:
    """One unfinished episode."""

    episode_id: str
    task_id: str
    calls_in_flight: Callable[[], int] = field(default=lambda: 0)
    """LLM calls that are being answered now."""
    stage: str = "the workflow"
    since: float = field(default_factory=time.monotonic)
    """`time.monotonic()` when this stage began."""
    where: Callable[[], str] = field(default=lambda: "")
    """The user's lines it stands at."""

    @property
    def waiting_for(self) -> str:
        """What it waits for, in words."""
        calls = self.calls_in_flight()
        return f"{self.stage} ({calls} LLM calls in flight)" if calls else self.stage

    def enter(self, stage: str) -> None:
        self.stage, self.since = stage, time.monotonic()

    def watch(self, where: Callable[[], str]) -> None:
        self.where = where
