"""Environments in this process: Gymnasium's rules, deadlines, and what trouble becomes."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from astuner.env.local import LocalEnvs
from astuner.env.protocol import Asked, EnvMaker
from astuner.env.registry import adapted
from astuner.errors import EnvError

from . import worlds
from .worlds import LIMIT, Counting

pytestmark = pytest.mark.timeout(60)


def envs(**limits: float) -> LocalEnvs:
    return LocalEnvs(lambda name: adapted(getattr(worlds, name), name), **limits)


async def fails(cause: str, work: Any) -> EnvError:
    with pytest.raises(EnvError) as caught:
        await work
    assert caught.value.cause == cause
    return caught.value


async def closed() -> None:
    async with asyncio.timeout(LIMIT):
        while Counting.open_now:
            await asyncio.sleep(0.01)


async def test_an_episode() -> None:
    local = envs()
    start = await local.create("Counting", "t1", "i1", {"goal": 2, "seed": 7})
    assert (start.observation, start.info) == ("t1: at 0 of 2, seed 7", {"goal": 2})
    first = await local.step("i1", "up")
    assert (first.observation, first.reward, first.done) == ("at 1", 0.0, False)
    last = await local.step("i1", "up")
    assert (last.reward, last.terminated, last.truncated) == (1.0, True, False)
    assert await local.evaluate("i1", {}) == 1.0
    await fails("misuse", local.step("i1", "up"))
    assert (await local.reset("i1", 8)).observation == "t1: at 0 of 2, seed 8"
    assert await local.evaluate("i1", {}) == 0.0
    await local.release("i1")
    await local.release("i1")
    await fails("gone", local.step("i1", "up"))
    assert local.instances == {}
    await closed()


async def test_its_own_score_and_task_list() -> None:
    local = envs()
    await local.create("Scored", "t", "i", {"goal": 4})
    await local.step("i", "up")
    assert await local.evaluate("i") == 0.25
    assert await local.task_ids("Scored", "val") == ["val-0", "val-1", "val-2"]
    assert await local.info("i") is None
    await local.aclose()
    await closed()


async def test_what_its_code_raises_is_an_episodes_failure() -> None:
    local = envs()
    await local.create("Broken", "t", "i", {})
    await local.step("i", "up")
    error = await fails("crashed", local.step("i", "up"))
    assert str(error) == "The environment's step raised ZeroDivisionError: the floor gave way"
    assert "worlds.py" in error.traceback
    assert error.retriable
    error = await fails("crashed", local.create("NeverMade", "t", "i2", {}))
    assert str(error) == "The environment's create raised OSError: no display"
    assert list(local.instances) == ["i"], "what could not be made holds nothing"
    await local.aclose()


@pytest.mark.parametrize(
    ("reply", "cause", "told"),
    [
        ("('x', 1.0, True, {})", "crashed", "step() must return (observation, reward, terminated"),
        ("('x', float('nan'), True, False, {})", "reply", "reward is nan, no finite number"),
        ("('x', 'much', True, False, {})", "reply", "reward is 'much', no finite number"),
        ("None", "crashed", "but gave None"),
        ("({'cell': 3}, 1.0, True, False, {})", "reply", "observation is {'cell': 3}; it must be"),
        ("(['up'], 1.0, True, False, {})", "reply", "observation is ['up']; it must be text"),
    ],
)
async def test_odd_replies(reply: str, cause: str, told: str) -> None:
    local = envs()
    await local.create("Odd", "t", "i", {"reply": reply})
    assert told in str(await fails(cause, local.step("i", "up")))
    await local.aclose()


async def test_no_thread_left_is_an_episodes_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    local = envs()
    monkeypatch.setattr(threading.Thread, "start", full)
    error = await fails("unavailable", local.create("Counting", "t", "i", {}))
    assert "can't start new thread" in str(error)
    assert local.instances == {}


async def test_one_that_does_not_answer_is_given_up_and_stops_nobody() -> None:
    local = envs(step_timeout=1.0)
    worlds.Silent.answer = threading.Event()
    await local.create("Silent", "t", "stuck", {})
    await local.create("Counting", "t", "free", {})
    error = await fails("timeout", local.step("stuck", "up"))
    assert str(error) == "The environment's step took longer than 1 s."
    assert (await local.step("free", "up")).observation == "at 1"
    await local.aclose()
    worlds.Silent.answer.set()  # its thread ends, and closes it, as soon as it can
    await closed()


async def test_a_late_instance_is_closed_too() -> None:
    local = envs(create_timeout=0.02)
    await fails("timeout", local.create("SlowToMake", "t", "i", {"sleep": 0.2}))
    assert local.instances == {}
    await asyncio.sleep(0.25)
    await closed()


async def test_a_cancelled_create_leaves_nothing() -> None:
    local = envs()
    making = asyncio.create_task(local.create("SlowToMake", "t", "i", {"sleep": 0.2}))
    await asyncio.sleep(0.05)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert local.instances == {}
    await asyncio.sleep(0.2)
    await closed()


async def test_a_class_of_an_env_service() -> None:
    local = envs()
    start = await local.create("Served", "a", "i", {"seed": 1})
    assert start.observation == [
        {"role": "system", "content": "You are in a room."},
        {"role": "user", "content": "Task a."},
    ]
    assert (await local.step("i", "look")).observation == "1: look"
    last = await local.step("i", {"role": "assistant", "content": [{"text": "go"}]})
    assert (last.observation, last.terminated, last.truncated) == ("2: go", True, False)
    assert await local.evaluate("i") == 1.0
    assert await local.info("i") == "one tool, {'seed': 1}"
    assert await local.task_ids("Served", "train") == ["train_a", "train_b"]
    await local.reset("i", None)
    assert (await local.step("i", "again")).observation == "1: again"
    await local.aclose()


async def test_a_step_that_takes_parameters_gets_them_also_where_there_are_none() -> None:
    local = envs()
    await local.create("Attentive", "t", "i", {"goal": 3})
    assert (await local.step("i", "up")).info == {"said": "up", "params": {}}
    named = await local.step("i", "up", Asked({"loud": True}))
    assert (named.observation, named.info["params"]) == ("at 2", {"loud": True})
    await local.aclose()


async def test_what_is_said_goes_to_parameters_by_position_alone() -> None:
    local, asked = envs(), Asked({"weight": 3.0}, {"content": "hm"})
    for name in ("Attentive", "OnlyNamed"):
        await local.create(name, "t", name, {"goal": 3})
        await local.step(name, "up", asked)
    assert await local.evaluate("Attentive", asked) == 1.0
    everything = ({"weight": 3.0}, {"content": "hm"})
    assert await local.info("Attentive", asked) == {"given": everything, "loud": False}
    assert await local.evaluate("OnlyNamed", asked) == 0.5
    first = {"what": {"weight": 3.0}, "loud": False, "named": {}}
    assert await local.info("OnlyNamed", asked) == first
    await local.aclose()


async def test_a_world_that_runs_out_is_told_at_once() -> None:
    local = envs(step_timeout=LIMIT)
    await local.create("RunsOut", "t", "i", {})
    error = await fails("crashed", asyncio.wait_for(local.step("i", "up"), LIMIT / 2))
    assert "StopIteration" in str(error)
    await local.aclose()


async def test_a_maker_is_looked_for_once_and_not_in_the_loop() -> None:
    looked: list[int] = []

    def find(name: str) -> EnvMaker:
        looked.append(threading.get_ident())
        return adapted(getattr(worlds, name), name)

    local = LocalEnvs(find)
    await asyncio.gather(*(local.create("Counting", "t", f"i{i}", {}) for i in range(20)))
    assert len(looked) == 1
    assert looked[0] != threading.get_ident()
    assert await local.task_ids("Counting", "dev") == ["dev-0", "dev-1", "dev-2"]
    assert len(looked) == 1
    await local.aclose()
