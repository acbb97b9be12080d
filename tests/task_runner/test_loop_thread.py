"""A loop is for one piece of work; its thread serves the next, unless it was interrupted."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import pytest

from astuner.errors import EngineError
from astuner.task_runner.loop_thread import LoopThread

from .fakes import LIMIT, until

VARIABLE = ContextVar("VARIABLE", default="unset")
KEPT: list[object] = []


async def current() -> threading.Thread:
    return threading.current_thread()


async def use(body: Callable[[], Awaitable[object]], name: str = "episode") -> Any:
    """What one piece of work gave, after its thread is free again."""
    thread = LoopThread(name)

    async def work() -> object:
        return await body()

    ended = await thread.start(work).wait(LIMIT)
    thread.close()
    await until(lambda: not thread.alive)
    assert ended is not None
    return ended.error or ended.value


async def test_later_episodes_get_the_thread_but_a_new_loop() -> None:
    async def place() -> tuple[threading.Thread, str, asyncio.AbstractEventLoop]:
        thread = threading.current_thread()
        return thread, thread.name, asyncio.get_running_loop()

    names = [f"episode {i}" for i in range(20)]
    threads, seen, loops = zip(*[await use(place, name) for name in names], strict=True)
    assert len(set(threads)) < 20  # now and then one is not back yet
    assert list(seen) == names
    assert len(set(loops)) == 20
    await until(lambda: all(thread.name == "episode-worker" for thread in threads))


async def test_an_episode_sees_no_context_variables_of_another() -> None:
    async def change() -> str:
        before = VARIABLE.get()
        VARIABLE.set("mine")
        asyncio.get_running_loop().call_soon(VARIABLE.set, "mine")
        await asyncio.get_running_loop().run_in_executor(None, VARIABLE.set, "mine")
        theirs = await asyncio.get_running_loop().run_in_executor(None, VARIABLE.get)
        return before + theirs

    assert {await use(change) for _ in range(5)} == {"unsetunset"}


async def test_the_result_does_not_wait_for_a_task_left_behind() -> None:
    go_on = threading.Event()

    async def block() -> None:
        go_on.wait(LIMIT)

    async def work() -> int:
        KEPT.append(asyncio.create_task(block()))
        return 7

    thread = LoopThread("episode")
    ended = await thread.start(work).wait(LIMIT)
    assert ended is not None and ended.value == 7
    assert not go_on.is_set()
    go_on.set()
    thread.close()
    await until(lambda: not thread.alive)
    KEPT.clear()


async def test_an_interrupted_thread_serves_no_other_work() -> None:
    thread = LoopThread("episode")
    ended = await thread.start(current).wait(LIMIT)
    assert ended is not None and ended.value is not None
    thread.interrupt()  # its work has just ended
    thread.close()
    served = ended.value
    await until(lambda: not served.is_alive())
    assert not thread.alive


async def test_a_closed_thread_is_not_interrupted() -> None:
    thread = LoopThread("episode")
    ended = await thread.start(current).wait(LIMIT)
    assert ended is not None and ended.value is not None
    thread.close()
    await until(lambda: not thread.alive)
    thread.interrupt()
    served = ended.value
    await until(lambda: served.name == "episode-worker")
    assert served.is_alive()
    assert await use(current)


async def test_no_file_for_another_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio.get_event_loop_policy(), "new_event_loop", full)
    with pytest.raises(EngineError, match=r"another episode: .* Too many open files\. Lower"):
        LoopThread("episode")


async def test_a_loop_policy_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loop(asyncio.SelectorEventLoop):
        pass

    async def kind() -> type:
        return type(asyncio.get_running_loop())

    monkeypatch.setattr(asyncio.get_event_loop_policy(), "new_event_loop", Loop)
    assert await use(kind) is Loop
