"""An event loop with a daemon thread to itself, for code that is not ours.

Whatever the code does there - block, never return, raise SystemExit - is its own
trouble: the thread can be asked where it stands, and be left behind. Results come
back as data (`Ended`), never as an exception. This module is the named boundary
for user code; it does not decide what an exception means.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from astuner.errors import EngineError
from astuner.task_runner.stacks import waiting_at
from astuner.task_runner.workers import WORKERS

T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, T]]
LINGER = 5.0
"""Seconds that tasks which user code left behind get to end after their cancellation."""


@dataclass(frozen=True, slots=True)
class Ended(Generic[T]):
    """How a piece of user code ended: with a value or with an error."""

    value: T | None
    error: BaseException | None = None


class Running(Generic[T]):
    """One piece of work in a LoopThread. All methods may be called from any thread."""

    def __init__(self, thread: LoopThread, work: Work[T]) -> None:
        self._thread = thread
        self._work = work
        self._ended: Future[Ended[T]] = Future()
        self._ended.set_running_or_notify_cancel()  # so that a waiter who leaves cannot cancel it
        self._coroutine: Coroutine[Any, Any, T] | None = None
        self._task: asyncio.Task[None] | None = None

    async def wait(self, timeout: float | None) -> Ended[T] | None:
        """How it ended, or None when it has not after `timeout` seconds (None: no limit)."""
        waiter = asyncio.wrap_future(self._ended)
        try:
            await asyncio.wait({waiter}, timeout=timeout)
            return waiter.result() if waiter.done() else None
        finally:
            waiter.cancel()

    def cancel(self) -> None:
        """Raise CancelledError at its next await, if it has not ended."""
        if not self._ended.done():
            self._thread.call(lambda: self._task and self._task.cancel())

    def where(self) -> str:
        """The user's lines it stands at: where it blocks the thread, or what it awaits."""
        return waiting_at(self._thread.ident, self._coroutine)

    def begin(self) -> None:
        """Called in the thread itself, once."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        ended: Ended[T]
        try:
            self._coroutine = self._work()
            ended = Ended(await self._coroutine)
        except BaseException as error:  # the boundary: SystemExit ends the episode, not the run
            ended = Ended(None, error)
        self._ended.set_result(ended)


class LoopThread:
    """The loop, new, and one of the workers' threads; its own until `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._closed = False
        self._stopping = False
        self._interrupted = False
        self._loop = _new_loop()
        self._loop.set_default_executor(WORKERS)
        self.ident = 0
        """The thread's; 0 before and after."""
        WORKERS.start(self._serve)

    @property
    def alive(self) -> bool:
        return not self._loop.is_closed()

    def start(self, work: Work[T]) -> Running[T]:
        """Run `work()` in the thread, beside whatever runs there already."""
        running = Running(self, work)
        self.call(running.begin)
        return running

    def call(self, function: Callable[[], object]) -> None:
        """Run a function in the thread soon; does nothing once closed."""
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Cancel what is left and end the thread, as soon as it listens. Does not wait."""
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(self._stop)
                self._closed = True

    def interrupt(self) -> None:
        """Raise SystemExit in the Python code that holds the thread, so that an endless loop
        does not eat the processor for ever. A blocking call notices only when it returns.
        Does nothing once closed: the thread may have other work by then."""
        exception = ctypes.py_object(SystemExit)
        with self._lock:
            if not self._closed:
                self._interrupted = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), exception)

    def _stop(self) -> None:
        self._stopping = True
        self._loop.stop()

    def _serve(self) -> None:
        threading.current_thread().name = self._name
        self.ident = threading.get_ident()
        asyncio.set_event_loop(self._loop)
        try:
            while not self._stopping:
                # A task of the user's that exits breaks out of the loop; the others go on.
                with contextlib.suppress(SystemExit, KeyboardInterrupt):
                    self._loop.run_forever()
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_until_complete(self._clear())
        finally:
            self.ident = 0
            asyncio.set_event_loop(None)
            self._loop.close()
        if self._interrupted:
            raise SystemExit  # no other work in a thread that may still have one to come

    async def _clear(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=LINGER)
        await self._loop.shutdown_asyncgens()


def _new_loop() -> asyncio.AbstractEventLoop:
    """Raises EngineError when the process may open no more files (each loop needs three)."""
    try:
        return asyncio.new_event_loop()
    except OSError as error:
        raise EngineError(
            f"Cannot start another episode: {error}. Lower rollout.max_env_worker, or allow "
            "more open files (ulimit -n)."
        ) from error


async def run_here(work: Work[T]) -> Ended[T]:
    """Run `work()` in the calling thread, where an IDE's breakpoints stop.

    Ctrl-C and a cancellation from outside pass through.
    """
    try:
        return Ended(await work())
    except (Exception, SystemExit) as error:  # the same boundary as in the thread
        return Ended(None, error)
