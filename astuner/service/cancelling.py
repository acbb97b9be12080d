"""Verbs of the engine that make something, awaited by somebody who may be cancelled.

A verb that has begun cannot be stopped: when nobody waits for it any more, it ends all
the same, and what it has made would have no owner. `undone_if_cancelled` gives that
back; `apart` lets work end that keeps its own books. Neither makes cancelling slower.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from astuner.errors import AstunerError

T = TypeVar("T")
logger = logging.getLogger(__name__)

_running: set[asyncio.Task[Any]] = set()
"""The loop holds its tasks weakly."""


async def apart(work: Coroutine[Any, Any, T]) -> T:
    """Its result; if we are cancelled, it goes on without us."""
    return await asyncio.shield(_kept(work))


async def undone_if_cancelled(
    work: Coroutine[Any, Any, T], undo: Callable[[T], Awaitable[None]]
) -> T:
    """Its result; if we are cancelled meanwhile, `undo` is called with it when it is there."""
    task = _kept(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        _kept(_undo(task, undo))
        raise


async def _undo(task: asyncio.Task[T], undo: Callable[[T], Awaitable[None]]) -> None:
    try:
        await undo(await task)
    except AstunerError as error:
        logger.debug("nothing to undo: %s", error)


def _kept(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    task = asyncio.ensure_future(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task
