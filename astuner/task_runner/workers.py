"""Daemon threads for code that is not ours, kept for more of it.

There are as many as there is work at once, so no work waits for other work; one that
stays idle ends. None can keep the process from exiting. Work starts with no context
variables, as in a new thread; what earlier work left in a `threading.local` it sees.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context
from queue import Empty, SimpleQueue
from typing import Any

Work = Callable[[], object]
IDLE = 30.0
"""Seconds after which a thread without work ends."""
NAME = "episode-worker"


class Workers(ThreadPoolExecutor):
    """The threads; also the executor for `asyncio.to_thread`, which takes no other kind."""

    def __init__(self) -> None:
        super().__init__()
        self._idle: list[SimpleQueue[Work]] = []
        """Where the threads without work wait for some, the latest last."""
        if hasattr(os, "register_at_fork"):  # a forked child has none of the threads
            os.register_at_fork(after_in_child=self._idle.clear)

    def start(self, work: Work) -> None:
        """Run `work()` in one of the threads. By SystemExit it ends the thread too."""
        try:
            waiting = self._idle.pop()
        except IndexError:
            waiting = SimpleQueue[Work]()
            threading.Thread(target=self._serve, args=(waiting,), daemon=True, name=NAME).start()
        waiting.put(work)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # handed to whoever awaits it, as any executor does
                future.set_exception(error)

        self.start(work)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing to wait for: its threads are nobody's duty."""

    def _serve(self, waiting: SimpleQueue[Work]) -> None:
        with contextlib.suppress(SystemExit):
            while work := self._next(waiting):
                Context().run(work)
                del work  # or it would keep alive what it was done for
                threading.current_thread().name = NAME
                self._idle.append(waiting)

    def _next(self, waiting: SimpleQueue[Work]) -> Work | None:
        """The next work, or None when there was none for long."""
        try:
            return waiting.get(timeout=IDLE)
        except Empty:
            pass
        try:
            self._idle.remove(waiting)
        except ValueError:  # somebody has just taken this thread, and will give it work
            return waiting.get()
        return None


WORKERS = Workers()
