"""A daemon thread with an event loop of its own, for code that is not ours.

Whatever the code does there - block, never return, raise SystemExit - is its own
trouble: the thread can be asked where it stands, and be left behind. Results come
back as data (`Ended`), never as an exception. This module is the named boundary
for user code; it does not decide what an exception means.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import selectors
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from astuner.errors import EngineError
from astuner.task_runner.stacks import waiting_at

T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, T]]
LINGER = 5.0
"""Seconds that tasks which user code left behind get to end after their cancellation."""
SETTLING = 3
"""Turns of the loop in which a task that was cancelled at the end may still be ending."""


@dataclass(frozen=True, slots=True)
class Ended(Generic[T]):
    """How a piece of user code ended: with a value or with an error."""

    value: T | None
    error: BaseException | None = None


class _DaemonExecutor(ThreadPoolExecutor):
    """For `asyncio.to_thread` in all loops: as many threads as there is work at once, kept for
    more of it, that cannot keep the process from exiting."""

    def __init__(self) -> None:
        super().__init__()
        self._idle: list[SimpleQueue[Callable[[], None]]] = []
        """Where the threads without work wait for some, the latest last."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # handed to whoever awaits it, as any executor does
                future.set_exception(error)

        try:
            self._idle.pop().put(work)
        except IndexError:
            target = partial(self._serve, work)
            threading.Thread(target=target, daemon=True, name="episode-worker").start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing to wait for: its threads are nobody's duty."""

    def _serve(self, work: Callable[[], None]) -> None:
        waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()
        while True:
            work()
            del work  # or it would keep alive what it was done for
            self._idle.append(waiting)
            work = waiting.get()


_EXECUTOR = _DaemonExecutor()


class Running(Generic[T]):
    """One piece of work in a LoopThread. All methods may be called from any thread."""

    def __init__(self, thread: LoopThread, work: Work[T], *, alone: bool) -> None:
        self._thread = thread
        self._work = work
        self._alone = alone
        self._ended: Future[Ended[T]] = Future()
        self._ended.set_running_or_notify_cancel()  # so that a waiter who leaves cannot cancel it
        self._coroutine: Coroutine[Any, Any, T] | None = None
        self._task: asyncio.Task[None] | None = None
        self.left_nothing = False
        """Whether it ran alone, has ended and left the thread ready for other work."""

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
        with contextlib.suppress(asyncio.CancelledError):
            self.left_nothing = self._alone and await self._thread.settled()
        self._ended.set_result(ended)


class LoopThread:
    """The thread and its loop; alive until `close`."""

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._stopping = False
        self._tasks: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._selector = selectors.DefaultSelector()
        self._loop = _new_loop(self._selector)
        self._at_first = len(self._selector.get_map())
        self._loop.set_default_executor(_EXECUTOR)
        self._loop.set_task_factory(self._make_task)
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def ident(self) -> int:
        return self._thread.ident or 0

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self, work: Work[T], *, alone: bool = False) -> Running[T]:
        """Run `work()` in the thread, beside whatever runs there already if not `alone`."""
        running = Running(self, work, alone=alone)
        self.call(running.begin)
        return running

    def rename(self, name: str) -> None:
        """As debuggers and stack dumps show it."""
        self._thread.name = name

    async def settled(self) -> bool:
        """Whether nothing is left on the loop but the task that asks: no other task, no open
        connection, no factory of the user's. What was cancelled gets its moment to end."""
        for _ in range(SETTLING):
            others = {t for t in self._tasks if not t.done()} - {asyncio.current_task()}
            if not others:
                unwatched = len(self._selector.get_map()) == self._at_first
                return unwatched and self._loop.get_task_factory() == self._make_task
            await asyncio.sleep(0)
        return False

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
        does not eat the processor for ever. A blocking call notices only when it returns."""
        exception = ctypes.py_object(SystemExit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), exception)

    def _stop(self) -> None:
        self._stopping = True
        self._loop.stop()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._stopping:
            # A task of the user's that exits breaks out of the loop; the others go on.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_forever()
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            self._loop.run_until_complete(self._clear())
        self._loop.close()

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, **named: Any
    ) -> asyncio.Task[Any]:
        """The loop's own, noted: `asyncio.all_tasks` goes through those of all loops."""
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **named)
        self._tasks.add(task)
        return task

    async def _clear(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=LINGER)
        await self._loop.shutdown_asyncgens()


class LoopThreads:
    """Threads for one piece of work each at a time, kept for the next.

    Starting one takes longer than many an episode's own work. One that its user left
    something on (a task, a connection) ends instead. From the thread of its owner only.
    """

    def __init__(self) -> None:
        self._idle: list[LoopThread] = []

    def take(self, name: str) -> LoopThread:
        if not self._idle:
            return LoopThread(name)
        thread = self._idle.pop()
        thread.rename(name)
        return thread

    def give_back(self, thread: LoopThread, running: Running[Any]) -> None:
        """The thread, and what ran there. Does not wait."""
        if running.left_nothing:
            thread.rename("episode (none)")
            self._idle.append(thread)
        else:
            running.cancel()
            thread.close()

    def close(self) -> None:
        """End those that are idle. Does not wait."""
        while self._idle:
            self._idle.pop().close()


def _new_loop(selector: selectors.BaseSelector) -> asyncio.AbstractEventLoop:
    """Raises EngineError when the process may open no more files (each loop needs three)."""
    try:
        # On Windows only the other kind can start processes.
        windows = sys.platform == "win32"
        return asyncio.new_event_loop() if windows else asyncio.SelectorEventLoop(selector)
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
