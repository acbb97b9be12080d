"""Follows a spawned trainer to its end: what it writes, its silence, a wish to stop.

What is read and what becomes of it is the `Following`'s; when the run is over, and why, is
said here. Ends no process: the caller closes the child.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

from astuner.backbone.context import RunContext
from astuner.backbone.spawned import files
from astuner.backbone.spawned.failing import failure, stalled
from astuner.backbone.spawned.program import Program
from astuner.backbone.spawned.supervise import Child, Silence
from astuner.tracking import RunDisplay

POLL_SECONDS = 0.5
NOTICE_SECONDS = 5.0


class Following(Protocol):
    """Reads what the processes write."""

    def poll(self) -> None:
        """Everything that has come since the last call. Raises OSError when it cannot be kept."""
        ...

    def signs(self) -> object:
        """Differs from the last time if any process has shown life."""
        ...

    @property
    def waits_for(self) -> str:
        """In words."""
        ...


async def watch(
    program: Program,
    context: RunContext,
    child: Child,
    follower: Following,
    folder: Path,
    display: RunDisplay,
) -> None:
    """Follow the child to its end.

    Raises what made the run give up, DeadlineExceeded after too long a silence, and
    BackboneError when the child fails.
    """
    silence = Silence(context.config.trainer_common.stall_timeout)
    asked, noticed = False, 0.0
    while (code := child.ended()) is None:
        await asyncio.sleep(POLL_SECONDS)
        follower.poll()
        silence.note(follower.signs())
        if silence.too_long:
            raise await asyncio.to_thread(stalled, program, folder, silence.seconds)
        if (reason := files.gave_up(folder)) is not None:
            raise reason
        if context.stop.is_set() and not asked:
            asked = True
            child.ask_to_stop()
        if silence.seconds < NOTICE_SECONDS:
            noticed = 0.0
        elif silence.seconds > 2 * noticed:
            noticed = silence.seconds
            display.waiting(follower.waits_for, noticed)
    follower.poll()
    if (reason := files.gave_up(folder)) is not None:
        raise reason
    if code:
        raise failure(program, folder, code)
