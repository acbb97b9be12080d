"""A daemon thread that does one thing after the other, for code that blocks.

An environment's instance lives in one: many worlds (browsers, sqlite, old simulators) may
only be touched by the thread that made them, and one that never answers blocks nobody
else. The thread cannot keep the process from exiting. It knows nothing of environments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """The thread; it starts with its first job and ends after `close`."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Do this after what was submitted before. Never raises."""
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """End after the jobs submitted so far. Does not wait."""
        self._jobs.put(None)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except StopIteration as error:  # futures do not take it
                future.set_exception(RuntimeError(f"StopIteration: {error}"))
            except BaseException as error:  # handed to whoever waits, as any executor does
                future.set_exception(error)
            del job, future, item  # an idle thread must not keep the last instance alive
