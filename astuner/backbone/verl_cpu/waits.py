"""Waiting for another process of verl's, never for ever.

verl itself waits without a limit: a server that never answers would leave the trainer
stuck in silence. Ends the wait, not the other process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from astuner.errors import DeadlineExceeded

T = TypeVar("T")

SYNC_SECONDS = 600.0
"""For one machine to copy the weights of any model that trains on its CPU."""


async def answer(waited_for: Awaitable[T], seconds: float, what: str) -> T:
    """The result. Raises DeadlineExceeded, which names `what` was waited for."""

    async def wait() -> T:
        return await waited_for

    try:
        return await asyncio.wait_for(wait(), seconds)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"Waited {seconds:.0f} s for {what}, without an answer. Its process may be stuck or "
            "the machine out of memory; see its log in the run's verl/verl.log."
        ) from error
