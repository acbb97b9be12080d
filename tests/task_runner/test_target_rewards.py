"""Rewards by target: which of them fit the episode's calls, and what they become."""

from __future__ import annotations

from typing import Any

import pytest

from astuner.task_runner import Workflow
from astuner.types import Episode, FailureKind, WorkflowOutput

from .fakes import make, run, task

pytestmark = pytest.mark.timeout(60)


def game(reward: Any, trainable: list[str] | None = None) -> type[Workflow]:
    """Wolf, villager, wolf speak; the reward is as given."""

    class Game(Workflow):
        trainable_targets: list[str] | None = trainable

        async def execute(self, workflow_task: Any, tuner: Any) -> WorkflowOutput:
            for target in ("wolf", "villager", "wolf"):
                tuner.say("hm", target)
            return WorkflowOutput(reward=reward)

    return Game


def trained(episode: Episode) -> list[tuple[str, int]]:
    return [(s.target_tag, s.num_trained) for s in episode.samples]


async def test_each_sample_has_the_reward_of_its_target() -> None:
    episode = await run(game({"wolf": [1.0, 0.5], "villager": -1.0}))
    assert episode.ok
    assert episode.target_rewards == {"wolf": (1.0, 0.5), "villager": (-1.0,)}
    assert episode.turn_rewards is None
    assert episode.reward == 0.25  # the mean of 1.5 and -1
    assert [(s.target_tag, s.reward) for s in episode.samples] == [
        ("wolf", 1.5),
        ("villager", -1.0),
        ("wolf", 1.5),
    ]


async def test_the_scalar_is_that_of_the_trained_targets() -> None:
    episode = await run(game({"wolf": 1.0, "villager": -1.0}, ["wolf"]))
    assert episode.reward == 1.0
    assert trained(episode) == [("wolf", 2), ("villager", 0), ("wolf", 2)]


async def test_a_judge_may_give_the_dict() -> None:
    class Judge:
        async def compute_reward(self, task: Any, output: WorkflowOutput) -> Any:
            return {"wolf": 1.0, "villager": 0.0}, True

    episode = await run(game(None), Judge())
    assert (episode.reward, episode.is_success) == (0.5, True)
    assert episode.target_rewards == {"wolf": (1.0,), "villager": (0.0,)}


@pytest.mark.parametrize(
    ("reward", "trainable", "says"),
    [
        (
            {"wolf": 1.0, "vilager": 0.0},
            None,
            "names the target 'vilager', but the episode's calls are of ['villager', 'wolf'].",
        ),
        (
            {"wolf": [1.0, 2.0, 3.0], "villager": 0.0},
            None,
            "target 'wolf' is a list of 3, but the target made 2 LLM calls.",
        ),
        (
            {"wolf": [0.5], "villager": 0.0},
            None,
            "target 'wolf' is a list of 1, but the target made 2 LLM calls.",
        ),
        (
            {"wolf": 1.0},
            None,
            "names ['wolf'], but not the target 'villager', which made 1 LLM calls and is trained.",
        ),
    ],
)
async def test_what_does_not_fit_fails_the_episode(
    reward: Any, trainable: list[str] | None, says: str
) -> None:
    episode = await run(game(reward, trainable))
    assert episode.failure is not None
    assert episode.failure.kind == FailureKind.REWARD
    assert says in episode.failure.message
    assert episode.reward is None


async def test_who_is_not_trained_needs_no_reward_and_who_was_silent_may_have_one() -> None:
    episode = await run(game({"wolf": 1.0, "seer": 0.5}, ["wolf", "seer"]))
    assert episode.ok
    assert episode.reward == 0.75


async def test_what_the_configuration_names_as_untrained_is_not_trained() -> None:
    named = {"villager": False, "wolf": True}
    episode = await run(game({"wolf": 1.0}), named_targets=named)
    assert episode.reward == 1.0
    assert trained(episode) == [("wolf", 2), ("villager", 0), ("wolf", 2)]
    both = await run(game(0.5, ["wolf", "villager"]), named_targets=named)
    assert trained(both) == [("wolf", 2), ("villager", 0), ("wolf", 2)]
    assert [s.reward for s in both.samples] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("now", "kept"), [(["wolf"], True), ([], True), (["wolf", "seer"], False), (None, False)]
)
async def test_execute_may_leave_targets_out_but_name_no_others(
    now: list[str] | None, kept: bool
) -> None:
    class Changing(game(0.5, ["wolf", "villager"])):
        async def execute(self, workflow_task: Any, tuner: Any) -> WorkflowOutput:
            self.trainable_targets = now
            return await super().execute(workflow_task, tuner)

    episode = await run(Changing)
    assert episode.ok is kept
    if kept:
        assert trained(episode) == [(t, 2 * (t in now)) for t in ("wolf", "villager", "wolf")]
    else:
        assert episode.failure.kind is FailureKind.WORKFLOW
        assert "the class declares ['villager', 'wolf']" in episode.failure.message


async def test_the_session_knows_who_is_not_trained() -> None:
    runner, server = make(game(0.0), named_targets={"villager": False, "wolf": True})
    await runner.run(task(), group_id="g", seed=0, sampling=None)  # type: ignore[arg-type]
    assert server.sessions[0].spec.untrained_targets == {"villager"}
    assert server.sessions[0].spec.trainable_targets is None
