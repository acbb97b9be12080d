"""Groups, validation, retries, limits, fail-fast and cancellation, on a scripted runner."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from astuner.errors import EngineError, UserCodeError
from astuner.task_rollout import Place, Rollout
from astuner.types import Episode, FailureKind, WorkflowTask

from .fakes import BUG, ENGINE_DOWN, FakeRunner, settings, settle, tasks


async def test_a_group_has_num_repeat_episodes_with_their_own_seeds() -> None:
    runner = FakeRunner(version=4)
    rollout = Rollout(runner, settings(num_repeat=3), lambda: 4)
    group = await rollout.group(tasks(1)[0], Place(2, 0))
    assert [e.episode_id for e in group.episodes] == [
        "s00002-t000-e00",
        "s00002-t000-e01",
        "s00002-t000-e02",
    ]
    assert [e.repeat_index for e in group.episodes] == [0, 1, 2]
    assert len({seed for _, seed, _ in runner.log}) == 3
    assert [sampling for _, _, sampling in runner.log] == ["train"] * 3
    assert (group.group_id, group.born_version, group.oldest_version) == ("s00002-t000", 4, 4)


async def test_the_same_place_gives_the_same_seeds() -> None:
    logs = []
    for _ in range(2):
        runner = FakeRunner()
        await Rollout(runner, settings(seed=9)).group(tasks(1)[0], Place(5, 1))
        logs.append(runner.log)
    assert logs[0] == logs[1]


async def test_episodes_of_a_group_cannot_change_each_others_task() -> None:
    seen: list[int] = []

    def outcome(task: WorkflowTask, attempt: int) -> None:
        task.task.metadata["notes"].append("mine")
        seen.append(len(task.task.metadata["notes"]))

    task = tasks(1)[0].model_copy(update={"metadata": {"notes": []}})
    group = await Rollout(FakeRunner(outcome), settings(num_repeat=3)).group(task, Place(1, 0))
    assert seen == [1, 1, 1]
    assert task.metadata == {"notes": []}
    assert group.episodes[0].task is task


async def test_validation_runs_each_task_with_its_own_settings_in_order() -> None:
    runner = FakeRunner()
    rollout = Rollout(runner, settings(val_num_repeat=2, val_max_tasks=2))
    episodes = await rollout.evaluate(tasks(5), step=20)
    assert [e.episode_id for e in episodes] == [
        "v00020-t000-e00",
        "v00020-t000-e01",
        "v00020-t001-e00",
        "v00020-t001-e01",
    ]
    assert {e.split for e in episodes} == {"validation"}
    assert {sampling for _, _, sampling in runner.log} == {"val"}


async def test_validations_of_a_run_draw_with_the_same_seeds() -> None:
    runner = FakeRunner()
    rollout = Rollout(runner, settings())
    await rollout.evaluate(tasks(2), step=0)
    await rollout.evaluate(tasks(2), step=20)
    seeds = [seed for _, seed, _ in runner.log]
    assert seeds[:2] == seeds[2:]
    assert seeds[0] != seeds[1]


async def test_no_more_episodes_at_once_than_workers() -> None:
    runner = FakeRunner()
    rollout = Rollout(runner, settings(num_repeat=4, max_env_worker=3))
    await asyncio.gather(*(rollout.group(t, Place(1, i)) for i, t in enumerate(tasks(3))))
    assert runner.peak == 3
    assert len(runner.log) == 12


async def test_infrastructure_failures_are_tried_again() -> None:
    runner = FakeRunner(lambda task, attempt: ENGINE_DOWN if attempt < 2 else None)
    rollout = Rollout(runner, settings(num_repeat=1, max_retries=2))
    group = await rollout.group(tasks(1)[0], Place(1, 0))
    assert [(e.ok, e.attempts) for e in group.episodes] == [(True, 3)]
    assert rollout.take_counters() == {"tokens_masked/retried": 6}  # two attempts of 3 tokens
    assert rollout.take_counters() == {}
    assert len({seed for _, seed, _ in runner.log}) == 1  # a retry draws the same again


async def test_retries_end() -> None:
    runner = FakeRunner(lambda task, attempt: ENGINE_DOWN)
    rollout = Rollout(runner, settings(num_repeat=1, max_retries=2))
    group = await rollout.group(tasks(1)[0], Place(1, 0))
    assert group.episodes[0].attempts == 3
    assert group.episodes[0].failure == ENGINE_DOWN
    assert group.usable == ()


async def test_a_workflows_own_bug_is_not_tried_again() -> None:
    runner = FakeRunner(lambda task, attempt: BUG)
    group = await Rollout(runner, settings()).group(tasks(1)[0], Place(1, 0))
    assert len(runner.log) == 2
    assert [e.attempts for e in group.episodes] == [1, 1]


async def test_a_run_in_which_nothing_works_stops_with_one_traceback() -> None:
    runner = FakeRunner(lambda task, attempt: BUG)
    rollout = Rollout(runner, settings(fail_fast_groups=3))
    with pytest.raises(UserCodeError) as caught:
        for index, task in enumerate(tasks(10)):
            await rollout.group(task, Place(1, index))
    assert len(runner.log) == 6  # three groups of two
    message = str(caught.value)
    assert "All 6 episodes of 3 tasks in a row failed (6 x workflow)" in message
    assert message.count('File "a.py", line 3') == 1


async def test_a_dead_engine_stops_the_run_as_an_engine_error() -> None:
    rollout = Rollout(
        FakeRunner(lambda task, attempt: ENGINE_DOWN), settings(fail_fast_groups=1, max_retries=0)
    )
    with pytest.raises(EngineError, match="2 x engine"):
        await rollout.group(tasks(1)[0], Place(1, 0))


async def test_one_good_episode_keeps_a_run_going() -> None:
    def outcome(task: WorkflowTask, attempt: int) -> Any:
        return None if task.task_id == "q2" and task.repeat_index == 0 else BUG

    rollout = Rollout(FakeRunner(outcome), settings(fail_fast_groups=3))
    done = [await rollout.group(t, Place(1, i)) for i, t in enumerate(tasks(14))]
    assert len(done) == 14  # after something worked, 4 x 3 in a row are needed
    with pytest.raises(UserCodeError, match="12 tasks in a row"):
        await rollout.group(tasks(1)[0], Place(2, 0))


async def test_a_validation_of_a_broken_workflow_stops_early() -> None:
    runner = FakeRunner(lambda task, attempt: BUG)
    rollout = Rollout(runner, settings(fail_fast_groups=4, max_env_worker=2))
    with pytest.raises(UserCodeError):
        await rollout.evaluate(tasks(500))
    assert len(runner.log) < 12
    await settle()
    assert runner.active == 0


async def test_cancelling_a_group_cancels_its_episodes() -> None:
    runner = FakeRunner(gates={"q0": asyncio.Event()})
    group = asyncio.create_task(Rollout(runner, settings()).group(tasks(1)[0], Place(1, 0)))
    await settle()
    group.cancel()
    with pytest.raises(asyncio.CancelledError):
        await group
    assert (runner.cancelled, runner.active) == (2, 0)


async def test_every_ended_episode_is_told() -> None:
    told: list[Episode] = []
    runner = FakeRunner(lambda task, attempt: BUG if task.repeat_index else None)
    await Rollout(runner, settings(), on_episode=told.append).group(tasks(1)[0], Place(1, 0))
    assert [e.failure and e.failure.kind for e in told] == [None, FailureKind.WORKFLOW]


async def test_threads_left_behind_are_counted() -> None:
    rollout = Rollout(FakeRunner(threads_left_behind=2), settings())
    assert rollout.take_counters() == {"rollout/threads_left_behind": 2}


async def test_what_happened_in_sessions_is_counted_once() -> None:
    rollout = Rollout(FakeRunner(counters=Counter(overridden_sampling=3)), settings())
    assert rollout.take_counters() == {"proxy/overridden_sampling": 3}
    assert rollout.take_counters() == {}
