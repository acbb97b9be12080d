"""An episode with an environment: made before, given back after, its failures typed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import date
from typing import Any

import pytest

from astuner.env import EnvPool
from astuner.env.http import HttpEnvs
from astuner.env.local import LocalEnvs
from astuner.env.pool import PoolSettings
from astuner.task_runner import EpisodeRunner, RunnerSettings, Workflow
from astuner.types import Episode, FailureKind, Task, WorkflowOutput, WorkflowTask
from tests.env import worlds
from tests.env.worlds import LIMIT, Counting

from .fakes import FakeServer

pytestmark = pytest.mark.timeout(60)


class Player(Workflow):
    """Says "up" until the end; leaves the reward to the environment."""

    async def execute(self, workflow_task: WorkflowTask, tuner: Any) -> WorkflowOutput:
        env = workflow_task.gym_env
        shown, _ = await env.reset()
        done = False
        while not done:
            tuner.say("up")
            shown, _, terminated, truncated, _ = await env.step("up")
            done = terminated or truncated
        return WorkflowOutput(metadata={"last": shown, "query": workflow_task.main_query})


class BlockingPlayer(Workflow):
    def execute(self, workflow_task: WorkflowTask, tuner: Any) -> WorkflowOutput:
        env = workflow_task.gym_env.sync
        env.reset()
        env.step("up")
        return WorkflowOutput(reward=env.step("up")[1])


class Swallower(Workflow):
    async def execute(self, workflow_task: WorkflowTask, tuner: Any) -> WorkflowOutput:
        env = workflow_task.gym_env
        await env.reset()
        for _ in range(3):
            try:
                await env.step("up")
            except Exception:
                break
        return WorkflowOutput(reward=1.0)


class Closer(Workflow):
    """Frees the environment itself; returns the reward it was given, if any."""

    reward: float | None = None

    async def execute(self, workflow_task: WorkflowTask, tuner: Any) -> WorkflowOutput:
        env = workflow_task.gym_env
        await env.reset()
        await env.step("up")
        await env.close()
        await env.close()
        return WorkflowOutput(reward=self.reward)


class RewardedCloser(Closer):
    reward: float | None = 0.75


class Careless(Workflow):
    async def execute(self, workflow_task: WorkflowTask, tuner: Any) -> WorkflowOutput:
        await workflow_task.gym_env.step("up")
        raise AssertionError


class Sleeper(Workflow):
    async def execute(self, workflow_task: WorkflowTask, tuner: Any) -> WorkflowOutput:
        await asyncio.sleep(LIMIT)
        raise AssertionError


@asynccontextmanager
async def runner(
    workflow: type[Workflow], world: str, **limits: Any
) -> AsyncGenerator[EpisodeRunner]:
    patience = 1.0 if world == "Silent" else LIMIT
    envs = LocalEnvs(lambda name: getattr(worlds, name), step_timeout=patience)
    pool = EnvPool(envs, PoolSettings(env_type=world))
    settings = RunnerSettings(**({"episode_timeout": 10.0, "grace": 0.2} | limits))
    made = EpisodeRunner(workflow, None, FakeServer(), settings, pool)
    try:
        yield made
        async with asyncio.timeout(LIMIT):
            while pool.in_use:
                await asyncio.sleep(0.01)
    finally:
        made.close()
        pool.close()


async def play(made: EpisodeRunner, task: Task | None = None) -> Episode:
    inner = task or Task(task_id="q", main_query="Count.")
    outer = WorkflowTask(task=inner, task_id="q", episode_id="e")
    episode = await made.run(outer, group_id="g", seed=1, sampling=None)  # pyright: ignore
    assert outer.gym_env is None
    return episode


@pytest.mark.parametrize(("world", "reward"), [("Counting", 1.0), ("Scored", 0.5)])
async def test_the_environments_score_is_the_reward_nobody_else_gave(
    world: str, reward: float
) -> None:
    async with runner(Player, world) as made:
        episode = await play(made)
    assert (episode.failure, episode.reward) == (None, reward)
    assert episode.output is not None
    assert episode.output.metadata["last"] == "at 2"
    assert episode.output.metadata["query"] == "Count."
    assert made.counters["env/steps"] == 2
    assert not Counting.open_now


async def test_a_task_that_says_nothing_shows_the_first_observation() -> None:
    async with runner(Player, "Counting") as made:
        episode = await play(made, Task(task_id="q"))
    assert episode.output is not None
    assert episode.output.metadata["query"].startswith("q: at 0 of 2, seed ")


async def test_a_blocking_workflow() -> None:
    async with runner(BlockingPlayer, "Counting") as made:
        assert (await play(made)).reward == 1.0


@pytest.mark.parametrize(
    ("workflow", "world", "reward"),
    [(Closer, "Counting", 0.0), (Closer, "Scored", 0.25), (RewardedCloser, "Unscored", 0.75)],
)
async def test_a_workflow_that_closes_its_environment_keeps_the_score(
    workflow: type[Workflow], world: str, reward: float
) -> None:
    async with runner(workflow, world) as made:
        episode = await play(made)
    assert (episode.failure, episode.reward) == (None, reward)
    assert not Counting.open_now


async def test_a_score_that_closing_could_not_read_is_the_environments_failure() -> None:
    async with runner(Closer, "Unscored") as made:
        episode = await play(made)
    assert episode.failure is not None
    assert episode.failure.kind is FailureKind.ENVIRONMENT
    assert "the scales are broken" in episode.failure.message
    assert made.counters["env/failed/crashed"] == 1


@pytest.mark.parametrize("shown", [{}, None, 3, ["at 0"]])
async def test_a_first_observation_that_is_no_text_fails_its_episode_only(shown: Any) -> None:
    async with runner(Player, "OddStart") as made:
        episode = await play(made, Task(task_id="q", metadata={"env_params": {"shown": shown}}))
    assert episode.failure is not None
    assert episode.failure.kind is FailureKind.ENVIRONMENT
    assert f"first observation is {shown!r}; it must be text" in episode.failure.message
    assert made.counters["env/failed/reply"] == 1


@pytest.mark.parametrize("params", ["goal=2", [2]])
async def test_env_params_that_are_no_object_fail_their_episode_only(params: Any) -> None:
    async with runner(Player, "Counting") as made:
        episode = await play(made, Task(task_id="q", metadata={"env_params": params}))
    assert episode.failure is not None
    assert (episode.failure.kind, episode.failure.retriable) == (FailureKind.ENVIRONMENT, False)
    assert f"env_params are {params!r}; they must be an object" in episode.failure.message


@pytest.mark.parametrize(
    ("url", "params"),
    [
        ("http://127.0.0.1:9", {"since": date(2026, 1, 1)}),
        ("http://127.0.0.1:9", {"size": float("nan")}),
        ("http://127.0.0.1:999999", {}),
        ("http://127.0.0.1:port", {}),
    ],
)
async def test_what_no_service_could_be_sent_fails_its_episode_only(
    url: str, params: dict[str, Any]
) -> None:
    pool = EnvPool(HttpEnvs(url), PoolSettings(env_type="Counting"))
    made = EpisodeRunner(Player, None, FakeServer(), RunnerSettings(), pool)
    try:
        episode = await play(made, Task(task_id="q", metadata={"env_params": params}))
    finally:
        made.close()
        pool.close()
    assert episode.failure is not None
    assert (episode.failure.kind, episode.failure.retriable) == (FailureKind.ENVIRONMENT, False)
    assert "cannot be sent to the environment service" in episode.failure.message


@pytest.mark.parametrize(
    ("workflow", "world", "kind", "told", "retriable"),
    [
        (Player, "Broken", FailureKind.ENVIRONMENT, "ZeroDivisionError: the floor", True),
        (Swallower, "Broken", FailureKind.ENVIRONMENT, "returned all the same", True),
        (Player, "NeverMade", FailureKind.ENVIRONMENT, "could not be made", True),
        (Player, "Silent", FailureKind.ENVIRONMENT, "took longer than 1 s", True),
        (Careless, "Counting", FailureKind.WORKFLOW, "Call gym_env.reset() before", False),
    ],
)
async def test_trouble(
    workflow: type[Workflow], world: str, kind: FailureKind, told: str, retriable: bool
) -> None:
    worlds.Silent.answer.clear()
    async with runner(workflow, world) as made:
        episode = await play(made)
    worlds.Silent.answer.set()
    assert episode.failure is not None
    assert (episode.failure.kind, episode.failure.retriable) == (kind, retriable)
    assert told in episode.failure.message
    if kind is FailureKind.ENVIRONMENT:
        cause = "timeout" if world == "Silent" else "crashed"
        assert made.counters[f"env/failed/{cause}"] == 1


async def test_an_episode_out_of_time_gives_its_environment_back() -> None:
    async with runner(Sleeper, "Counting", episode_timeout=0.1) as made:
        episode = await play(made)
    assert episode.failure is not None
    assert episode.failure.kind is FailureKind.TIMEOUT


async def test_a_cancelled_episode_gives_its_environment_back() -> None:
    async with runner(Sleeper, "Counting") as made:
        playing = asyncio.create_task(play(made))
        async with asyncio.timeout(LIMIT):
            while not Counting.open_now:
                await asyncio.sleep(0.01)
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing


async def test_a_misspelt_environment_is_no_infrastructure() -> None:
    def find(name: str) -> Any:
        from astuner.env.registry import find_environment

        return find_environment(name)

    pool = EnvPool(LocalEnvs(find), PoolSettings(env_type="FrozenLak-v1"))
    made = EpisodeRunner(Player, None, FakeServer(), RunnerSettings(), pool)
    try:
        episode = await play(made)
    finally:
        pool.close()
    assert episode.failure is not None
    assert "There is no environment 'FrozenLak-v1'" in episode.failure.message
    assert not episode.failure.retriable
