"""The pool: every instance comes back, whatever becomes of its episode."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from astuner.env.local import LocalEnvs
from astuner.env.pool import EnvPool, PoolSettings, seed_of
from astuner.env.session import GymEnv
from astuner.errors import EnvError
from astuner.types import Task

from . import worlds
from .worlds import LIMIT, Counting

pytestmark = pytest.mark.timeout(60)
TASK = Task(task_id="t1")


@asynccontextmanager
async def pool(name: str, **settings: Any) -> AsyncGenerator[EnvPool]:
    client = LocalEnvs(lambda name: getattr(worlds, name), step_timeout=LIMIT)
    made = EnvPool(client, PoolSettings(env_type=name, **settings))
    try:
        yield made
    finally:
        made.close()
        await until(lambda: not Counting.open_now)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not true():
            await asyncio.sleep(0.01)


async def test_gymnasiums_api() -> None:
    async with pool("Counting", params={"goal": 2, "seed": 5}) as envs:
        env = await envs.open(TASK, "e1")
        assert env.initial_text == "t1: at 0 of 2, seed 5"
        assert env.initial_messages == [{"role": "user", "content": "t1: at 0 of 2, seed 5"}]
        with pytest.raises(EnvError, match="reset"):
            await env.step("up")
        assert await env.reset() == ("t1: at 0 of 2, seed 5", {"goal": 2})
        assert await env.step("up") == ("at 1", 0.0, False, False, {"said": "up"})
        assert await env.step("up") == ("at 2", 1.0, True, False, {"said": "up"})
        with pytest.raises(EnvError, match="has ended"):
            await env.step("up")
        assert await env.evaluate() == 1.0
        assert (await env.reset(seed=9))[0] == "t1: at 0 of 2, seed 9"
        assert env.trouble is None, "misuse is the workflow's"
        envs.release(env)
        await until(lambda: envs.in_use == 0)
        with pytest.raises(EnvError, match="closed"):
            await env.step("up")
        assert envs.counters["env/steps"] == 2


async def test_the_same_without_await_from_another_thread_and_loop() -> None:
    async with pool("Counting") as envs:
        env = await envs.open(TASK, "e1")
        seen: list[Any] = []

        async def other_loop() -> None:
            seen.append(env.sync.reset()[0])
            seen.append(env.sync.step("up")[0])
            seen.append((await env.step("up"))[:3])
            seen.append(env.sync.evaluate())

        thread = threading.Thread(target=lambda: asyncio.run(other_loop()))
        thread.start()
        await asyncio.to_thread(thread.join, LIMIT)
        assert seen[1:] == ["at 1", ("at 2", 1.0, True), 1.0]
        envs.release(env)


async def test_episodes_of_a_task_start_alike_and_tasks_differ() -> None:
    async with pool("Counting", seed=3) as envs:
        opened = [await envs.open(Task(task_id=name), "e") for name in ("a", "a", "b")]
        shown = [env.initial_text.rpartition(" ")[2] for env in opened]
        assert shown == [str(seed_of(3, name)) for name in ("a", "a", "b")]
        assert shown[0] != shown[2]
        assert 0 <= seed_of(3, "a") < 2**31


async def test_a_tasks_own_environment_and_parameters_win() -> None:
    own = Task(task_id="x", env_type="Scored", metadata={"env_params": {"goal": 9}})
    async with pool("Counting", params={"goal": 1}) as envs:
        env = await envs.open(own, "e")
        assert (await env.reset())[1] == {"goal": 9}
        await env.step("up")
        assert await env.evaluate() == 0.25


async def test_never_more_than_the_limit_and_whoever_waits_gets_one() -> None:
    async with pool("Counting", max_instances=3) as envs:
        most = 0

        async def episode(number: int) -> None:
            nonlocal most
            env = await envs.open(TASK, f"e{number}")
            most = max(most, len(Counting.open_now))
            await env.reset()
            await env.step("up")
            envs.release(env)

        await asyncio.wait_for(asyncio.gather(*(episode(i) for i in range(30))), LIMIT)
        assert most <= 3
        await until(lambda: envs.in_use == 0)


@pytest.mark.parametrize("when", [0.0, 0.001, 0.02, 0.1, 0.25])
async def test_a_cancelled_episode_gives_everything_back(when: float) -> None:
    async with pool("SlowToMake", max_instances=1, params={"sleep": 0.1}) as envs:
        opening = asyncio.create_task(envs.open(TASK, "e1"))
        waiting = asyncio.create_task(envs.open(TASK, "e2"))
        await asyncio.sleep(when)
        opening.cancel()
        waiting.cancel()
        for env in await asyncio.gather(opening, waiting, return_exceptions=True):
            if isinstance(env, GymEnv):
                envs.release(env)
        await until(lambda: envs.in_use == 0)
        free = await asyncio.wait_for(envs.open(TASK, "e3"), LIMIT)  # the slot is free again
        envs.release(free)


async def test_what_cannot_be_made_holds_no_slot_and_is_counted() -> None:
    async with pool("NeverMade", max_instances=1) as envs:
        for _ in range(3):
            with pytest.raises(EnvError, match="no display"):
                await asyncio.wait_for(envs.open(TASK, "e"), LIMIT)
        assert envs.counters == {"env/failed/crashed": 3}


async def test_a_failure_is_kept_and_counted_though_the_workflow_swallows_it() -> None:
    async with pool("Broken") as envs:
        env = await envs.open(TASK, "e")
        await env.reset()
        await env.step("up")
        with pytest.raises(EnvError):
            await env.step("up")
        assert env.trouble is not None
        assert env.trouble.cause == "crashed"
        envs.release(env)
        assert envs.counters["env/failed/crashed"] == 1


async def test_closing_the_pool_releases_what_is_left() -> None:
    async with pool("Counting") as envs:
        for i in range(5):
            await envs.open(TASK, f"e{i}")
        assert len(Counting.open_now) == 5


async def test_hundreds_at_once() -> None:
    async with pool("Counting", max_instances=300) as envs:
        opened = await asyncio.wait_for(
            asyncio.gather(*(envs.open(Task(task_id=f"t{i}"), f"e{i}") for i in range(300))), 50
        )
        assert len(Counting.open_now) == 300
        for env in opened:
            await env.reset()
        steps = await asyncio.wait_for(asyncio.gather(*(e.step("up") for e in opened)), 50)
        assert {step[0] for step in steps} == {"at 1"}
        for env in opened:
            envs.release(env)
        await until(lambda: envs.in_use == 0)
        assert envs.counters["env/steps"] == 300


async def test_two_agents_in_one_world_act_one_after_the_other() -> None:
    async with pool("Counting", params={"goal": 1}) as envs:
        env = await envs.open(TASK, "e")
        await env.reset()
        acted = await asyncio.gather(env.step("up"), env.step("up"), return_exceptions=True)
        assert acted[0] == ("at 1", 1.0, True, False, {"said": "up"})
        assert isinstance(acted[1], EnvError)
        assert "has ended" in str(acted[1])
        assert env.trouble is None
        envs.release(env)


class LosesReleases(LocalEnvs):
    """The first answers to a release are lost."""

    lost = 1

    async def release(self, instance_id: str) -> None:
        if self.lost > 0:
            self.lost -= 1
            raise EnvError("no answer", cause="unavailable")
        await super().release(instance_id)


@pytest.mark.parametrize(("lost", "left"), [(0, 0), (1, 0), (2, 1)])
async def test_a_lost_release_is_tried_once_more(lost: int, left: int) -> None:
    client = LosesReleases(lambda name: getattr(worlds, name))
    client.lost = lost
    settings = PoolSettings(env_type="Counting", max_instances=1, release_pause=0.01)
    envs = EnvPool(client, settings)
    envs.release(await envs.open(TASK, "e"))
    second = await asyncio.wait_for(envs.open(TASK, "e2"), LIMIT)
    assert second is not None, "the slot is free in any case"
    assert len(client.instances) == 1 + left
    assert envs.counters["env/release_failed"] == lost
    envs.close()
    await until(lambda: not Counting.open_now)
