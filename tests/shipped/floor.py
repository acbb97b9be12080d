"""A world that may fail; in a file of its own, so that a service loads nothing else."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from pathlib import Path
from typing import Any, ClassVar


class Floor:
    """A world of one step, which may go wrong: as the action says, or in being made."""

    open_now: ClassVar[set[int]] = set()
    made: ClassVar[itertools.count[int]] = itertools.count()
    answer: ClassVar[threading.Event] = threading.Event()
    """Ends the silence of those that never answer."""

    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        self.params = params
        if params.get("every_second_fails") and next(self.made) % 2:
            raise OSError("no display")
        self.open_now.add(id(self))

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        return "Go.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if action == "die":
            raise OSError("the floor gave way")
        if action == "hang":
            self.answer.wait(60)
        if action == "kill" and not Path(self.params["killed"]).exists():
            Path(self.params["killed"]).touch()  # once
            os.kill(os.getpid(), signal.SIGKILL)
        return "There.", 1.0, True, False, {}

    def close(self) -> None:
        self.open_now.discard(id(self))
