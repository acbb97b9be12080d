"""What has to be done every few seconds, each chore on its own.

One that fails is told of in the log and done again the next time; one that hangs holds up
no other. What the chores are is not known here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from astuner.errors import AstunerError

logger = logging.getLogger(__name__)

Chore = Callable[[], Awaitable[object]]


class Chores:
    """Lives on the server's loop."""

    def __init__(self, chores: Mapping[str, Chore], seconds: float) -> None:
        """`seconds` between two times of each."""
        self._chores = dict(chores)
        self._seconds = seconds
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, name: str, chore: Chore) -> None:
        """One more; before `start`."""
        self._chores[name] = chore

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._repeat(name, chore)) for name, chore in self._chores.items()
        ]

    async def once(self) -> None:
        """All of them now, one after the other."""
        for name, chore in self._chores.items():
            await self._do(name, chore)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _repeat(self, name: str, chore: Chore) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            await self._do(name, chore)

    async def _do(self, name: str, chore: Chore) -> None:
        try:
            await chore()
        except AstunerError as error:
            logger.error("%s: %s", name, error)
        except Exception:  # a bug of ours; without chores nothing would ever be given back
            logger.exception("%s", name)
