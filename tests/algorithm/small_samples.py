"""Small samples, episodes and groups with every number chosen by the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from astuner.types import Call, Episode, Group, Sample, Task, token_ids
from tests.spans import spans_of


def sample(
    episode: str, mask: Sequence[int], *, group: str = "g", turns: Sequence[int] | None = None
) -> Sample:
    """A sample of len(mask) tokens; trained tokens are of turn 0 unless `turns` says other."""
    mask_T = np.array(mask, bool)
    turns_T = turns or np.where(mask_T, 0, -1)
    return Sample(
        sample_id=f"{episode}/s",
        episode_id=episode,
        group_id=group,
        task_id="t",
        agent_name="default",
        target_tag="default",
        token_ids=token_ids(range(len(mask))),
        loss_mask=mask_T,
        logprobs=np.where(mask_T, -1.0, 0.0).astype(np.float32),
        spans=spans_of(turns_T, np.where(mask_T, 0, -1)),
    )


def call(episode: str, number: int) -> Call:
    return Call(
        call_id=f"{episode}/{number}",
        episode_id=episode,
        agent_name="default",
        target_tag="default",
        prompt_ids=token_ids([1]),
        completion_ids=token_ids([2, 3]),
        logprobs=np.array([-1.0, -1.0], np.float32),
        weight_versions=np.array([0, 0], np.int32),
        finish_reason="stop",
        request={},
        response={},
        started_at=0.0,
        ended_at=1.0,
    )


def episode(
    name: str,
    reward: float,
    samples: Sequence[Sample],
    turn_rewards: tuple[float, ...] | None = None,
    group: str = "g",
) -> Episode:
    return Episode(
        episode_id=name,
        group_id=group,
        task=Task(task_id="t"),
        repeat_index=0,
        split="train",
        calls=tuple(call(name, n) for n in range(len(turn_rewards or (0,)))),
        samples=tuple(samples),
        output=None,
        reward=reward,
        turn_rewards=turn_rewards,
        is_success=None,
        failure=None,
        started_at=0.0,
        ended_at=1.0,
    )


def group(name: str, *episodes: Episode) -> Group:
    return Group(name, Task(task_id="t"), episodes, born_version=0)


def two_targets(
    name: str,
    rewards: Mapping[str, tuple[float, ...]] | None,
    order: Sequence[str],
    *,
    reward: float = 0.0,
    group: str = "g",
) -> Episode:
    """One call, and one sample with one trained token, for each target tag in `order`."""
    samples = [
        replace(sample(name, [0, 1], group=group, turns=[-1, n]), target_tag=tag)
        for n, tag in enumerate(order)
    ]
    made = episode(name, reward, samples, group=group)
    calls = tuple(replace(call(name, n), target_tag=tag) for n, tag in enumerate(order))
    return replace(made, calls=calls, target_rewards=rewards)
