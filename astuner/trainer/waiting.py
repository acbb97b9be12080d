"""Waits for something outside without ever hanging in silence.

`wait_for` polls a stop signal, tells a watcher what is being waited for, and gives
up at a deadline. What was waited for is cancelled whenever it is not finished.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from astuner.errors import DeadlineExceeded
from astuner.trainer.seams import Stop

T = TypeVar("T")

POLL_SECONDS = 0.1
CANCEL_SECONDS = 10.0


class Stopped(Exception):
    """The stop signal was set; not an error, and never leaves the training loop."""


async def wait_for(
    work: Coroutine[Any, Any, T],
    what: str,
    *,
    stop: Stop,
    waiting: Callable[[str, float], None],
    notice_seconds: float,
    deadline: float = 0.0,
) -> T:
    """The result of `work`. `deadline` is in seconds; 0 waits on.

    Raises Stopped when `stop` is set first, DeadlineExceeded when time runs out.
    """
    task = asyncio.ensure_future(work)
    started = noticed = time.monotonic()
    try:
        while not task.done():
            if stop.is_set():
                raise Stopped
            now = time.monotonic()
            if deadline and now - started > deadline:
                raise DeadlineExceeded(
                    f"{what} did not come within {deadline:.0f} s, longer than all episode "
                    "deadlines together. See the log for the episodes still running."
                )
            if now - noticed >= notice_seconds:
                waiting(what, now - started)
                noticed = now
            await asyncio.wait({task}, timeout=POLL_SECONDS)
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_SECONDS)
