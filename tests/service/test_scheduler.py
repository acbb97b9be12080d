"""Turns: tenants first, then their lanes; and workers that never do more than they may."""

from __future__ import annotations

import asyncio

from astuner.service.scheduler import FairQueue, Work, Workers


def work(tenant: str, lane: str, name: str = "", log: list[str] | None = None) -> Work:
    seen = log if log is not None else []

    async def run() -> None:
        await asyncio.sleep(0)
        seen.append(name)

    return Work(tenant, lane, run, lambda: seen.append(f"dropped {name}"))


def order(queue: FairQueue) -> list[str]:
    found = []
    while (item := queue.pop()) is not None:
        found.append(f"{item.tenant}{item.lane}")
    return found


def test_many_requests_buy_no_larger_share() -> None:
    queue = FairQueue()
    for _ in range(4):
        queue.push(work("a", "1"))
    queue.push(work("b", "1"))
    queue.push(work("b", "1"))
    assert order(queue) == ["a1", "b1", "a1", "b1", "a1", "a1"]


def test_many_runs_buy_no_larger_share() -> None:
    queue = FairQueue()
    for lane in "123":
        queue.push(work("a", lane))
        queue.push(work("a", lane))
    queue.push(work("b", "1"))
    queue.push(work("b", "1"))
    assert order(queue) == ["a1", "b1", "a2", "b1", "a3", "a1", "a2", "a3"]


def test_lengths_are_counted_for_each_tenant() -> None:
    queue = FairQueue()
    queue.push(work("a", "1"))
    queue.push(work("a", "2"))
    queue.push(work("b", "1"))
    assert (len(queue), queue.length("a"), queue.length("b"), queue.length("c")) == (3, 2, 1, 0)
    assert [w.lane for w in queue.close_lane("a", "2")] == ["2"]
    assert queue.lengths() == {"a": 1, "b": 1}


async def test_no_more_than_the_slots_at_a_time() -> None:
    workers, peak = Workers(slots=2), 0

    async def run() -> None:
        nonlocal peak
        peak = max(peak, workers.busy)
        await asyncio.sleep(0.001)

    over = asyncio.Event()
    for i in range(10):
        workers.submit(Work("a", str(i), run, lambda: None))

    async def last() -> None:
        over.set()

    workers.submit(Work("a", "last", last, lambda: None))
    await asyncio.wait_for(over.wait(), 5)
    assert peak == 2


async def test_closing_a_lane_drops_what_waits_and_cancels_what_runs() -> None:
    log: list[str] = []
    workers = Workers(slots=1)
    started = asyncio.Event()

    async def forever() -> None:
        started.set()
        await asyncio.sleep(60)

    workers.submit(Work("a", "1", forever, lambda: log.append("dropped forever")))
    workers.submit(work("a", "1", "second", log))
    workers.submit(work("b", "1", "other", log))
    await started.wait()
    workers.close_lane("a", "1")
    for _ in range(10):
        await asyncio.sleep(0)
    assert sorted(log) == ["dropped forever", "dropped second", "other"]


async def test_a_turn_holds_a_slot_until_it_is_over() -> None:
    log: list[str] = []
    workers = Workers(slots=1)
    async with workers.turn("a", "chat"):
        workers.submit(work("a", "1", "work", log))
        for _ in range(5):
            await asyncio.sleep(0)
        assert log == []
    for _ in range(10):
        await asyncio.sleep(0)
    assert log == ["work"]
    await workers.close()
