"""Groups of episodes that were never played, with numbers to compute by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from astuner.types import Call, Episode, Failure, FailureKind, Group, Sample, Task, token_ids
from tests.spans import spans_of


def sample(episode: str, number: int, mask: Sequence[int], version: int = 2) -> Sample:
    """Token ids from 100, logprob -0.5 where trained."""
    mask_T = np.array(mask, bool)
    return Sample(
        sample_id=f"{episode}/{number}",
        episode_id=episode,
        group_id="g0",
        task_id="t",
        agent_name="default",
        target_tag="default",
        token_ids=token_ids(range(100, 100 + len(mask))),
        loss_mask=mask_T,
        logprobs=np.where(mask_T, -0.5, 0.0).astype(np.float32),
        spans=spans_of(np.where(mask_T, number, -1), np.where(mask_T, version, -1)),
    )


def call(version: int) -> Call:
    return Call(
        call_id="c",
        episode_id="e",
        agent_name="default",
        target_tag="default",
        prompt_ids=token_ids([1]),
        completion_ids=token_ids([2]),
        logprobs=np.zeros(1, np.float32),
        weight_versions=np.full(1, version, np.int32),
        finish_reason="stop",
        started_at=0.0,
        ended_at=1.0,
        request={},
        response={},
    )


def episode(
    name: str, repeat: int, reward: float | None, samples: Sequence[Sample], version: int = 2
) -> Episode:
    return Episode(
        episode_id=name,
        group_id="g0",
        task=Task(task_id="t"),
        repeat_index=repeat,
        split="train",
        calls=tuple(call(version) for _ in samples),
        samples=tuple(samples),
        output=None,
        reward=reward,
        turn_rewards=None,
        is_success=None,
        failure=None if reward is not None else Failure(FailureKind.WORKFLOW, "broke"),
        started_at=0.0,
        ended_at=1.0,
    )


def group(version: int = 2) -> Group:
    """Rewards 1, 0, 0.5 and a failure; the first episode fell into two timelines. `version` is
    of the weights that answered its calls."""
    first = [sample("e0", 0, [0, 0, 1, 0, 1, 0]), sample("e0", 1, [0, 1, 1], version=3)]
    episodes = (
        episode("e0", 0, 1.0, first, version),
        episode("e1", 1, 0.0, [sample("e1", 0, [0, 0, 0, 1])], version),
        episode("e2", 2, 0.5, [sample("e2", 0, [0, 1])], version),
        episode("e3", 3, None, [sample("e3", 0, [0, 1])], version),
    )
    return Group("g0", Task(task_id="t"), episodes, born_version=2)


def all_failed() -> Group:
    return replace(group(), episodes=group().episodes[3:])
