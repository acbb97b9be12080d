"""Threads with loops: used again when nothing is left on them, and never otherwise."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from astuner.task_runner.loop_thread import LoopThread, LoopThreads

from .fakes import LIMIT, until

KEPT: list[object] = []


@pytest.fixture
async def threads() -> AsyncIterator[LoopThreads]:
    made = LoopThreads()
    yield made
    made.close()
    KEPT.clear()


async def use(
    threads: LoopThreads, body: Callable[[], Awaitable[object]], name: str = "episode"
) -> tuple[LoopThread, Any]:
    """Where one piece of work ran, and what it gave."""
    thread = threads.take(name)

    async def work() -> object:
        return await body()

    running = thread.start(work, alone=True)
    ended = await running.wait(LIMIT)
    threads.give_back(thread, running)
    assert ended is not None
    return thread, ended.error or ended.value


async def place() -> tuple[int, int, str]:
    return (
        threading.get_ident(),
        id(asyncio.get_running_loop()),
        threading.current_thread().name,
    )


async def test_the_next_episode_gets_the_same_thread_and_loop(threads: LoopThreads) -> None:
    _, first = await use(threads, place, "episode a")
    _, second = await use(threads, place, "episode b")
    assert first[:2] == second[:2]
    assert (first[2], second[2]) == ("episode a", "episode b")


async def test_two_at_once_have_a_thread_each(threads: LoopThreads) -> None:
    met = threading.Barrier(2, timeout=LIMIT)

    async def meet() -> int:
        met.wait()
        return threading.get_ident()

    (_, one), (_, other) = await asyncio.gather(use(threads, meet), use(threads, meet))
    assert one != other


async def test_one_that_raised_has_left_nothing(threads: LoopThreads) -> None:
    async def fail() -> None:
        raise SystemExit(3)

    thread, error = await use(threads, fail)
    assert isinstance(error, SystemExit)
    assert threads.take("next") is thread
    thread.close()


async def task_cancelled_at_the_end() -> None:
    task = asyncio.create_task(asyncio.sleep(LIMIT))
    await asyncio.sleep(0)
    task.cancel()


async def test_what_ends_at_once_is_not_left(threads: LoopThreads) -> None:
    thread, _ = await use(threads, task_cancelled_at_the_end)
    assert threads.take("next") is thread
    thread.close()


async def running_task() -> None:
    KEPT.append(asyncio.create_task(asyncio.sleep(LIMIT)))


async def open_connection() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    KEPT.append(server)


async def factory_of_its_own() -> None:
    asyncio.get_running_loop().set_task_factory(None)


@pytest.mark.parametrize("leave", [running_task, open_connection, factory_of_its_own])
async def test_a_thread_on_which_something_is_left_ends(
    threads: LoopThreads, leave: Callable[[], Awaitable[object]]
) -> None:
    thread, _ = await use(threads, leave)
    await until(lambda: not thread.alive)
    other, _ = await use(threads, place)
    assert other is not thread


async def test_idle_threads_end_with_their_owner() -> None:
    threads = LoopThreads()
    thread, _ = await use(threads, place)
    assert thread.alive
    threads.close()
    await until(lambda: not thread.alive)


async def test_threads_of_to_thread_are_used_again(threads: LoopThreads) -> None:
    async def ask() -> int:
        return await asyncio.to_thread(threading.get_ident)

    used: list[int] = []
    for _ in range(20):  # now and then it is not back yet
        used.append((await use(threads, ask))[1])
    assert len(set(used)) < len(used)


async def test_work_in_to_thread_does_not_wait_for_other_work(threads: LoopThreads) -> None:
    met = threading.Barrier(3, timeout=LIMIT)

    async def meet() -> None:
        await asyncio.gather(*(asyncio.to_thread(met.wait) for _ in range(3)))

    _, result = await use(threads, meet)
    assert result is None
