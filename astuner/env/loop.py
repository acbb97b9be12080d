"""The event loop that environments are spoken to from, in a thread of its own.

A workflow has a loop of its own for each episode, or none; HTTP connections and
semaphores belong to one loop. So all work on environments happens in this one, and is
handed over: awaited from any loop, or waited for from any thread. It knows nothing of
environments either.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class EnvLoop:
    """The loop and its daemon thread; alive until `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="environments", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start it in the loop; may be called from any thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await it from another loop; cancelling this cancels it."""
        return await asyncio.wrap_future(self.submit(work))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Block the calling thread until it ends."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("An environment cannot wait for itself: await it instead.")
        return self.submit(work).result()

    def close(self) -> None:
        """End the thread; what still runs is cancelled."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left, timeout=2.0))
        self._loop.close()
