"""Threads for work that may block."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest

from astuner.task_runner import workers as workers_module
from astuner.task_runner.workers import Workers

from .fakes import LIMIT, until


class Payload:
    pass


def test_threads_serve_again() -> None:
    workers = Workers()
    used = [workers.submit(threading.current_thread).result(LIMIT) for _ in range(20)]
    assert len(set(used)) < 20  # now and then one is not back yet


def test_work_does_not_wait_for_other_work() -> None:
    workers, met = Workers(), threading.Barrier(3, timeout=LIMIT)
    together = [workers.submit(met.wait) for _ in range(3)]
    assert {future.result(LIMIT) for future in together} == {0, 1, 2}


async def test_a_thread_without_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "IDLE", 0.01)
    workers = Workers()
    first = workers.submit(threading.current_thread).result(LIMIT)
    await until(lambda: not first.is_alive())
    second = workers.submit(threading.current_thread).result(LIMIT)
    assert second is not first


async def test_what_a_thread_worked_for_is_let_go() -> None:
    workers, payload = Workers(), Payload()
    assert workers.submit(id, payload).result(LIMIT) == id(payload)
    dead = weakref.ref(payload)
    del payload

    def gone() -> bool:
        gc.collect()
        return dead() is None

    await until(gone)


async def test_work_that_exits_ends_its_thread() -> None:
    workers = Workers()
    seen: list[threading.Thread] = []

    def leave() -> None:
        seen.append(threading.current_thread())
        raise SystemExit

    workers.start(leave)
    await until(lambda: seen and not seen[0].is_alive())
    assert workers.submit(threading.current_thread).result(LIMIT) is not seen[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
async def test_a_forked_child_starts_threads_of_its_own() -> None:
    workers = Workers()
    first = workers.submit(threading.current_thread).result(LIMIT)
    await until(lambda: workers._idle)
    child = os.fork()
    if child == 0:
        done = workers.submit(os.getpid)
        try:
            os._exit(0 if done.result(LIMIT) == os.getpid() else 1)
        finally:  # it may not come back into the test suite
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert workers.submit(threading.current_thread).result(LIMIT) is first
