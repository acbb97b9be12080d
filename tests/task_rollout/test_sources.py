"""Synchronous and asynchronous sources: order, gate, staleness, refill, resume, closing."""

from __future__ import annotations

import asyncio

import pytest

from astuner.errors import UserCodeError
from astuner.task_rollout import AsyncSource, Rollout, SyncSource, make_source
from astuner.types import Group, Task

from .fakes import BUG, FakeRunner, settings, settle, tasks

ALL = tasks(100)
LIMIT = 5.0


def tasks_for(step: int) -> list[Task]:
    """Two tasks a step; far steps wrap around."""
    return [ALL[(2 * step + i) % 100] for i in range(2)]


def make(runner: FakeRunner, staleness: int, **changes: int) -> AsyncSource:
    rollout = Rollout(runner, settings(num_repeat=1), lambda: runner.version)
    return AsyncSource(rollout, tasks_for, batch_size=2, max_staleness=staleness, **changes)


def ids(groups: list[Group]) -> list[str]:
    return [group.group_id for group in groups]


async def publish(source: AsyncSource, runner: FakeRunner) -> None:
    runner.version += 1
    await source.on_publish(runner.version)
    await settle()


# ---------------------------------------------------------------- synchronous


async def test_sync_runs_exactly_the_steps_tasks_in_order() -> None:
    runner = FakeRunner()
    source = SyncSource(Rollout(runner, settings(num_repeat=1)), tasks_for)
    groups = await source.next_groups(3)
    assert ids(groups) == ["s00003-t000", "s00003-t001"]
    assert [g.task.task_id for g in groups] == ["q6", "q7"]
    await settle()
    assert runner.started == ["s00003-t000-e00", "s00003-t001-e00"]


async def test_sync_refills_with_other_tasks_the_same_ones_each_time() -> None:
    source = SyncSource(Rollout(FakeRunner(), settings(num_repeat=1)), tasks_for)
    await source.next_groups(3)
    first = await source.refill(3, 1, 3)
    assert ids(first) == ["s00003-t1000", "s00003-t1001", "s00003-t1002"]
    assert ids(await source.refill(3, 2, 1)) == ["s00003-t2000"]
    again = await source.refill(3, 1, 3)
    assert [g.task.task_id for g in first] == [g.task.task_id for g in again]


def test_staleness_zero_makes_a_synchronous_source() -> None:
    rollout = Rollout(FakeRunner(), settings())
    assert isinstance(make_source(rollout, tasks_for, batch_size=2, max_staleness=0), SyncSource)
    assert isinstance(make_source(rollout, tasks_for, batch_size=2, max_staleness=1), AsyncSource)


async def test_async_without_staleness_does_what_sync_does() -> None:
    sync_runner, async_runner = FakeRunner(), FakeRunner()
    sync = SyncSource(
        Rollout(sync_runner, settings(num_repeat=1), lambda: sync_runner.version), tasks_for
    )
    other = make(async_runner, staleness=0, total_steps=3)
    for step in (1, 2, 3):
        assert ids(await sync.next_groups(step)) == ids(await other.next_groups(step))
        await settle()
        assert async_runner.log == sync_runner.log  # nothing was started ahead
        sync_runner.version += 1
        await publish(other, async_runner)
    assert len(sync_runner.log) == 6


# ---------------------------------------------------------------- asynchronous


async def test_runs_ahead_as_far_as_the_gate_admits() -> None:
    runner = FakeRunner()
    source = make(runner, staleness=1)
    assert ids(await source.next_groups(1)) == ["s00001-t000", "s00001-t001"]
    await settle()
    assert len(runner.log) == 4  # 2 * (1 + 1): while the first batch is trained, one more
    await settle()
    assert len(runner.log) == 4
    await publish(source, runner)
    assert len(runner.log) == 6
    assert ids(await source.next_groups(2)) == ["s00002-t000", "s00002-t001"]
    assert source.counters() == {"rollout/groups_in_flight": 0, "rollout/groups_queued": 2}


async def test_a_step_that_publishes_nothing_does_not_block_the_next() -> None:
    source = make(FakeRunner(), staleness=0)
    for step in (1, 2, 3):
        groups = await asyncio.wait_for(source.next_groups(step), LIMIT)
        assert ids(groups) == [f"s{step:05d}-t000", f"s{step:05d}-t001"]


async def test_a_slow_group_is_overtaken_then_dropped_and_run_again() -> None:
    gate = asyncio.Event()
    runner = FakeRunner(gates={"q2": gate})  # the first task of step 1
    source = make(runner, staleness=1)
    assert ids(await source.next_groups(1)) == ["s00001-t001", "s00002-t000"]
    await publish(source, runner)
    assert ids(await source.next_groups(2)) == ["s00002-t001", "s00003-t000"]
    await publish(source, runner)
    gate.set()  # it ends with tokens of version 0, when the trainer is at 2
    await settle()
    third = await asyncio.wait_for(source.next_groups(3), LIMIT)
    assert "s00001-t000" not in ids(third)
    counted = source.counters()
    assert counted["rollout/groups_too_stale"] == 1
    assert counted["tokens_masked/too_stale"] == 3
    await publish(source, runner)
    fourth = await asyncio.wait_for(source.next_groups(4), LIMIT)
    assert "s00001-t000-again1" in ids(third) + ids(fourth)
    assert "rollout/groups_too_stale" not in source.counters()


async def test_nothing_handed_out_is_staler_than_allowed() -> None:
    runner = FakeRunner()
    source = make(runner, staleness=2)
    for step in range(1, 12):
        groups = await asyncio.wait_for(source.next_groups(step), LIMIT)
        assert all(runner.version - g.oldest_version <= 2 for g in groups)
        await settle()
        await publish(source, runner)
    assert max(runner.version - g.oldest_version for g in groups) >= 2  # it did run ahead


async def test_refill_takes_the_next_of_the_stream_also_when_synchronous() -> None:
    source = make(FakeRunner(), staleness=0)
    await source.next_groups(1)
    more = await asyncio.wait_for(source.refill(1, 1, 3), LIMIT)
    assert ids(more) == ["s00002-t000", "s00002-t001", "s00003-t000"]


async def test_starts_nothing_beyond_the_last_step() -> None:
    runner = FakeRunner()
    source = make(runner, staleness=3, total_steps=2)
    await source.next_groups(1)
    await settle()
    assert len(runner.log) == 4
    await publish(source, runner)
    await source.next_groups(2)
    await settle()
    assert len(runner.log) == 4
    more = await asyncio.wait_for(source.refill(2, 1, 1), LIMIT)  # unless it is asked for
    assert ids(more) == ["s00003-t000"]


async def test_a_broken_workflow_is_raised_where_the_trainer_waits() -> None:
    runner = FakeRunner(lambda task, attempt: BUG)
    rollout = Rollout(runner, settings(num_repeat=1, fail_fast_groups=2))
    source = AsyncSource(rollout, tasks_for, batch_size=4, max_staleness=1)
    with pytest.raises(UserCodeError, match="KeyError"):
        await asyncio.wait_for(source.next_groups(1), LIMIT)


async def test_an_unexpected_error_is_raised_too_instead_of_waiting_for_ever() -> None:
    def broken(task: object, attempt: int) -> None:
        raise ZeroDivisionError

    source = make(FakeRunner(broken), staleness=1)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(source.next_groups(1), LIMIT)


async def test_state_says_what_was_not_handed_out() -> None:
    runner = FakeRunner()
    source = make(runner, staleness=1)
    await source.next_groups(1)
    await settle()
    state = source.state()
    assert state == {"cursor": [3, 0], "again": [[2, 0, 0], [2, 1, 0]]}

    resumed = make(FakeRunner(), staleness=1)
    resumed.restore(state)
    assert ids(await resumed.next_groups(2)) == ["s00002-t000", "s00002-t001"]
    assert ids(await resumed.next_groups(3)) == ["s00003-t000", "s00003-t001"]


async def test_an_abandoned_step_can_be_asked_for_again() -> None:
    gate = asyncio.Event()
    runner = FakeRunner(gates={"q2": gate, "q3": gate, "q4": gate, "q5": gate})
    source = make(runner, staleness=1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(source.next_groups(1), 0.05)
    gate.set()
    assert ids(await asyncio.wait_for(source.next_groups(1), LIMIT)) == [
        "s00001-t000",
        "s00001-t001",
    ]
    assert runner.cancelled == 0


async def test_closing_cancels_what_is_in_flight() -> None:
    runner = FakeRunner(gates={f"q{i}": asyncio.Event() for i in range(4, 8)})
    source = make(runner, staleness=1)
    await source.next_groups(1)
    await settle()
    assert runner.active == 2
    await asyncio.wait_for(source.aclose(), LIMIT)
    assert (runner.active, runner.cancelled, source.pending) == (0, 2, 0)
